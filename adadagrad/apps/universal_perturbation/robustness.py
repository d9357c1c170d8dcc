"""What an evaluation says: plain numbers, each under its own name, beside those of a random perturbation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRobustness:
    """The images of one true class.

    Args:
        label: The class.
        count: Images of it, >= 1.
        clean_accuracy: Share that is classified right without the perturbation.
        adversarial_accuracy: Share that is classified right with it.
        fooling_ratio: Share whose prediction the perturbation changes.
    """

    label: int
    count: int
    clean_accuracy: float
    adversarial_accuracy: float
    fooling_ratio: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RobustnessReport:
    """How a model's predictions fare under one perturbation of all images. Shares are between 0 and 1.

    Two numbers are called fooling in the literature and differ by the model's own mistakes: `fooling_ratio`, which the
    published tables show, and `fooling_rate`. Neither means anything without `clean_accuracy` and `random_sign`.

    Args:
        method: How the perturbation was found.
        eps: Radius of its ball [image units].
        linf_norm: Its largest entry in absolute value, at most `eps` [image units].
        gradient_count: Gradients of single images that finding it took.
        n_samples: Images evaluated.
        clean_accuracy: Share classified right without it.
        adversarial_accuracy: Share classified right with it.
        fooling_ratio: Share whose prediction it changes, whether right or wrong before.
        fooling_rate: 1 - `adversarial_accuracy`; the model's mistakes on clean images are part of it.
        per_class: One row for each true class that occurs, by rising label.
        dominant_class: The class predicted most often with the perturbation; the lowest of several.
        dominant_share: Share of the images that are predicted to be of it.
        target: The class that predictions were to become, or None.
        target_rate: Share predicted to be of the target with the perturbation, images of that class included; None
            without a target.
        random_sign: The same for eps times random signs on the same images; None in that report itself.
    """

    method: str
    eps: float
    linf_norm: float
    gradient_count: int
    n_samples: int
    clean_accuracy: float
    adversarial_accuracy: float
    fooling_ratio: float
    fooling_rate: float
    per_class: tuple[ClassRobustness, ...]
    dominant_class: int
    dominant_share: float
    target: int | None = None
    target_rate: float | None = None
    random_sign: RobustnessReport | None = None

    def summary(self) -> str:
        """Return a line on the perturbation and one on random signs, in per cent."""
        return "\n".join(report._line() for report in (self, self.random_sign) if report is not None)

    def _line(self) -> str:
        parts = [
            f"{self.method} at eps {self.eps:.4g}: accuracy {self.clean_accuracy:.2%} clean,",
            f"{self.adversarial_accuracy:.2%} perturbed; fooling ratio {self.fooling_ratio:.2%};",
            f"{self.dominant_share:.2%} predicted as class {self.dominant_class}",
        ]
        if self.target_rate is not None:
            parts[-1] += f"; target {self.target} {self.target_rate:.2%}"
        return " ".join(parts) + f" ({self.n_samples} images, {self.gradient_count} gradients)"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMatrix:
    """Every perturbation against every model.

    Where a perturbation was found on the model in whose column it stands, the number is white-box; elsewhere it is
    transfer.

    Args:
        reports: By the perturbation's name, then the model's.
    """

    reports: dict[str, dict[str, RobustnessReport]]

    @property
    def fooling_ratio(self) -> dict[str, dict[str, float]]:
        """Fooling ratios, by the perturbation's name, then the model's."""
        return self._numbers(lambda report: report.fooling_ratio)

    @property
    def adversarial_accuracy(self) -> dict[str, dict[str, float]]:
        """Accuracies under the perturbation, by its name, then the model's."""
        return self._numbers(lambda report: report.adversarial_accuracy)

    @property
    def random_sign(self) -> dict[str, dict[str, float]]:
        """Fooling ratios of random signs at the same eps, by the perturbation's name, then the model's."""
        return self._numbers(lambda report: report.random_sign.fooling_ratio if report.random_sign else float("nan"))

    @property
    def clean_accuracy(self) -> dict[str, float]:
        """Accuracies without any perturbation, by the model's name."""
        return {name: report.clean_accuracy for row in self.reports.values() for name, report in row.items()}

    def table(self) -> str:
        """Return fooling ratios in per cent as a Markdown table, those of random signs in brackets."""
        ratios, random, clean = self.fooling_ratio, self.random_sign, self.clean_accuracy
        lines = [
            ["fooling ratio (random signs), %", *clean],
            ["---"] * (len(clean) + 1),
            *(
                [name, *(f"{100 * row[m]:.1f} ({100 * random[name][m]:.1f})" for m in row)]
                for name, row in ratios.items()
            ),
            ["clean accuracy, %", *(f"{100 * value:.1f}" for value in clean.values())],
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _numbers(self, of: Callable[[RobustnessReport], float]) -> dict[str, dict[str, float]]:
        return {name: {model: of(report) for model, report in row.items()} for name, row in self.reports.items()}
