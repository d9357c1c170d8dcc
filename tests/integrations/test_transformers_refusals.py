"""What `AdaptiveBatchTrainer` refuses, with what its messages say, before any step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from torch.utils.data import IterableDataset
from transformers import Trainer

from adadagrad import AdaScale, ConstantBatch, Measure, NormTest
from adadagrad.core.errors import InvalidArgument, OverriddenSampler, UnsizedDataset
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from tests.integrations.transformers_cases import Linear, arguments, rows


def make(folder, changed=None, trainer=AdaptiveBatchTrainer, **our):
    named = {"train_dataset": rows(32), "policy": ConstantBatch()} | our
    return trainer(named.pop("model", Linear()), arguments(folder, **(changed or {})), **named)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size of args is not supported.*per_device_train_batch_size"),
        ({"fp16": True}, "fp16 of args is not supported.*use bf16"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint.*save_steps"),
        ({"torch_empty_cache_steps": 5}, "torch_empty_cache_steps.*leave it out"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen.*read samples_seen"),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config.split_batches of args.*share each step"),
        ({"accelerator_config": {"dispatch_batches": True}}, r"accelerator_config.dispatch_batches of args"),
        ({"save_steps": 0.25}, "save_steps=0.25, a share of all steps, of args is not supported.*a number of steps"),
        ({"eval_steps": 0.1}, "eval_steps=0.1, a share"),
        ({"logging_steps": 0.1}, "logging_steps=0.1, a share"),
        ({"optim": "lomo"}, "optim='lomo' of args is not supported.*inside the backward"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "lr_scheduler_type='reduce_lr_on_plateau' is no function of",
        ),
    ],
)
def test_training_arguments(tmp_path, changed, message):
    if "fp16" in changed:  # which needs an accelerator, and is refused before Trainer looks for one
        args = arguments(tmp_path)
        args.fp16 = True
        with pytest.raises(InvalidArgument, match=message):
            AdaptiveBatchTrainer(Linear(), args, train_dataset=rows(32), policy=ConstantBatch())
        return
    with pytest.raises(InvalidArgument, match=message):
        make(tmp_path, changed)


def test_samplers_that_know_the_batch_size(tmp_path):
    known = vars(arguments(tmp_path))
    for name in ("group_by_length", "batch_rebalance"):
        if "train_sampling_strategy" in known:
            changed = {"train_sampling_strategy": name}
        elif name in known:
            changed = {name: True}
        else:
            continue
        with pytest.raises(OverriddenSampler, match=f"args ask for {name}"):
            make(tmp_path, changed)


def test_deepspeed(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(InvalidArgument, match=r"deepspeed of args is not supported.*DistributedDataParallel or FSDP2"):
        AdaptiveBatchTrainer(Linear(), args, train_dataset=rows(32), policy=ConstantBatch())


def test_several_gpus_in_one_process(tmp_path):
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(InvalidArgument, match=r"2 GPUs in one process.*torchrun"):
        AdaptiveBatchTrainer(Linear(), args, train_dataset=rows(32), policy=ConstantBatch())


def test_data_without_positions(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            yield rows(1)[0]

    with pytest.raises(UnsizedDataset, match=r"train_dataset is iterable \(Endless\)"):
        make(tmp_path, {"max_steps": 3}, train_dataset=Endless())


def test_samplers_and_loaders_of_subclasses(tmp_path):
    class Sampled(AdaptiveBatchTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with pytest.raises(OverriddenSampler, match="Sampled has a sampler of its own"):
        make(tmp_path, trainer=Sampled)

    class Loaded(AdaptiveBatchTrainer):
        def get_train_dataloader(self):
            super().get_train_dataloader()
            return Trainer.get_train_dataloader(self)

    with pytest.raises(InvalidArgument, match="get_train_dataloader is overridden"):
        make(tmp_path, trainer=Loaded).train()


def test_a_second_owner_of_the_rate(tmp_path):
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(InvalidArgument, match=r"optimizers holds a scheduler.*optimizers=\(optimizer, None\)"):
        make(tmp_path, model=model, optimizers=(optimizer, scheduler))


def test_optimizers_with_a_closure(tmp_path):
    model = Linear()
    with pytest.raises(InvalidArgument, match="LBFGS needs a closure, and Trainer gives none"):
        make(tmp_path, model=model, optimizers=(torch.optim.LBFGS(model.parameters()), None))
    named = make(tmp_path, model=model, optimizer_cls_and_kwargs=(torch.optim.LBFGS, {}))
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        named.train()


@pytest.mark.parametrize(
    ("our", "message"),
    [
        ({"policy": "norm"}, r"policy must be a policy such as NormTest\(\)"),
        ({"weight": "tokens"}, "weight must be 'labels', 'examples' or a function"),
        ({"measure": 3}, r"measure must be Measure\(...\) or None"),
        ({"bounds": 3}, r"bounds must be Bounds\(...\) or None"),
        ({"rate": AdaScale}, r"rate must be an instance"),
        ({"total_samples": 0}, "total_samples must be"),
        ({"epoch_boundary": "long"}, "unknown epoch_boundary 'long'"),
        ({"on_nonfinite": "ignore"}, "unknown on_nonfinite 'ignore'"),
    ],
)
def test_arguments_of_ours(tmp_path, our, message):
    with pytest.raises(InvalidArgument, match=message):
        make(tmp_path, **our)


def test_contradictions_come_out_before_the_first_step(tmp_path):
    model = Linear()
    with pytest.raises(InvalidArgument, match="max_batch_size"):
        make(tmp_path, model=model, policy=NormTest(eta=0.5), max_batch_size=4).train()
    with pytest.raises(InvalidArgument, match="min_batch_size must be <= global_batch_size"):
        make(tmp_path, model=model, policy=NormTest(eta=0.5), min_batch_size=30).train()
    with pytest.raises(InvalidArgument, match="data set and budget hold"):
        make(tmp_path, {"gradient_accumulation_steps": 9}, model=model).train()
    assert model.seen == []


def test_the_users_arguments_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    before = dict(vars(args))
    AdaptiveBatchTrainer(Linear(), args, train_dataset=rows(64), policy=NormTest(eta=0.5), measure=Measure()).train()
    assert {name: value for name, value in vars(args).items() if before[name] is not value} == {}


def test_without_transformers_the_extra_is_named():
    code = "import sys; sys.modules['transformers'] = None; import adadagrad.integrations.transformers"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "transformers is not installed: pip install 'adadagrad[hf]'" in found.stderr


def test_no_word_of_it_in_the_package_itself():
    code = "import sys, adadagrad; print('transformers' in sys.modules, 'accelerate' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
