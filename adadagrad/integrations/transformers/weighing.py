"""How much a micro-batch's mean loss weighs in its step: by valid labels, by examples, or as the user says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100
"""The label that no loss counts."""

Weight = Literal["labels", "examples"] | Callable[[Mapping[str, Any]], float | Tensor]
"""What the trainer's argument `weight` may be."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A micro-batch and what it weighs.

    Args:
        inputs: What the model is given.
        items: Its valid labels, by which a loss function of the user's may divide; None where labels are no classes.
        weight: What its mean loss weighs: one number, one for each example, or None to weigh by examples.
    """

    inputs: dict[str, Any]
    items: Tensor | None
    weight: float | Tensor | None

    @property
    def total(self) -> float:
        """The factor from the micro-batch's mean loss to its sum."""
        return 1.0 if self.weight is None else float(torch.as_tensor(self.weight).sum())


def weigh(inputs: Mapping[str, Any], rows: int, *, shifted: bool, weight: Weight) -> Weighed:
    """Weigh a micro-batch.

    One without a single valid label weighs 0. So that its mean loss is a number all the same, it is given labels.

    Args:
        inputs: The micro-batch, on its device.
        rows: Its examples.
        shifted: Whether the model's loss leaves out the first label of each row.
        weight: The trainer's argument.

    Returns:
        The micro-batch with its weight.
    """
    name = "shift_labels" if "shift_labels" in inputs else "labels"
    counts = _valid(inputs.get(name), shifted=shifted and name == "labels")
    items = None if counts is None else counts.sum()
    found: float | Tensor | None = None
    if callable(weight):
        found = weight(inputs)
    elif weight == "labels" and counts is not None:
        found = counts if len(counts) == rows else float(counts.sum())
    if counts is not None and items == 0:
        inputs = {**inputs, name: torch.zeros_like(inputs[name])}
        items = torch.ones_like(counts).sum()
    return Weighed(dict(inputs), items, found)


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model predicts label i + 1 at place i, so that the first label of a row counts nothing.

    Trainer goes by the model's loss alone, which GPT-2 does not name.

    Args:
        model: A model of transformers, perhaps inside another module as PEFT's; others do not shift.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            names = {base.__name__ for base in type(module).__mro__}  # of a sharded model its own class is another
            causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            causal |= LOSS_MAPPING.get(module.loss_type or "") is ForCausalLMLoss
            return causal and not module.config.is_encoder_decoder
    return False


def _valid(labels: object, *, shifted: bool) -> Tensor | None:
    """Return the valid labels of each row, (rows,); None where labels are no classes."""
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_floating_point() or labels.is_complex():
        return None
    labels = labels[..., 1:] if shifted and labels.ndim > 1 else labels
    return labels.ne(IGNORED).reshape(len(labels), -1).sum(1)
