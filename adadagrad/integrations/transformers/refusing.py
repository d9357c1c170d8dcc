"""Which of the user's arguments cannot be right together with a batch size that changes, said before any work."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from adadagrad.core.checks import check_choice, check_integer
from adadagrad.core.errors import InvalidArgument, OverriddenSampler, UnsizedDataset
from adadagrad.engine.arguments import needs_closure
from adadagrad.policies.base import AbstractPolicy

SAMPLERS = ("group_by_length", "batch_rebalance")
"""Samplers that make batches of a known size beforehand."""

SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that are no function of progress."""


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that the engine replaces, or that would act on its steps behind its back.

    Args:
        args: The user's.

    Raises:
        OverriddenSampler: They ask for a sampler that makes batches of a known size.
        InvalidArgument: They ask for something else that is not supported; the message names it, and what to do.
    """
    given = vars(args)
    sampler = "group_by_length" if given.get("group_by_length") else given.get("train_sampling_strategy")
    if sampler in SAMPLERS:
        raise OverriddenSampler(
            f"args ask for {sampler}, which sorts batches of a known size, and the size changes: leave it out"
        )
    accelerator: Any = args.accelerator_config
    optimizer = str(getattr(args.optim, "value", args.optim))
    for name, asked, remedy in (
        ("auto_find_batch_size", given["auto_find_batch_size"], "set per_device_train_batch_size to what fits"),
        ("deepspeed", given["deepspeed"], "train with DistributedDataParallel or FSDP2"),
        ("parallelism_config", given.get("parallelism_config"), "share steps by data alone"),
        ("fp16", given["fp16"], "use bf16, which needs no loss scale"),
        ("enable_jit_checkpoint", given.get("enable_jit_checkpoint"), "save with save_steps: it saves inside a step"),
        (
            f"optim={optimizer!r}",
            optimizer.endswith(("lomo", "layerwise")),
            "it steps inside the backward: use another",
        ),
        ("torch_empty_cache_steps", given["torch_empty_cache_steps"], "leave it out"),
        ("include_num_input_tokens_seen", given["include_num_input_tokens_seen"] != "no", "read samples_seen"),
        ("accelerator_config.split_batches", accelerator.split_batches, "leave it out: ranks share each step"),
        ("accelerator_config.dispatch_batches", accelerator.dispatch_batches, "leave it out: ranks read their own"),
        *(
            (f"{name}={given[name]}, a share of all steps,", 0 < (given[name] or 0) < 1, "give a number of steps")
            for name in ("logging_steps", "eval_steps", "save_steps")
        ),
    ):
        if asked:
            raise InvalidArgument(f"{name} of args is not supported by AdaptiveBatchTrainer: {remedy}")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in SCHEDULES:
        raise InvalidArgument(
            f"lr_scheduler_type={schedule!r} is no function of the examples seen: use one such as 'cosine' or 'linear'"
        )


def refuse_settings(
    policy: object, weight: object, total_samples: int | None, *, epoch_boundary: str, on_nonfinite: str
) -> None:
    """Refuse arguments of ours that are not what they must be; those of the engine it refuses itself.

    Args:
        policy: What is to ask for batch sizes.
        weight: How examples weigh.
        total_samples: The budget, or None.
        epoch_boundary: A word.
        on_nonfinite: A word.

    Raises:
        InvalidArgument: The policy is none, the weight is neither a known word nor a function, or the budget is no
            positive number of examples.
        UnknownName: A word is unknown.
    """
    if not isinstance(policy, AbstractPolicy):
        raise InvalidArgument(f"policy must be a policy such as NormTest(), got {policy!r}")
    if not callable(weight) and weight not in ("labels", "examples"):
        raise InvalidArgument(f"weight must be 'labels', 'examples' or a function of a micro-batch, got {weight!r}")
    if total_samples is not None:
        check_integer(1, total_samples=total_samples)
    check_choice("epoch_boundary", epoch_boundary, ("cross", "short"))
    check_choice("on_nonfinite", on_nonfinite, ("skip", "stop"))


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse what the trainer was made with besides its training arguments.

    Args:
        trainer: The trainer; its base class is initialised.

    Raises:
        InvalidArgument: A scheduler of the user's would own the learning rate beside the engine, the optimizer needs a
            closure, the model is sharded by FSDP 1, or torch's DataParallel would hide the ranks.
        UnsizedDataset: The training data have no positions.
        OverriddenSampler: A subclass makes a sampler of its own.
    """
    if trainer.lr_scheduler is not None:
        raise InvalidArgument(
            "optimizers holds a scheduler, which counts steps, and the engine owns the learning rate: pass "
            "optimizers=(optimizer, None) and choose lr_scheduler_type"
        )
    if trainer.optimizer is not None and needs_closure(trainer.optimizer):
        raise InvalidArgument(
            f"optimizer {type(trainer.optimizer).__name__} needs a closure, and Trainer gives none: use another"
        )
    if isinstance(trainer.train_dataset, IterableDataset):
        raise UnsizedDataset(
            f"train_dataset is iterable ({type(trainer.train_dataset).__name__}), so that its examples have no "
            "positions, and no order can be resumed: pass a map-style data set, with __getitem__ and __len__"
        )
    if type(trainer)._get_train_sampler is not Trainer._get_train_sampler:
        raise OverriddenSampler(
            f"{type(trainer).__name__} has a sampler of its own, which the engine's order would replace: leave it out"
        )
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise InvalidArgument(
            'fsdp wraps the model as FSDP 1 does, which is not supported: set fsdp_config={"version": 2}'
        )
    if trainer.args.n_gpu > 1:
        raise InvalidArgument(
            f"{trainer.args.n_gpu} GPUs in one process would train under torch.nn.DataParallel, which hides its ranks: "
            "start one process for each GPU with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES"
        )


def step_of(inputs: Any) -> Any:
    """Return the step that an item of the training loader is.

    Args:
        inputs: The item.

    Raises:
        InvalidArgument: It is a batch of somebody else's loader.
    """
    if not isinstance(inputs, dict) or "step" not in inputs:
        raise InvalidArgument(
            "training_step was given a batch and no step: get_train_dataloader is overridden in a subclass, and the "
            "engine's data would be replaced; pass train_dataset and data_collator instead"
        )
    return inputs["step"]
