"""A measurement leaves nothing behind, changes no gradient, and never harms the backward that it rides on."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadagrad.core.errors import AdadagradError, InvalidMeasurement, StepError
from adadagrad.statistics import GradientMeter, PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.taps import Tap, patched_forwards
from tests.oracles import naive_statistics
from tests.statistics.checking import (
    BLOCKS,
    EVERYTHING,
    NORMS,
    Composite,
    assert_close,
    assert_exact,
    floats,
    losses_of,
    measure_once,
)

Linear = nn.Linear
X = (floats(6, 4),)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(4)
    layers = [Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Dropout(dropout), Linear(8, 2)]
    return nn.Sequential(*layers).double()


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_forwards_are_replaced_inside_and_restored_outside() -> None:
    model = network()
    instrument = PerExample().open(model, NORMS)
    with instrument.micro_batch():
        losses_of(model, X).mean().backward()
        assert patched(model) == ["", "0", "1", "4"]
    assert patched(model) == []


def test_a_forward_set_by_somebody_else_comes_back() -> None:
    layer = Linear(4, 3)
    own = layer.forward = lambda x: F.linear(x, layer.weight)
    with contextlib.suppress(KeyError), patched_forwards({layer: lambda x: x}):
        assert layer(1) == 1
        raise KeyError
    assert layer.__dict__["forward"] is own


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
@pytest.mark.parametrize("warm", [False, True])
def test_an_error_inside_unpatches_and_the_next_measurement_is_right(where: str, warm: bool) -> None:
    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            if where == "forward" and armed:
                raise ZeroDivisionError
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            if where == "backward" and armed:
                raise ZeroDivisionError
            return gradient

    torch.manual_seed(4)
    model = Composite(lambda m, x: m.b(Bomb.apply(torch.tanh(m.a(x)))), a=Linear(4, 3), b=Linear(3, 2)).double()
    instrument = PerExample().open(model, EVERYTHING)
    armed = False
    if warm:
        measure_once(instrument, lambda m: losses_of(m, X))
    armed = True
    model.zero_grad()

    def interrupted() -> None:
        with instrument.micro_batch():
            loss = losses_of(model, X).mean()
            if where == "loss":
                raise ZeroDivisionError
            loss.backward()

    with pytest.raises(ZeroDivisionError):
        interrupted()
    armed = False
    assert patched(model) == []
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        instrument.finish()
    assert_exact(instrument, lambda m: losses_of(m, X))


def train(measure: Request | None, dropout: float, steps: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and all gradients of a short run with ragged micro-batches, measured or not."""
    model = network(dropout)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    instrument = None if measure is None else PerExample().open(model, measure)
    torch.manual_seed(9)
    gradients = []
    for step in range(steps):
        x = torch.randn(7, 4, dtype=torch.float64)
        optimizer.zero_grad()
        for part in x.split((4, 3)):
            loss = losses_of(model, (part,)).sum() / 7
            if instrument is None or step % 2:
                loss.backward()
            else:
                with instrument.micro_batch(len(part), 1 / 7):
                    (losses_of(model, (part,)).sum() / 7).backward()
        if instrument is not None and step % 2 == 0:
            instrument.finish()
        gradients += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return list(model.parameters()), gradients


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_gradients_and_weights_are_bitwise_those_without_measuring(request_) -> None:
    for plain, measured in zip(train(None, 0.0), train(request_, 0.0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_dropout_draws_the_same_masks_with_and_without_measuring() -> None:
    def run(measured: bool) -> list[Tensor]:
        model = network(dropout=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        instrument = PerExample().open(model, NORMS)
        torch.manual_seed(9)
        for _ in range(5):
            if measured:
                measure_once(instrument, lambda m: losses_of(m, X))
            else:
                optimizer.zero_grad()
                losses_of(model, X).mean().backward()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_nothing_grows_over_hundreds_of_measured_steps(request_) -> None:
    model = Composite(lambda m, x: m.a(x) * m.gain, a=Linear(4, 3), gain=nn.Parameter(torch.ones(3))).double()
    instrument = PerExample().open(model, request_)
    measure_once(instrument, lambda m: losses_of(m, X))

    def count() -> int:
        for _ in range(100):
            model.zero_grad()
            with instrument.micro_batch():
                losses_of(model, X).mean().backward()
            instrument.finish()
        gc.collect()
        return len(gc.get_objects())

    first, second = count(), count()
    assert second <= first + 20
    assert sum(len(p._backward_hooks or ()) for p in model.parameters()) == 0
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()) == 0


def test_a_graph_frees_what_the_taps_kept() -> None:
    model = network()
    instrument = PerExample().open(model, NORMS)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(inputs[0])))
    measure_once(instrument, lambda m: losses_of(m, (floats(6, 4) * 1,)))
    gc.collect()
    assert seen
    assert all(reference() is None for reference in seen)


class Checkpointed(nn.Module):
    """Two segments, the second possibly with the first's layer, in-place activations inside."""

    def __init__(self, how: bool | None, tied: bool) -> None:
        super().__init__()
        self.how = how
        self.a, self.c, self.norm = Linear(4, 4), Linear(4, 2), nn.LayerNorm(4)
        self.b = self.a if tied else Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # reentrant checkpoints need it
        for layer in (self.a, self.b):
            segment = lambda x, layer=layer: torch.relu_(layer(self.norm(x)))  # noqa: E731
            x = segment(x) if self.how is None else checkpoint(segment, x, use_reentrant=self.how)
        return self.c(x)


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("tied", [False, True], ids=["two layers", "one layer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, tied: bool, request_) -> None:
    torch.manual_seed(4)
    model, twin = Checkpointed(reentrant, tied).double(), Checkpointed(None, tied).double()
    twin.load_state_dict(model.state_dict())
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        assert assert_exact(instrument, lambda m: losses_of(m, X), expected_from=twin) == []


def test_a_checkpoint_around_the_whole_model() -> None:
    model = network()
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(4):
        expected = naive_statistics(model, lambda m: losses_of(m, X), BLOCKS)
        statistics, said = measure_once(
            instrument, lambda m: checkpoint(lambda x: losses_of(m, (x,)), X[0], use_reentrant=False)
        )
        assert_close(statistics, expected)
        assert said == []


def test_a_checkpoint_on_a_path_not_seen_before_fails_the_measurement_and_not_the_backward() -> None:
    model = Checkpointed(False, tied=True).double()
    instrument = PerExample().open(model, NORMS)
    segment = lambda x: model.a(model.norm(x))  # noqa: E731
    measure_once(instrument, lambda m: losses_of(m, X))
    model.zero_grad()
    with instrument.micro_batch():
        y = model(X[0])
        (y.square().sum(1) + checkpoint(segment, X[0], use_reentrant=False).sum(1)).mean().backward()
    assert model.a.weight.grad is not None
    with pytest.raises(AdadagradError):
        instrument.finish()


def test_an_input_changed_in_place_that_the_layer_did_not_need() -> None:
    """A frozen weight with a trainable bias keeps no input; nor may the tap, or the backward would fail."""
    torch.manual_seed(4)
    model = Composite(lambda m, x: (lambda h: h.add_(m.a(h)))(torch.tanh(m.b(x)) + 0), a=Linear(4, 4), b=Linear(4, 4))
    model.a.weight.requires_grad_(False)
    instrument = PerExample().open(model.double(), EVERYTHING)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))


def test_a_kept_input_that_was_changed_in_place_is_reported_and_the_gradient_passes() -> None:
    """What torch raises for a saved tensor that changed would otherwise end the training's own backward."""
    seen = []
    x, y, leaf = floats(3), floats(3).requires_grad_(), torch.zeros(3, requires_grad=True)
    tapped = Tap.apply(y * 2, x, leaf, lambda x, gradient: seen.append((x, gradient)))
    x.add_(1)
    tapped.sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 2))
    assert leaf.grad is None
    assert [kept for kept, _ in seen] == [None]


def test_a_residual_added_in_place_under_autocast() -> None:
    """Autocast keeps a cast copy of the input, so that the input may change; the tap keeps the same."""
    torch.manual_seed(4)
    model = Composite(lambda m, x: (lambda h: h.add_(m.a(h)))(x * 1.0), a=Linear(4, 4))
    meter = GradientMeter(model, PerExample())
    with meter:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X[0].float())
        y.float().square().sum(1).mean().backward()
    expected = naive_statistics(model, lambda m: (X[0].float() + m.a(X[0].float())).square().sum(1))
    assert meter.statistics().variance_trace == pytest.approx(expected.variance_trace, rel=0.02)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", ["second derivative", "two backwards", "two chunks", "grad", "inputs", "late"])
def test_unusual_backwards_are_refused_and_the_gradient_is_right(case: str, warm: bool) -> None:
    torch.manual_seed(4)
    tied = Linear(4, 4)  # its two calls are kept rather than delivered, so that no delivery is missed
    model = nn.Sequential(tied, nn.Tanh(), tied, nn.Tanh(), Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    instrument = PerExample().open(model, NORMS)
    for _ in range(3 if warm else 0):  # and the next step does not verify
        measure_once(instrument, lambda m: losses_of(m, X))
        model.zero_grad()

    def run(m: nn.Module) -> Tensor | None:
        x = X[0].clone().requires_grad_()
        if case == "two chunks":
            for part in x.split(3):
                (losses_of(m, (part,)).sum() / 6).backward()
            return None
        loss = losses_of(m, (x,)).mean()
        if case == "second derivative":
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.square().sum()).backward()
        elif case == "two backwards":
            (loss / 2).backward(retain_graph=True)
            (loss / 2).backward()
        elif case == "grad":
            torch.autograd.grad(loss, list(m.parameters()))
        elif case == "inputs":
            loss.backward(inputs=[m[4].weight])
        else:
            return loss
        return None

    with instrument.micro_batch():
        late = run(model)
    if late is not None:
        late.backward()
    late = run(twin)
    if late is not None:
        late.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    match = "create_graph" if case == "second derivative" else "backward"
    with pytest.raises(InvalidMeasurement, match=match):
        instrument.finish()


def test_a_backward_into_all_parameters_by_name_is_measured_or_refused() -> None:
    """Taps deliver through a leaf that `inputs=` leaves out; what they keep is whole."""
    model = network()
    every = lambda m: losses_of(m, X).mean().backward(inputs=list(m.parameters()))  # noqa: E731
    kept, delivered = PerExample().open(model, EVERYTHING), PerExample().open(model, NORMS)
    with kept.micro_batch():
        every(model)
    assert_close(kept.finish(), naive_statistics(model, lambda m: losses_of(m, X), BLOCKS))
    for _ in range(3):  # these verify, and so keep
        measure_once(delivered, lambda m: losses_of(m, X))
    model.zero_grad()
    with delivered.micro_batch():
        every(model)
    with pytest.raises(InvalidMeasurement, match="without inputs="):
        delivered.finish()


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_layers_called_without_the_model_are_not_silently_left_out() -> None:
    model = network()
    for before, warm in ((True, 0), (False, 0), (True, 3), (False, 3)):  # the first three steps verify
        instrument = PerExample().open(model, NORMS)
        for _ in range(warm):
            measure_once(instrument, lambda m: losses_of(m, X))
        model.zero_grad()
        with instrument.micro_batch():
            extra = model[0](X[0]).square().sum(1) if before else 0
            values = losses_of(model, X)
            (values + (extra if before else model[0](X[0]).square().sum(1))).mean().backward()
        with pytest.raises(AdadagradError, match=r"0\.weight"):
            instrument.finish()
        model.zero_grad()


def test_two_measurements_at_once_are_refused() -> None:
    model = network()
    outer, inner = PerExample().open(model, NORMS), PerExample().open(model, NORMS)
    with outer.micro_batch():
        with pytest.raises(StepError, match="being measured already"), inner.micro_batch():
            pass
        losses_of(model, X).mean().backward()
    assert_close(outer.finish(), naive_statistics(model, lambda m: losses_of(m, X)))


def test_copies_and_pickles_of_a_measured_model_are_plain_models() -> None:
    model = network()
    measure_once(PerExample().open(model, EVERYTHING), lambda m: losses_of(m, X))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert patched(other) == []
        other.zero_grad()
        assert_exact(PerExample().open(other, EVERYTHING), lambda m: losses_of(m, X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_is_measured_exactly(compiled_first: bool) -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    if compiled_first:
        losses_of(compiled, X).mean().backward()
    instrument = PerExample().open(compiled, NORMS)
    for n in (6, 6, 6, 5):
        x = (floats(n, 4),)
        expected = naive_statistics(model, lambda m, x=x: losses_of(m, x))
        assert_close(measure_once(instrument, lambda m, x=x: losses_of(m, x))[0], expected)
    torch._dynamo.reset()
