"""Whatever a model does with its parameters: the numbers are the loop's, or a typed error says why not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.core.errors import (
    AdadagradError,
    BatchCoupledModule,
    InvalidArgument,
    InvalidMeasurement,
    UncoveredParameter,
)
from adadagrad.statistics import PerExample, choose_estimator
from adadagrad.statistics.micro_batch import MicroBatch
from adadagrad.statistics.rules.base import own_parameters
from tests.statistics.checking import (
    EVERYTHING,
    NORMS,
    Composite,
    Row,
    assert_exact,
    floats,
    ids,
    losses_of,
    measure_once,
)

Linear = nn.Linear


class Attention(nn.Module):
    """Separate projections, so that the key's bias has gradient zero up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


class Doubled(Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def thrice() -> nn.Module:
    model = nn.Sequential(Linear(4, 4), nn.Tanh(), Linear(4, 4), nn.Tanh(), Linear(4, 4))
    model[2].weight = model[4].weight = model[0].weight
    model[4].bias = model[2].bias
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2))
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return model


def partly_without_grad(self: Composite, x: Tensor) -> Tensor:
    with torch.no_grad():
        constant = self.a(x)
    return self.b(torch.tanh(self.a(x)) + constant)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(Linear(4, 3)), nn.Tanh(), Linear(3, 2))


def siamese(model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    left, right = model(args[0]), model(args[1])
    return (left - right).square().sum(1) + left.sum(1)


def style(self: Composite, x: Tensor) -> Tensor:
    return self.a(x) * self.b(self.vector)


def recurrence(self: Composite, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 3, dtype=x.dtype)
    for t in range(x.shape[1]):
        state = torch.tanh(self.i(x[:, t]) + self.h(state))
    return state


def experts(self: Composite, x: Tensor) -> Tensor:
    share = self.gate(x).softmax(1)
    chosen, y = share.argmax(1), torch.zeros(len(x), 3, dtype=x.dtype)
    for k, expert in enumerate((self.a, self.b)):
        (rows,) = (chosen == k).nonzero(as_tuple=True)
        if len(rows):
            y = y.index_put((rows,), expert(x[rows]) * share[rows, k : k + 1])
    return y


X, SEQUENCE, IMAGES = (floats(6, 4),), (floats(6, 5, 4),), (floats(6, 3, 5, 5),)

EXACT = [
    Row("separate key bias", Attention, SEQUENCE),
    Row(
        "conv bias before a group norm of single channels",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4)),
        IMAGES,
    ),
    Row("no_grad in part", lambda: Composite(partly_without_grad, a=Linear(4, 3), b=Linear(3, 2)), X),
    Row(
        "detach in part",
        lambda: Composite(lambda m, x: m.b(torch.tanh(m.a(x)).detach() + m.a(x)), a=Linear(4, 3), b=Linear(3, 2)),
        X,
    ),
    Row("weight used by three layers, bias by two", thrice, X),
    Row(
        "weight and its transpose",
        lambda: Composite(lambda m, x: torch.tanh(m.a(x)) @ m.a.weight, a=Linear(4, 4)),
        X,
        True,
    ),
    Row("hooks that change values", hooked, X),
    Row("keyword input", lambda: Composite(lambda m, x: m.a(input=x), a=Linear(4, 3)), X),
    Row(
        "two calls of the model",
        lambda: nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)),
        (floats(6, 4), floats(6, 4) + 1),
        losses=siamese,
    ),
    Row(
        "chunks of a layer's output",
        lambda: Composite(lambda m, x: torch.prod(torch.stack(m.a(x).chunk(2, -1)), 0), a=Linear(4, 6)),
        X,
    ),
    Row(
        "slice changed in place",
        lambda: Composite(lambda m, x: (lambda y: (y[:, :2].mul_(2), y)[1])(m.a(x)), a=Linear(4, 6)),
        X,
    ),
    Row("padding index from the end", lambda: nn.Embedding(5, 3, padding_idx=-1), (ids(5, 6, 4),)),
    Row("embedding with max_norm", lambda: nn.Embedding(5, 3, max_norm=0.7), (ids(5, 6, 4),)),
    Row("embedding bag with max_norm", lambda: nn.EmbeddingBag(5, 3, max_norm=0.7), (ids(5, 6, 4),), True),
    Row("overridden forward", lambda: nn.Sequential(Doubled(4, 3), nn.Tanh(), Linear(3, 2)), X),
    Row("old weight_norm", old_weight_norm, X, True),
    Row(
        "orthogonal parametrization",
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(Linear(4, 3)), Linear(3, 2)),
        X,
        True,
    ),
    Row(
        "shared vector through a layer",
        lambda: Composite(style, a=Linear(4, 4), b=Linear(6, 4), vector=nn.Parameter(torch.ones(6))),
        X,
        True,
    ),
    Row(
        "multi-head attention",
        lambda: Composite(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
        SEQUENCE,
    ),
    Row(
        "encoder layer without dropout",
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        SEQUENCE,
    ),
    Row(
        "encoder layer in eval mode",
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        SEQUENCE,
        train=False,
    ),
    Row("bilinear", lambda: nn.Bilinear(4, 4, 3), (floats(6, 4), floats(6, 4) + 1)),
    Row("embedding bag", lambda: nn.EmbeddingBag(7, 3), (ids(7, 6, 4),)),
    Row("transposed convolution", lambda: nn.ConvTranspose1d(3, 4, 3, 2), (floats(6, 3, 5),)),
    Row(
        "temperature without dimensions",
        lambda: Composite(lambda m, x: m.a(x) * m.t.exp(), a=Linear(4, 3), t=nn.Parameter(torch.tensor(0.3))),
        X,
        True,
    ),
    Row("prelu", lambda: nn.Sequential(Linear(4, 3), nn.PReLU(3), Linear(3, 2), nn.PReLU()), X),
    Row("instance norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)), IMAGES),
    Row(
        "instance norm with running statistics",
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Conv2d(3, 4, 3)),
        IMAGES,
    ),
    Row("lstm", lambda: Composite(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 3, batch_first=True)), SEQUENCE),
    Row("gru cell", lambda: Composite(lambda m, x: m.a(x[:, 1], m.a(x[:, 0])), a=nn.GRUCell(4, 3)), SEQUENCE),
    Row("recurrence written out", lambda: Composite(recurrence, i=Linear(4, 3), h=Linear(3, 3)), SEQUENCE),
    Row("experts by value", lambda: Composite(experts, gate=Linear(4, 2), a=Linear(4, 3), b=Linear(4, 3)), X, True),
    Row(
        "loop over the examples",
        lambda: Composite(lambda m, x: torch.stack([m.a(row) for row in x]), a=Linear(4, 3)),
        X,
        True,
    ),
    Row(
        "convolution in a loop over the examples",
        lambda: Composite(lambda m, x: torch.stack([m.a(row) for row in x]), a=nn.Conv1d(5, 3, 2)),
        SEQUENCE,
        True,
    ),
    Row(
        "max_norm beside a fallback",
        lambda: Composite(
            lambda m, x: m.e(x) * m.gain, e=nn.Embedding(5, 3, max_norm=0.7), gain=nn.Parameter(torch.ones(3))
        ),
        (ids(5, 6, 4),),
        True,
    ),
    Row(
        "batch norm in eval mode",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        IMAGES,
        train=False,
    ),
    Row("dropout beside rules", lambda: nn.Sequential(Linear(4, 8), nn.Dropout(0.5), Linear(8, 2)), X),
    Row(
        "two examples",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), Linear(12, 2)),
        (floats(2, 2, 5),),
    ),
]


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("row", EXACT, ids=lambda row: row.name)
def test_exact(row: Row, request_) -> None:
    model = row.model()
    instrument = PerExample().open(model, request_)
    for repeat in range(4):  # the fourth measurement is the first that verifies nothing
        torch.manual_seed(repeat)
        said = assert_exact(instrument, lambda m: seeded(row, m))
        assert bool(said) == (row.fallback and repeat == 0)


def test_one_example_has_a_gradient_and_no_variance() -> None:
    model = nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)).double()
    instrument = PerExample().open(model, EVERYTHING)
    for _ in range(3):
        statistics, _ = measure_once(instrument, lambda m: losses_of(m, (floats(1, 4),)))
        (loss,) = losses_of(model, (floats(1, 4),))
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        assert statistics.grad_norm_sq == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-12)
        assert math.isnan(statistics.variance_trace)
        assert math.isnan(statistics.inner_product_variance)
        assert math.isnan(statistics.coordinate_ratio)


def seeded(row: Row, model: nn.Module) -> Tensor:
    """The losses with the same dropout masks for the loop and for the measurement."""
    torch.manual_seed(5)
    return row.all_losses(model)


def gain(*parts: nn.Module, function=None) -> nn.Module:
    """A model with a parameter that only the fallback can count."""
    inner = nn.Sequential(*parts)
    return Composite(function or (lambda m, x: m.inner(x) * m.gain), inner=inner, gain=nn.Parameter(torch.ones(3)))


REFUSED = [
    (
        Row("batch norm", lambda: nn.Sequential(Linear(4, 3), nn.BatchNorm1d(3)), X),
        BatchCoupledModule,
        r"1 \(BatchNorm1d\)",
    ),
    (
        Row(
            "batch norm without statistics, in eval mode",
            lambda: nn.Sequential(Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            X,
            train=False,
        ),
        BatchCoupledModule,
        "BatchNorm1d",
    ),
    (
        Row("scale_grad_by_freq", lambda: nn.Embedding(50, 3, scale_grad_by_freq=True), (torch.arange(24).view(6, 4),)),
        BatchCoupledModule,
        "scale_grad_by_freq",
    ),
    (
        Row("sparse embedding", lambda: nn.Embedding(5, 3, sparse=True), (ids(5, 6, 4),)),
        InvalidArgument,
        "sparse=False",
    ),
    (
        Row("dropout and a fallback", lambda: gain(Linear(4, 3), nn.Dropout(0.5)), X),
        UncoveredParameter,
        r"gain: .*MicroBatch",
    ),
    (
        Row(
            "lstm with dropout",
            lambda: Composite(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)),
            SEQUENCE,
        ),
        UncoveredParameter,
        r"a.weight_ih_l0.*MicroBatch",
    ),
    (
        Row(
            "attention with vectors added to keys and values, and dropout",
            lambda: Composite(
                lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, 0.5, add_bias_kv=True, batch_first=True)
            ),
            SEQUENCE,
        ),
        UncoveredParameter,
        r"a.in_proj_weight.*MicroBatch",
    ),
    (
        Row(
            "spectral norm that changes as it runs",
            lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(Linear(4, 3)), Linear(3, 2)),
            X,
        ),
        UncoveredParameter,
        r"original.*MicroBatch",
    ),
    (
        Row("model without a batch", lambda: Linear(6, 3), (floats(6),), losses=lambda m, args: m(*args).square()),
        InvalidMeasurement,
        "batch dimension could not be found",
    ),
]


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize(("row", "error", "match"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_refused_by_name_at_every_step(row: Row, error: type[AdadagradError], match: str) -> None:
    model = row.model()
    if error is BatchCoupledModule:
        with pytest.raises(error, match=match):
            PerExample().open(model, NORMS)
        return
    instrument = PerExample().open(model, NORMS)
    for _ in range(3):
        with pytest.raises(error, match=match):
            measure_once(instrument, row.all_losses)


def test_scale_grad_by_freq_gives_automatic_micro_batches() -> None:
    frequent = nn.Embedding(5, 3, scale_grad_by_freq=True)
    assert choose_estimator(frequent) == MicroBatch()
    frequent.weight.requires_grad_(False)
    assert choose_estimator(nn.Sequential(frequent, Linear(3, 2))) == PerExample()


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_a_penalty_on_the_weights_is_not_an_examples_gradient(request_) -> None:
    """Also where it comes late: with inner products at once, with norms alone at the next verification."""
    model = nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)).double()
    instrument = PerExample().open(model, request_)
    plain = lambda m: losses_of(m, X)  # noqa: E731
    penalised = lambda m: losses_of(m, X) + sum(p.square().sum() for p in m.parameters())  # noqa: E731
    for _ in range(3):
        measure_once(instrument, plain)
    if request_ is EVERYTHING:
        with pytest.raises(InvalidMeasurement, match="penalty"):
            measure_once(instrument, penalised)
    else:
        measure_once(instrument, penalised)  # step 4 is not verified: the one gap that norms alone leave
    with pytest.raises(UncoveredParameter, match="loss use the parameter"):
        measure_once(instrument, penalised)


def stepping(forward) -> tuple[nn.Module, list]:
    """A model with a switch, and its switch."""
    switch = [0]
    model = Composite(lambda m, x: forward(m, x, switch[0]), a=Linear(4, 4), b=Linear(4, 4))
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p)
    return model.double(), switch


def repeated(m: nn.Module, x: Tensor, times: int) -> Tensor:
    for _ in range(times + 1):
        x = torch.tanh(m.a(x))
    return x


def branches(m: nn.Module, x: Tensor, which: int) -> Tensor:
    return m.b(x) if which else m.a(x)


def tied_branch(m: nn.Module, x: Tensor, which: int) -> Tensor:
    return F.linear(torch.tanh(m.b(x)), m.b.weight) if which else m.a(x)


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("forward", [repeated, branches, tied_branch])
def test_paths_that_change_are_learnt_once_and_never_wrong(forward, request_) -> None:
    """After the first three steps, which verify, a new path costs one measurement; then all paths are known."""
    model, switch = stepping(forward)
    instrument = PerExample().open(model, request_)
    failed = []
    for step, path in enumerate([0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0]):
        switch[0] = path
        try:
            assert_exact(instrument, lambda m: losses_of(m, X))
        except InvalidMeasurement:
            failed.append(step)
    assert failed == [3]


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_weight_that_gets_a_second_use_is_found_by_a_later_verification() -> None:
    """No tap sees a functional use; norms alone are verified at the steps 1, 2, 3, 5, 9, ..."""
    model, switch = stepping(lambda m, x, which: F.linear(torch.tanh(m.a(x)), m.a.weight) if which else m.a(x))
    instrument = PerExample().open(model, NORMS)
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
    switch[0] = 1
    for _ in range(4):
        assert_exact(instrument, lambda m: losses_of(m, X))
    assert list(instrument.fallback) == ["a.weight"]


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.bias"]])
def test_unfreezing_and_freezing(names: list[str], request_) -> None:
    """The first measurement after a parameter thaws is lost; none is wrong."""
    torch.manual_seed(2)
    model = nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)).double()
    instrument = PerExample().open(model, request_)
    failed = []
    for step, trainable in enumerate([False, False, False, True, True, False, True, True]):
        for name in names:
            model.get_parameter(name).requires_grad_(trainable)
            model.get_parameter(name).grad = None
        try:
            assert_exact(instrument, lambda m: losses_of(m, X))
        except InvalidMeasurement:
            failed.append(step)
    assert failed == [3]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_rules_know_a_weight_and_a_bias_and_no_other_names() -> None:
    layer = nn.utils.weight_norm(Linear(4, 3))
    assert set(dict(layer.named_parameters())) == {"bias", "weight_g", "weight_v"}
    assert set(own_parameters(layer)) == {"bias"}
    layer.bias.requires_grad_(False)
    assert own_parameters(layer) == {}
