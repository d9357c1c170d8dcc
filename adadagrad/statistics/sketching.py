"""What makes a measurement a sketch: every layer that has a sketch gets a rule that uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from adadagrad.core.comm import Ranks
from adadagrad.statistics.rules import AbstractRule, find_sketch
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.rules.sketched import SketchedRule
from adadagrad.statistics.sketches import Sketches
from adadagrad.statistics.survey import Survey


@dataclass(frozen=True, slots=True)
class Sketching:
    """The settings of `Probe`, put to use in one measured step after the other.

    Args:
        probes: Sketches of each layer.
        seed: Seeds their signs.
    """

    probes: int
    seed: int

    def start(self, number: int, ranks: Ranks) -> Sketches:
        """Return the sketches of a step, none made yet.

        Args:
            number: How many steps were measured before.
            ranks: The processes whose examples make up a step.
        """
        return Sketches(self.probes, self.seed, number, ranks)

    def replaced(self, survey: Survey, sketches: Sketches) -> Survey:
        """Return a survey whose rules sketch where that costs less.

        Args:
            survey: What the model is made of, with exact rules.
            sketches: Those of the measured step.

        Returns:
            A survey of the same layers.
        """
        layers: list[tuple[str, nn.Module, AbstractRule[Any]]] = []
        for name, module, rule in survey.layers:
            sketch, weight = find_sketch(module), own_parameters(module).get("weight")
            if sketch is None or weight is None:
                layers.append((name, module, rule))
                continue
            sketches.expect(name, weight, sketch.of_gradient, partial(sketch.shape, module, self.probes))
            layers.append((name, module, SketchedRule(name, rule, sketch, sketches)))
        return replace(survey, layers=layers)
