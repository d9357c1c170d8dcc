"""What must hold on a CUDA device too; every test skips, with a reason, where there is none.

python -m pytest tests/accelerator
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.parallel import SingleProcess
from adadagrad.statistics.base import Request
from benchmarks.models import GPT, mlp, small_residual
from tests.engine.cases import make_data, make_engine, make_model, train, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")

ALL = ada.Measure(every=1, max_examples=None)
NETWORKS = {
    "mlp": (mlp, (1, 28, 28)),
    "residual": (small_residual, (1, 28, 28)),
    "gpt": (lambda: GPT(length=16, width=24, heads=2, blocks=2), (16,)),
}


def examples(name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator, shape = torch.Generator().manual_seed(0), NETWORKS[name][1]
    if name == "gpt":
        text = torch.randint(0, 65, (n, shape[0] + 1), generator=generator).cuda()
        return text[:, :-1], text[:, 1:]
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x.cuda(), torch.randint(0, 10, (n,), generator=generator).cuda()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_four_numbers_are_those_of_a_loop_over_examples(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().cuda().double()
    x, y = examples(name, 9)
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    expected = ada.statistics_from_units(torch.stack(rows))
    instrument = ada.PerExample().open(model, Request(inner_products=True))
    for _ in range(4):  # the fourth step does not verify
        model.zero_grad()
        with instrument.micro_batch():
            F.cross_entropy(model(x), y).backward()
        found = instrument.finish()
        for field in ("grad_norm_sq", "variance_trace", "inner_product_variance"):
            assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-9), field


def on_device(device: str, wrap: Any = None, dropout: float = 0.0, **options: Any) -> Any:
    model = make_model(dropout).to(device)
    whole = model if wrap is None else wrap(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    return make_engine(whole, optimizer, policy=ada.NormTest(eta=0.6), measure=ALL, **options)


def trace(engine: Any) -> list[int]:
    return [decision.plan.global_batch_size for decision in train(engine)]


def test_the_engine_trains_as_on_a_cpu() -> None:
    there, here = on_device("cuda"), on_device("cpu")
    assert trace(there) == trace(here)
    assert float((weights(there.model).cpu() - weights(here.model)).abs().max()) < 1e-12


def test_a_run_resumes_bit_for_bit_with_dropout(tmp_path: Any) -> None:
    whole = on_device("cuda", dropout=0.3)
    sizes = trace(whole)
    first = on_device("cuda", dropout=0.3)
    seen = [decision.plan.global_batch_size for decision in train(first, steps=5)]
    first.save(tmp_path / "run.pt")
    torch.cuda.manual_seed_all(99)
    second = on_device("cuda", dropout=0.3)
    second.load(tmp_path / "run.pt")
    assert seen + trace(second) == sizes
    assert torch.equal(weights(second.model), weights(whole.model))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of one rank under nccl."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_wrapped_model_trains_as_a_plain_one_under_nccl() -> None:
    plain = on_device("cuda")
    expected = trace(plain)
    wrapped = on_device("cuda", wrap=DistributedDataParallel)
    assert type(wrapped.parallel).__name__ == "DataParallel"
    assert trace(wrapped) == expected
    assert float((weights(wrapped.model) - weights(plain.model)).abs().max()) < 1e-12


def test_autocast_statistics_are_those_of_float32_within_a_percent() -> None:
    torch.manual_seed(0)
    model = mlp().cuda()
    x, y = examples("mlp", 64)
    found = []
    for on in (False, True):
        copied = copy.deepcopy(model)
        instrument = ada.PerExample().open(copied, Request())
        with instrument.micro_batch(), torch.autocast("cuda", torch.float16, enabled=on):
            F.cross_entropy(copied(x.float()), y).backward()
        found.append(instrument.finish().variance_trace)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_data_on_the_host_moves_to_the_model() -> None:
    engine = make_engine(make_model().cuda(), data=torch.utils.data.DataLoader(make_data(), num_workers=0))
    assert train(engine, steps=2)[-1].observation.loss > 0


def wide() -> nn.Module:
    """A network whose activations take 32 KB an example and layer in float32, its weights 1 MB."""
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(8192, 16), nn.Linear(16, 8192), nn.Dropout(0.1))]
    return nn.Sequential(nn.Linear(5, 8192), *layers, nn.Linear(8192, 3)).cuda()


def test_memory_that_really_runs_out_halves_the_micro_batches() -> None:
    def trained(micro_batch_size: int) -> Any:
        model = wide()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine = ada.AdaptiveBatch(
            model,
            optimizer,
            make_data(2048, dtype=torch.float32),
            ada.ConstantBatch(1024),
            total_samples=4096,
            micro_batch_size=micro_batch_size,
        )
        train(engine)
        return engine

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.5 * 2**30 / total)  # 1024 examples need more than half a gigabyte
    try:
        with pytest.warns(UserWarning, match="memory ran out in step 1"):
            engine = trained(1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= engine.memory_retries <= 6
    assert engine.micro_batch_size == 1024 >> engine.memory_retries
    expected = trained(engine.micro_batch_size)
    assert expected.memory_retries == 0
    assert torch.equal(weights(engine.model), weights(expected.model))


def test_half_precision_with_a_scaler_measures_what_single_precision_measures() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(512, 64, generator=generator), torch.randint(0, 10, (512,), generator=generator)
    )
    found = {}
    for half in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
        engine = make_engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            data,
            global_batch_size=256,
            measure=ada.Measure(estimator=ada.PerExample(), every=1, max_examples=None),
            grad_scaler=torch.amp.GradScaler("cuda", init_scale=2.0**12) if half else None,
            total_samples=1024,
            micro_batch_size=128,
        )

        def loss(batch: Any, model: nn.Module = model, half: bool = half) -> Any:
            with torch.autocast("cuda", dtype=torch.float16, enabled=half):
                output = model(batch[0])
            return F.cross_entropy(output.float(), batch[1])

        found[half] = train(engine, loss, steps=1)[0].observation.gradient
        assert engine.skipped == 0
    for number in ("grad_norm_sq", "variance_trace"):
        assert getattr(found[True], number) == pytest.approx(getattr(found[False], number), rel=0.01)


@pytest.mark.usefixtures("group")
def test_local_steps_under_nccl() -> None:
    found = []
    for local in (True, False):
        model = make_model().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        parallel = ada.LocalSGD(model, optimizer, 3) if local else SingleProcess(model)
        engine = make_engine(model, optimizer, policy=ada.ConstantBatch(12), parallel=parallel, total_samples=84)
        train(engine)
        found.append(weights(model))
        assert not local or parallel.rounds == 3
    assert float((found[0] - found[1]).abs().max()) < 1e-12


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("estimator", [ada.PerExample(), ada.MicroBatch()], ids=lambda e: type(e).__name__)
def test_a_sharded_model_trains_and_resumes_as_a_plain_one_under_nccl(estimator: Any, tmp_path: Path) -> None:
    def build(shard: bool) -> Any:
        model = make_model().cuda()
        if shard:
            fully_shard(model)
        return make_engine(
            model,
            torch.optim.Adam(model.parameters(), lr=0.01),
            policy=ada.NormTest(eta=0.6),
            measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
            global_batch_size=16,
            parallel=None if shard else SingleProcess(model),
        )

    plain, sharded, again = build(False), build(True), build(True)
    expected, found = trace(plain), train(sharded, steps=3)
    sharded.save(tmp_path / "shards")
    again.load(tmp_path / "shards")
    found += train(again)
    assert [d.plan.global_batch_size for d in found] == expected
    whole = torch.cat([p.full_tensor().detach().flatten() for p in again.model.parameters()])
    assert float((whole - weights(plain.model)).abs().max()) < 1e-12
