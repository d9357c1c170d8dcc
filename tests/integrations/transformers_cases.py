"""Models, data and callbacks with which the tests look into a Hugging Face Trainer, the raw one and ours."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.distributed as dist
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that transformers imports
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging


from adadagrad.integrations.transformers import AdaptiveBatchTrainer

logging.set_verbosity_error()

VOCABULARY = 32


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    """Quiet arguments for the CPU; the learning rate is constant unless a test says otherwise."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "seed": 0,
        "label_names": ["y"],
    }
    return TrainingArguments(**(settings | changed))


def as_one_of(rank: int, count: int) -> None:
    """Let accelerate see what torchrun would tell a process whose group is there already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


class Sharded(AdaptiveBatchTrainer):
    """A trainer that shards its model on the CPU, which accelerate does on accelerators only."""

    version = 2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPT2Block"],
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        self.is_fsdp_enabled = True


class Linear(nn.Module):
    """A linear regression that remembers which rows it was shown in training."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        self.seen: list[int] = []
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen += index.tolist()
            self.sizes.append(len(index))
        return {"loss": (self.linear(x) - y).square().mean()}


class OfGradientOne(nn.Module):
    """One parameter, whose mean gradient over any examples is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, **others: Any) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * torch.ones(len(x))).mean()}


def rows(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=dtype)
    y = x.sum(1, keepdim=True) + torch.randn(count, 1, generator=generator, dtype=dtype)
    return [{"x": x[i], "y": y[i], "index": torch.tensor(i)} for i in range(count)]


def sentences(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Token sequences of which only a few labels count."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[int(torch.randint(2, length, (1,), generator=generator)) :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def small_gpt(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return GPT2LMHeadModel(config)


class Watching(TrainerCallback):
    """Notes, at every step, its micro-batches, its gradient, its learning rate and how far the ranks are apart."""

    def __init__(self, accumulation: dict[int, int] | None = None) -> None:
        self.change = accumulation or {}
        """From a step to the accumulation that is set at its end."""
        self.micro = 1
        self.micro_batches: list[int] = []
        self.gradients: list[float] = []
        self.apart: list[float] = []
        self.rates: list[float] = []
        self.planned = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.planned = state.max_steps

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.micro += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.gradients.append(max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.micro_batches.append(self.micro)
        self.micro = 1
        if state.global_step in self.change:
            args.gradient_accumulation_steps = self.change[state.global_step]
        if dist.is_initialized():
            own = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            all_of = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(all_of, own)
            self.apart.append(max(float((other - own).abs().max()) for other in all_of))


def sizes(trainer: Trainer) -> list[int]:
    """The batch sizes of a run's steps, from Trainer's own log."""
    return [line["adadagrad/global_batch_size"] for line in trainer.state.log_history if "loss" in line]
