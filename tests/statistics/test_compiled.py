"""Compiled models: measured exactly and uncompiled, while the compiled code of the other micro-batches is kept."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadagrad.core.errors import StepError
from adadagrad.statistics import GradientMeter, MicroBatch, PerExample
from adadagrad.statistics.compiled import EagerUntilCalled, compiled_modules, is_compiled, uncompiled
from tests.oracles import naive_statistics
from tests.statistics.checking import (
    BLOCKS,
    EVERYTHING,
    NORMS,
    Composite,
    assert_close,
    floats,
    losses_of,
    measure_once,
)

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks


class Backend:
    """Runs graphs as they are, and counts how many were made and how often one ran."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(4)
    first = Composite(lambda m, x: m.layer(x), layer=nn.Linear(4, 5))  # torch compiles no layer of its own in place
    body = nn.Sequential(first, nn.LayerNorm(5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    return Composite(lambda m, x: m.body(x * 1.0), body=body).double()


def compile_as(how: str, model: nn.Module, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
    """Compile a model in one of the ways that people use; return what the loop calls, and what is measured."""
    if how in {"wrapper", "wrapper that the meter does not know"}:
        wrapper = torch.compile(model, **options)
        return wrapper, wrapper if how == "wrapper" else model
    if how == "function around it":
        return torch.compile(lambda x: model(x), **options), model
    if how == "parts":
        model.body[0].compile(**options)
        model.body[3] = torch.compile(model.body[3], **options)
    else:
        model.compile(**options)
    return model, model


HOW = ["wrapper", "in place", "parts", "wrapper that the meter does not know", "function around it"]


@pytest.mark.parametrize(("how", "dynamic"), [*((how, None) for how in HOW), ("wrapper", True)])
def test_measuring_compiles_nothing_and_the_other_micro_batches_run_the_code_they_had(
    how: str, dynamic: bool | None, backend: Backend
) -> None:
    """Twenty sizes, every third micro-batch measured: as many graphs as without measuring."""
    model = network()
    twin = copy.deepcopy(model)
    call, measured = compile_as(how, model, backend=backend, dynamic=dynamic)
    instrument = PerExample().open(measured, NORMS)
    runs = 2 if how == "parts" else 1
    before = dict(model.__dict__), [dict(m.__dict__) for m in compiled_modules(measured)]
    for step in range(24):
        x, known = floats(8 * (step % 20 + 1), 4), (backend.graphs, backend.runs)
        model.zero_grad()
        if step % 3 == 1:
            statistics, said = measure_once(instrument, lambda m, x=x: losses_of(call, (x,)))
            assert_close(statistics, naive_statistics(twin, lambda m, x=x: losses_of(m, (x,))))
            assert said == []
            assert (backend.graphs, backend.runs) == known
        else:
            losses_of(call, (x,)).mean().backward()
            assert backend.runs == known[1] + runs
    assert backend.graphs <= runs * (1 if dynamic else 2)  # automatic: one for the first size, one for all others
    assert (dict(model.__dict__), [dict(m.__dict__) for m in compiled_modules(measured)]) == before


@pytest.mark.parametrize("how", HOW[:3])
def test_which_one_runs_is_reported(how: str, backend: Backend) -> None:
    model = network()
    assert GradientMeter(model).compiled == ""
    _, measured = compile_as(how, model, backend=backend)
    names = {"wrapper": "the model", "in place": "the model", "parts": r"body.0, body.3"}[how]
    for estimator, runs in ((PerExample(), "uncompiled"), (MicroBatch(), "compiled")):
        said = GradientMeter(measured, estimator).compiled
        assert said == f"measured micro-batches run {runs}, the others compiled: {names}"


def test_the_first_call_of_all_may_be_measured(backend: Backend) -> None:
    model = network()
    compiled = torch.compile(model, backend=backend)
    instrument = PerExample().open(compiled, EVERYTHING)
    measure_once(instrument, lambda m: losses_of(m, (floats(6, 4),)))
    assert backend.graphs == 0
    losses_of(compiled, (floats(6, 4),)).mean().backward()
    assert (backend.graphs, backend.runs) == (1, 1)


def test_two_calls_of_a_compiled_model_in_one_micro_batch(backend: Backend) -> None:
    model = network()
    twin, compiled = copy.deepcopy(model), torch.compile(model, backend=backend, dynamic=True)
    losses = lambda m: (m(floats(6, 4)) - m(floats(6, 4) + 1)).square().sum(1)  # noqa: E731
    losses(compiled).mean().backward()
    instrument = PerExample().open(compiled, EVERYTHING)
    for _ in range(4):
        assert_close(measure_once(instrument, losses)[0], naive_statistics(twin, losses, BLOCKS))
    assert backend.graphs == 1


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_rerun_of_a_compiled_model_compiles_nothing(backend: Backend) -> None:
    torch.manual_seed(4)
    model = Composite(lambda m, x: m.a(x) * m.gain, a=nn.Linear(4, 3), gain=nn.Parameter(torch.ones(3))).double()
    twin, compiled = copy.deepcopy(model), torch.compile(model, backend=backend)
    losses = lambda m: losses_of(m, (floats(6, 4),))  # noqa: E731
    losses(compiled).mean().backward()
    instrument = PerExample().open(compiled, EVERYTHING)
    for _ in range(4):
        assert_close(measure_once(instrument, losses)[0], naive_statistics(twin, losses, BLOCKS))
        losses(compiled).mean().backward()
    assert list(instrument.fallback) == ["_orig_mod.gain"]
    assert (backend.graphs, backend.runs) == (1, 5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_compiled_function_inside_the_model_stays_compiled(reentrant: bool | None, backend: Backend) -> None:
    """An attention kernel, say, that would need far more memory uncompiled; a checkpoint calls it once more."""
    kernel = torch.compile(torch.sin, backend=backend, dynamic=True)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).clone()
        return m.b(kernel(h) if reentrant is None else checkpoint(kernel, h, use_reentrant=reentrant))

    torch.manual_seed(4)
    model = Composite(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double()
    twin = Composite(lambda m, x: m.b(torch.sin(m.a(x))), a=model.a, b=model.b)
    instrument = PerExample().open(model, NORMS)
    losses = lambda m: losses_of(m, (floats(6, 4),))  # noqa: E731
    for _ in range(4):
        known = backend.runs
        assert_close(measure_once(instrument, losses)[0], naive_statistics(twin, losses))
        assert backend.runs > known
    known = backend.graphs
    losses(model).mean().backward()
    assert backend.graphs == known


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_an_error_and_a_second_measurement_leave_the_compiled_code_in_place(how: str, backend: Backend) -> None:
    model = network()
    call, measured = compile_as(how, model, backend=backend)
    losses_of(call, (floats(6, 4),)).mean().backward()
    model.zero_grad()
    outer, inner = PerExample().open(measured, NORMS), PerExample().open(measured, NORMS)
    with pytest.raises(ZeroDivisionError), outer.micro_batch():
        raise ZeroDivisionError
    with outer.micro_batch():
        with pytest.raises(StepError, match="being measured already"), inner.micro_batch():
            pass
        losses_of(call, (floats(6, 4),)).mean().backward()
    assert_close(outer.finish(), naive_statistics(network(), lambda m: losses_of(m, (floats(6, 4),))))
    losses_of(call, (floats(6, 4),)).mean().backward()
    assert (backend.graphs, backend.runs) == (1, 2)


def test_units_are_measured_on_the_compiled_code(backend: Backend) -> None:
    """`MicroBatch` reads gradients of parameters, and patches nothing."""
    model = network()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    meter = GradientMeter(compiled, MicroBatch())
    for size in (8, 16, 24):
        model.zero_grad()
        for part in floats(2 * size, 4).split(size):
            with meter.micro_batch(size, 0.5 / size):  # a copy, because a graph is for views or for others
                (losses_of(compiled, (part.clone(),)).sum() / (2 * size)).backward()
        assert meter.statistics().num_units == 2
        losses_of(compiled, (floats(size, 4),)).mean().backward()
    assert (backend.graphs, backend.runs) == (1, 9)


def test_what_is_compiled_is_found_and_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].compile(backend="eager")
    wrapper = torch.compile(model, backend="eager")
    assert compiled_modules(wrapper) == [wrapper, model[1]]
    forward, call = wrapper.forward, model[1]._compiled_call_impl
    with contextlib.suppress(ZeroDivisionError), uncompiled(compiled_modules(wrapper)):
        assert wrapper.__dict__["forward"] == model.__call__
        assert not is_compiled(model[1])
        raise ZeroDivisionError
    assert wrapper.forward is forward
    assert model[1]._compiled_call_impl is call


def test_a_stance_of_the_users_own_comes_back() -> None:
    from torch._dynamo import eval_frame

    with torch.compiler.set_stance("eager_on_recompile"):
        with EagerUntilCalled() as entrance:
            assert eval_frame._stance.stance == "force_eager"
            entrance.release()
            assert eval_frame._stance.stance == "eager_on_recompile"
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(os.environ.get("ADADAGRAD_SLOW") != "1", reason="compiles C++ code: set ADADAGRAD_SLOW=1")
@pytest.mark.parametrize("how", HOW[:2])
def test_with_the_default_compiler(how: str) -> None:
    torch._dynamo.reset()
    model = network()
    twin = copy.deepcopy(model)
    call, measured = compile_as(how, model)
    instrument = PerExample().open(measured, EVERYTHING)
    made = []
    for step in range(12):
        x = floats(8 * (step + 1), 4)
        model.zero_grad()
        if step % 3 == 1:
            statistics, _ = measure_once(instrument, lambda m, x=x: losses_of(call, (x,)))
            assert_close(statistics, naive_statistics(twin, lambda m, x=x: losses_of(m, (x,)), BLOCKS), 1e-9)
        else:
            losses_of(call, (x,)).mean().backward()
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[-1] - made[0] <= 1
    torch._dynamo.reset()


def test_two_models_measured_at_once_leave_the_compiler_as_it_was() -> None:
    from torch._dynamo import eval_frame

    models, x = (nn.Linear(3, 2), nn.Linear(3, 2)), floats(4, 3).float()
    meters = [GradientMeter(model) for model in models]
    with meters[0], meters[1]:
        sum(model(x).square().sum(1).mean() for model in models).backward()
    assert eval_frame._stance.stance == "default"
