"""Exact per-example rules, one file a family of layers, and the table that finds the rule of a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.channels import ChannelNormRule
from adadagrad.statistics.rules.convolution import ConvolutionRule
from adadagrad.statistics.rules.embedding import EmbeddingRule
from adadagrad.statistics.rules.fused import AbstractFusedRule
from adadagrad.statistics.rules.fused_convolution import FusedConvolution
from adadagrad.statistics.rules.fused_linear import FusedLinear
from adadagrad.statistics.rules.fused_normalization import FusedGroupNorm, FusedLayerNorm
from adadagrad.statistics.rules.linear import LinearRule
from adadagrad.statistics.rules.normalization import NormalizationRule
from adadagrad.statistics.rules.prelu import PReLURule
from adadagrad.statistics.rules.transposed_convolution import TransposedConvolutionRule

__all__ = ["FUSED", "RULES", "AbstractFusedRule", "AbstractRule", "find_fused", "find_rule"]

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
    rule: AbstractRule[Any] | None = _find(RULES, module)
    return rule


def find_fused(module: nn.Module) -> AbstractFusedRule[Any] | None:
    """Return the fused rule for a module, or None; found in the same way as its rule."""
    rule: AbstractFusedRule[Any] | None = _find(FUSED, module)
    return rule


def _find(table: dict[type[nn.Module], Any], module: nn.Module) -> Any:
    if "forward" in module.__dict__:
        return None
    for cls in type(module).__mro__:
        rule = table.get(cls)
        if rule is not None:
            return rule if type(module).forward is cls.__dict__["forward"] else None
    return None
