r"""MultiheadAttention: its own forward once more between known projections, then products as in linear layers.

The layer's projections are functional: no inner value can be tapped. But they can be told apart from the outside. Its
call is repeated, all examples together and with the same random numbers, on inputs that have been projected already
and with identity matrices in the place of its weights:

    q = query W_q^T + b_q, k and v likewise;  c = layer(q, k, v; W_q = W_k = W_v = W_o = 1, b = 0);  y = c W_o^T + b_o

so that c is what it projects to its output, and autograd gives the gradients of q, k and v. Each weight is then a
linear layer: (query, dq), (key, dk), (value, dv) and (c, dy). Masks, attention dropout, returned attention weights and
whatever kernel the layer chooses need not be known here.

Cost: one more forward and backward of the layer, products with weights replaced by ones with identities, then 2 T d p
flop for each weight. Memory: the layer's activations, in its own backward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adadagrad.statistics.rules.product import ProductRule
from adadagrad.statistics.rules.whole import AbstractWholeRule, Part, RecordedCall

INPUTS = ("query", "key", "value")


class AttentionRule(AbstractWholeRule[nn.MultiheadAttention]):
    """Exact rule for `torch.nn.MultiheadAttention`: self or cross attention, packed or separate projections.

    Not with ``add_bias_kv``, whose vectors belong to no product.
    """

    def suits(self, layer: nn.MultiheadAttention) -> bool:
        """Return whether no vectors are added to keys and values."""
        return layer.bias_k is None and layer.bias_v is None

    def may_draw(self, layer: nn.MultiheadAttention) -> bool:
        """Return True: attention dropout is drawn again from the same state."""
        return True

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return one part for each projection; those of one input come together."""
        layer = call.layer
        assert isinstance(layer, nn.MultiheadAttention)
        inputs, dim = _inputs(call), 0 if layer.batch_first else 1
        arrived = dict(zip(call.outputs, gradients, strict=True))
        gy, out_weight = arrived.get(0), layer.out_proj.weight.detach()
        with torch.enable_grad(), call.precision():
            projected = [
                F.linear(x, weight, bias).detach().requires_grad_()
                for x, (weight, bias) in zip(inputs, _projections(layer), strict=True)
            ]
            outputs = dict(zip(call.outputs, _between(call, layer, projected), strict=True))
        pairs = [
            (outputs[k], g if k else F.linear(g, out_weight.mT.to(g.dtype)))
            for k, g in arrived.items()
            if g is not None
        ]
        found = torch.autograd.grad(
            [y for y, _ in pairs], projected, [g.to(y.dtype) for y, g in pairs], materialize_grads=True
        )
        parts = _input_parts(layer, [x.movedim(dim, 0) for x in inputs], [g.movedim(dim, 0) for g in found], inputs)
        if gy is not None:
            context = outputs[0].detach().movedim(dim, 0)
            own = {"weight": "out_proj.weight", "bias": "out_proj.bias"}
            parts.append(Part(ProductRule(), context.to(gy.dtype), gy.movedim(dim, 0), own))
        wanted = [(part, {kind: name for kind, name in part.names.items() if name in names}) for part in parts]
        return [Part(part.rule, part.x, part.gy, own) for part, own in wanted if own]


def _inputs(call: RecordedCall) -> list[Tensor]:
    """Return query, key and value; the examples must lie where a batch of the layer does."""
    args, kwargs = call.arguments
    found = [args[k] if k < len(args) else kwargs[name] for k, name in enumerate(INPUTS)]
    where = {id(leaf): place for leaf, place in zip(call.leaves, call.dims, strict=True) if isinstance(leaf, Tensor)}
    dim = 0 if call.layer.batch_first else 1
    if any(x.dim() != 3 or where[id(x)] != dim for x in found):
        raise ValueError("the examples are not where the batch of an attention layer is")
    return found


def _projections(layer: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of query, key and value."""
    if layer._qkv_same_embed_dim:
        weights = list(layer.in_proj_weight.detach().chunk(3))
    else:
        separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        weights = [w.detach() for w in separate if w is not None]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.detach().chunk(3)
    return list(zip(weights, biases, strict=True))


def _between(call: RecordedCall, layer: nn.MultiheadAttention, projected: list[Tensor]) -> list[Tensor]:
    """Return the layer's outputs for projected inputs, with identities for its own projections."""
    weight = layer.out_proj.weight
    one = torch.eye(layer.embed_dim, dtype=weight.dtype, device=weight.device)
    identities = {"out_proj.weight": one}
    if layer._qkv_same_embed_dim:
        identities["in_proj_weight"] = one.repeat(3, 1)
    else:
        identities |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), one)
    for name, bias in (("in_proj_bias", layer.in_proj_bias), ("out_proj.bias", layer.out_proj.bias)):
        if bias is not None:
            identities[name] = torch.zeros_like(bias)
    args, kwargs = call.arguments
    new_args = (*projected[: len(args)], *args[3:])
    new_kwargs = {**kwargs, **{name: x for name, x in zip(INPUTS, projected, strict=True) if name in kwargs}}
    with torch.random.fork_rng(devices=[d for d in call.random if d.type == "cuda"]):
        for device, state in call.random.items():
            torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
        return call.redo(identities, tree_leaves((new_args, new_kwargs)))


def _input_parts(
    layer: nn.MultiheadAttention, inputs: list[Tensor], gradients: list[Tensor], given: list[Tensor]
) -> list[Part]:
    """Return the products of the inputs, one for neighbours that are one tensor."""
    size, parts = layer.embed_dim, []
    if not layer._qkv_same_embed_dim:
        for number, (x, gy, name) in enumerate(zip(inputs, gradients, INPUTS, strict=True)):
            parts.append(Part(ProductRule(), x.to(gy.dtype), gy, {"weight": f"{name[0]}_proj_weight"}))
            parts.append(Part(ProductRule(number * size, 3 * size), x.to(gy.dtype), gy, {"bias": "in_proj_bias"}))
        return parts
    own = {"weight": "in_proj_weight", "bias": "in_proj_bias"}
    start = 0
    while start < 3:
        stop = start + 1
        while stop < 3 and given[stop] is given[start]:
            stop += 1
        gy = torch.cat(gradients[start:stop], -1)
        rule = ProductRule() if stop - start == 3 else ProductRule(start * size, 3 * size)
        parts.append(Part(rule, inputs[start].to(gy.dtype), gy, own))
        start = stop
    return parts
