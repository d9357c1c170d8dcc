r"""RNN, GRU, LSTM and their cells: the recurrence once more in plain steps, then products as in a linear layer.

A recurrent layer's own kernel gives no gradient for the inner values. So its call is repeated, all examples together,
with zeros added to every product of a weight (the *probes*): with z_t = W_ih x_t + b_ih and u_t = W_hh h_{t-1} + b_hh,

    RNN    h_t = tanh(z + u) or relu(z + u)
    LSTM   (i, f, g, o) = z + u,  c_t = s(f) c_{t-1} + s(i) tanh(g),  h_t = s(o) tanh(c_t), projected by W_hr if asked
    GRU    r = s(z_r + u_r),  v = s(z_v + u_v),  w = tanh(z_w + r u_w),  h_t = (1 - v) w + v h_{t-1}

The gradients of the probes are those of the products, and the gradient of W_ih of example i is that of a linear layer
with inputs x_t over the positions t; likewise for the other weights. The equations are those of torch's documentation.

Cost: one forward and backward of the layer in unfused steps, then 2 T d p flop for each weight. Memory: the
activations of the unfused steps, while this layer's backward runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.product import ProductRule
from adadagrad.statistics.rules.whole import AbstractWholeRule, Part, RecordedCall

State = tuple[Tensor, ...]
"""h, and c for an LSTM, each (n, features)."""


@dataclass(slots=True)
class _Product:
    """The products of one weight at all steps: parameter names, inputs (n, d) and probes (n, p), in one order."""

    weight: str
    bias: str
    inputs: list[Tensor] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return one step's product with a probe added."""
        bias = getattr(layer, self.bias, None)
        y = F.linear(x, getattr(layer, self.weight).detach(), None if bias is None else bias.detach())
        probe = torch.zeros_like(y).requires_grad_()
        self.inputs.append(x.detach())
        self.probes.append(probe)
        return y + probe


class RecurrentRule(AbstractWholeRule[nn.RNNBase]):
    """Exact rule for `torch.nn.RNN`, `GRU` and `LSTM`: layers, directions, projections, given or zero first states.

    Not for packed sequences, and not with dropout between the layers, which cannot be drawn again.
    """

    def suits(self, layer: nn.RNNBase) -> bool:
        """Return whether nothing is dropped between the layers."""
        return not (layer.training and layer.dropout > 0 and layer.num_layers > 1)

    def may_draw(self, layer: nn.RNNBase) -> bool:
        """Return False: in this setting the layer draws nothing."""
        return False

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return one part for each weight of each layer and direction."""
        layer = call.layer
        assert isinstance(layer, nn.RNNBase)
        x, states = _arguments(call, 0 if layer.batch_first else 1)
        lstm = layer.mode == "LSTM"
        with torch.enable_grad(), call.precision():
            steps = list(x.movedim(int(layer.batch_first), 0))
            ends: list[State] = []
            products: list[_Product] = []
            for depth in range(layer.num_layers):
                found = []
                for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
                    names_of = [(f"weight_{k}_l{depth}{suffix}", f"bias_{k}_l{depth}{suffix}") for k in ("ih", "hh")]
                    inner = [_Product(*pair) for pair in names_of]
                    if layer.proj_size:
                        inner.append(_Product(f"weight_hr_l{depth}{suffix}", ""))
                    state = tuple(s[len(ends)] for s in states) or _zeros(layer, x[:, 0] if layer.batch_first else x[0])
                    outputs, state = _run(layer, layer.mode, inner, steps[::-1] if suffix else steps, state)
                    found.append(outputs[::-1] if suffix else outputs)
                    ends.append(state)
                    products += inner
                steps = [torch.cat(step, -1) for step in zip(*found, strict=True)]
            results = [torch.stack(steps, int(layer.batch_first)), torch.stack([end[0] for end in ends])]
            if lstm:
                results.append(torch.stack([end[1] for end in ends]))
        return _parts(call, results, gradients, products, names)


class CellRule(AbstractWholeRule[nn.RNNCellBase]):
    """Exact rule for one step: `torch.nn.RNNCell`, `GRUCell` and `LSTMCell`."""

    def suits(self, layer: nn.RNNCellBase) -> bool:
        """Return True."""
        return True

    def may_draw(self, layer: nn.RNNCellBase) -> bool:
        """Return False: cells draw nothing."""
        return False

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return one part for each weight."""
        layer = call.layer
        assert isinstance(layer, nn.RNNCellBase)
        x, states = _arguments(call, 0)
        mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(type(layer), "")
        if not mode:
            mode = "RNN_TANH" if getattr(layer, "nonlinearity", "") == "tanh" else "RNN_RELU"
        products = [_Product("weight_ih", "bias_ih"), _Product("weight_hh", "bias_hh")]
        with torch.enable_grad(), call.precision():
            zeros = x.new_zeros(len(x), layer.hidden_size)
            state = states or ((zeros, zeros) if mode == "LSTM" else (zeros,))
            _, state = _run(layer, mode, products, [x], state)
        return _parts(call, list(state), gradients, products, names)


def _arguments(call: RecordedCall, dim: int) -> tuple[Tensor, State]:
    """Return input and first states, if given; the examples must lie where a batch of the layer does."""
    args, kwargs = call.arguments
    x = args[0] if args else kwargs["input"]
    states = args[1] if len(args) > 1 else kwargs.get("hx")
    states = () if states is None else (states,) if isinstance(states, Tensor) else tuple(states)
    layers = isinstance(call.layer, nn.RNNBase)
    wanted = {id(x): dim, **{id(s): int(layers) for s in states}}
    where = {id(leaf): place for leaf, place in zip(call.leaves, call.dims, strict=True) if isinstance(leaf, Tensor)}
    if x.dim() != (3 if layers else 2) or any(where.get(key) != place for key, place in wanted.items()):
        raise ValueError("the examples are not where the batch of a recurrent layer is")
    return x, states


def _zeros(layer: nn.RNNBase, x: Tensor) -> State:
    """Return the first state where none is given."""
    h = x.new_zeros(len(x), layer.proj_size or layer.hidden_size)
    return (h, x.new_zeros(len(x), layer.hidden_size)) if layer.mode == "LSTM" else (h,)


def _run(
    layer: nn.Module, mode: str, products: list[_Product], steps: list[Tensor], state: State
) -> tuple[list[Tensor], State]:
    """Return h at every step, and the last state."""
    outputs = []
    for x in steps:
        z, u = products[0](layer, x), products[1](layer, state[0])
        if mode == "LSTM":
            i, f, g, o = (z + u).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            state = (products[2](layer, h) if len(products) > 2 else h, c)
        elif mode == "GRU":
            (zr, zv, zw), (ur, uv, uw) = z.chunk(3, -1), u.chunk(3, -1)
            v = (zv + uv).sigmoid()
            state = ((1 - v) * (zw + (zr + ur).sigmoid() * uw).tanh() + v * state[0],)
        else:
            state = ((z + u).tanh() if mode == "RNN_TANH" else (z + u).relu(),)
        outputs.append(state[0])
    return outputs, state


def _parts(
    call: RecordedCall,
    results: list[Tensor],
    gradients: Sequence[Tensor | None],
    products: list[_Product],
    names: Collection[str],
) -> list[Part]:
    """Return what the products amount to, from the gradients that arrive at their probes."""
    pairs = [(results[number], g) for number, g in zip(call.outputs, gradients, strict=True) if g is not None]
    probes = [probe for product in products for probe in product.probes]
    reached = torch.autograd.grad(
        [y for y, _ in pairs], probes, [g.to(y.dtype) for y, g in pairs], materialize_grads=True
    )
    found = iter(reached)
    parts = []
    for product in products:
        gy = torch.stack([next(found) for _ in product.probes], 1)
        own = {kind: name for kind, name in (("weight", product.weight), ("bias", product.bias)) if name in names}
        if own:
            parts.append(Part(ProductRule(), torch.stack(product.inputs, 1).to(gy.dtype), gy, own))
    return parts
