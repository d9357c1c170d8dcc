"""Exact per-example rules, one file a family of layers, and the table that finds the rule of a module."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from adadagrad.statistics.rules.attention import AttentionRule
from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.bilinear import BilinearRule
from adadagrad.statistics.rules.channels import ChannelNormRule
from adadagrad.statistics.rules.convolution import ConvolutionRule
from adadagrad.statistics.rules.embedding import EmbeddingRule
from adadagrad.statistics.rules.embedding_bag import EmbeddingBagRule
from adadagrad.statistics.rules.example_by_example import GenericRule
from adadagrad.statistics.rules.fused import AbstractFusedRule
from adadagrad.statistics.rules.fused_convolution import FusedConvolution
from adadagrad.statistics.rules.fused_linear import FusedLinear
from adadagrad.statistics.rules.fused_normalization import FusedGroupNorm, FusedLayerNorm
from adadagrad.statistics.rules.linear import LinearRule
from adadagrad.statistics.rules.normalization import NormalizationRule
from adadagrad.statistics.rules.prelu import PReLURule
from adadagrad.statistics.rules.recurrent import CellRule, RecurrentRule
from adadagrad.statistics.rules.sketched import AbstractSketch
from adadagrad.statistics.rules.sketched_convolution import ConvolutionSketch
from adadagrad.statistics.rules.sketched_linear import LinearSketch
from adadagrad.statistics.rules.transposed_convolution import TransposedConvolutionRule
from adadagrad.statistics.rules.whole import AbstractWholeRule

__all__ = [
    "FUSED",
    "RULES",
    "SKETCHES",
    "WHOLE",
    "AbstractFusedRule",
    "AbstractRule",
    "AbstractSketch",
    "AbstractWholeRule",
    "find_fused",
    "find_rule",
    "find_sketch",
    "find_whole",
]

RULES: dict[type[nn.Module], AbstractRule[Any]] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: ConvolutionRule(),
    nn.Conv2d: ConvolutionRule(),
    nn.Conv3d: ConvolutionRule(),
    nn.ConvTranspose1d: TransposedConvolutionRule(),
    nn.ConvTranspose2d: TransposedConvolutionRule(),
    nn.ConvTranspose3d: TransposedConvolutionRule(),
    nn.Embedding: EmbeddingRule(),
    nn.LayerNorm: NormalizationRule(),
    nn.RMSNorm: NormalizationRule(),
    nn.GroupNorm: NormalizationRule(),
    nn.modules.instancenorm._InstanceNorm: ChannelNormRule(),
    nn.modules.batchnorm._BatchNorm: ChannelNormRule(),
    nn.SyncBatchNorm: ChannelNormRule(),
    nn.PReLU: PReLURule(),
}

FUSED: dict[type[nn.Module], AbstractFusedRule[Any]] = {
    nn.Linear: FusedLinear(),
    nn.Conv1d: FusedConvolution(),
    nn.Conv2d: FusedConvolution(),
    nn.Conv3d: FusedConvolution(),
    nn.LayerNorm: FusedLayerNorm(),
    nn.GroupNorm: FusedGroupNorm(),
}

SKETCHES: dict[type[nn.Module], AbstractSketch[Any]] = {
    nn.Linear: LinearSketch(),
    nn.Conv1d: ConvolutionSketch(),
    nn.Conv2d: ConvolutionSketch(),
    nn.Conv3d: ConvolutionSketch(),
}

WHOLE: dict[type[nn.Module], AbstractWholeRule[Any]] = {
    nn.Bilinear: BilinearRule(),
    nn.EmbeddingBag: EmbeddingBagRule(),
    nn.MultiheadAttention: AttentionRule(),
    nn.RNN: RecurrentRule(),
    nn.GRU: RecurrentRule(),
    nn.LSTM: RecurrentRule(),
    nn.RNNCell: CellRule(),
    nn.GRUCell: CellRule(),
    nn.LSTMCell: CellRule(),
}

_TABLES: dict[str, dict[type[nn.Module], Any]] = {
    "rules": RULES,
    "fused": FUSED,
    "sketches": SKETCHES,
    "whole": WHOLE,
}

_GENERIC = GenericRule()


def find_rule(module: nn.Module) -> AbstractRule[Any] | None:
    """Return the rule for a module, or None.

    A subclass has its parent's rule only while it has its parent's forward: wrappers that swap the class
    (FSDP2, parametrizations) keep it, a layer that computes something else does not. A forward that is set on
    the instance hides the class's and gets no rule.

    Args:
        module: Any module.

    Returns:
        The rule of the nearest class in the module's ancestry with the same forward.
    """
    rule: AbstractRule[Any] | None = _find("rules", module)
    return rule


def find_fused(module: nn.Module, *, patched: bool = False) -> AbstractFusedRule[Any] | None:
    """Return the fused rule for a module, or None; found in the same way as its rule.

    Args:
        module: Any module.
        patched: Whether a forward that is set on the instance is a measurement's own, and hides nothing.
    """
    rule: AbstractFusedRule[Any] | None = _find("fused", module, patched=patched)
    return rule


def find_sketch(module: nn.Module, *, patched: bool = False) -> AbstractSketch[Any] | None:
    """Return the sketch for a module, or None; found in the same way as its rule.

    Args:
        module: Any module.
        patched: As for `find_fused`.
    """
    sketch: AbstractSketch[Any] | None = _find("sketches", module, patched=patched)
    return sketch


def find_whole(module: nn.Module, *, outermost: bool = False) -> AbstractWholeRule[Any] | None:
    """Return the rule for a module whose calls have to be seen whole, or None.

    Args:
        module: A module without a rule of its own.
        outermost: Whether it is the whole model: then the generic rule would be no better than the fallback.

    Returns:
        The rule of its class, else the generic one for a layer that holds parameters and no other modules.
    """
    rule: AbstractWholeRule[Any] | None = _find("whole", module)
    if rule is not None and rule.suits(module):
        return rule
    forward = type(module).forward
    if outermost or forward is nn.Module.forward or "forward" in module.__dict__:
        return None
    return None if any(True for _ in module.children()) else _GENERIC


def _find(name: str, module: nn.Module, *, patched: bool = False) -> Any:
    if "forward" in module.__dict__ and not patched:
        return None
    kind = type(module)
    cls = _nearest(kind, name)  # type: ignore[arg-type]
    return _TABLES[name][cls] if cls is not None and kind.forward is cls.__dict__["forward"] else None


@functools.cache
def _nearest(kind: type[nn.Module], name: str) -> type[nn.Module] | None:
    """Return the nearest ancestor of a class that a table knows."""
    return next((cls for cls in kind.__mro__ if cls in _TABLES[name]), None)
