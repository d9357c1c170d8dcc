"""Who counts what: one row for each layer call and each parameter of no layer, in the words that `explain` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.layer_costs import LayerSize, NormsBy
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.survey import Survey

RERUN = "rerun (no rule)"
BROADCAST = "where it meets the examples"
UNSEEN = "not called so far"

_WHOLE = {
    nn.Bilinear: "products of the two inputs",
    nn.EmbeddingBag: "rows added by token",
    nn.MultiheadAttention: "layer once more, products",
    nn.RNNBase: "layer once more, products",
    nn.RNNCellBase: "layer once more, products",
}
_SIMPLE = {nn.Embedding: "rows added by token"}
_DIRECT = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer call, or one parameter of no layer.

    Args:
        name: Qualified name, with the number of the call where there are several.
        kind: Class of the layer.
        by: The rule, in a few words.
        parameters: What is trained in it, by qualified name.
        size: Its sizes; None where they are not known.
    """

    name: str
    kind: str
    by: str
    parameters: dict[str, nn.Parameter]
    size: LayerSize | None


def rows_of(instrument: ExampleInstrument) -> list[Row]:
    """Return the rows, calls in the order in which the model makes them; before the first measurement one a layer.

    Args:
        instrument: The instrument, between two steps.
    """
    survey, sizes = Survey.of(instrument.model), instrument.sizes
    names = {p: name for name, p in survey.parameters.items()}
    trained = {name: own_parameters(layer) for name, layer, _ in survey.layers}
    whole = {name: {n: p for n, p in layer.named_parameters() if p.requires_grad} for name, layer, _ in survey.whole}
    modules = {name: layer for name, layer, _ in [*survey.layers, *survey.whole]}
    calls = Counter(p for name, _ in sizes for p in {**trained, **whole}.get(name, {}).values())
    keys: list[CallKey] = [key for key in sizes if key[0] in modules]
    called = {name for name, _ in keys}
    keys += [(name, 0) for name in modules if name not in called]
    rows: list[Row] = []
    shown: set[nn.Parameter] = set()
    for name, number in keys:
        own = (trained.get(name) or whole[name]).values()
        if sizes and name not in called and shown.issuperset(own):
            continue  # counted with the layer that holds it
        size, several = sizes.get((name, number)), sum(other == name for other, _ in keys) > 1
        by = _rule(instrument, (name, number), modules[name], size, max(calls[p] for p in own) if own else 0)
        if name in whole and all(p in survey.raw and survey.raw[p] in instrument.layout.meetings for p in own):
            continue  # its parameters are counted, for less, where they meet the examples
        ruled = {names[p]: p for p in own if names[p] not in instrument.fallback}
        found = ruled or {names[p]: p for p in own}
        label = f"{name or '(model)'}, call {number + 1}" if several else name or "(model)"
        rows.append(Row(label, type(modules[name]).__name__, by if ruled else RERUN, found, size))
        shown.update(found.values())
    for name, p in survey.parameters.items():
        if p not in shown:
            by = BROADCAST if survey.raw.get(p) in instrument.layout.meetings else "no gradient so far"
            by = RERUN if name in instrument.fallback else by
            rows.append(Row(name, "Parameter", by if sizes else "found at the first step", {name: p}, None))
    return rows


def reason(instrument: ExampleInstrument, name: str) -> str:
    """Return why the fallback counts a parameter.

    Args:
        instrument: The instrument.
        name: Qualified name of the parameter.
    """
    survey = Survey.of(instrument.model)
    p = survey.parameters[name]
    owner = next((o for o, layer, _ in survey.whole if any(p is q for q in layer.parameters(recurse=False))), None)
    if p in survey.raw and owner is None:
        return "no layer with a rule owns it, and it is used otherwise than by adding it to all examples"
    if owner is not None:
        return f"a call of {owner or 'the model'} cannot be done over (random numbers, state, a change in place)"
    for owner, layer, _ in survey.layers:
        if any(p is q for q in own_parameters(layer).values()) and None in _dims_of(instrument, owner):
            return f"all examples share the input of {owner}, and its output is not simply added to theirs"
    return "its layers do not account for its whole gradient: it is used outside of them too"


def _dims_of(instrument: ExampleInstrument, name: str) -> set[tuple[int, int] | None]:
    return {dims for (other, _), dims in instrument.layout.dims.items() if other == name}


def _rule(instrument: ExampleInstrument, key: CallKey, layer: nn.Module, size: LayerSize | None, calls: int) -> str:
    """Return the rule of one call in a few words."""
    if size is None:
        return UNSEEN if instrument.sizes else "a rule"
    for cls, words in _WHOLE.items():
        if isinstance(layer, cls):
            return words
    if key not in instrument.layout.dims:
        return "layer once more, by example"
    if instrument.layout.dims[key] is None:
        return BROADCAST
    if calls > 1:
        return f"gradients added over {calls} calls"
    return _words(layer, size, instrument.norms_by)


def _words(layer: nn.Module, size: LayerSize, how: NormsBy) -> str:
    for cls, words in _SIMPLE.items():
        if isinstance(layer, cls):
            return words
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "product by example (not priced)"
    if not isinstance(layer, _DIRECT) or not size.weights:
        return "fused sums" if how.fuses(size) else "sums over positions"
    if how.sketches(size):
        return f"sketch of {how.probes} probe" + "s" * (how.probes > 1)
    if how.fuses(size):
        return "fused product"
    if isinstance(layer, nn.Linear) and size.positions == 1:
        return "one position: product of norms"
    if size.products is not None:
        return "Gram of positions" if isinstance(layer, nn.Linear) else "Gram of patches"
    return "product by example"
