"""How many of a model's predictions change when one small perturbation, the same for all, is added to every image.

A robustness number for models that you own or are authorised to test, to report beside clean accuracy and to compare
between versions of a model. Finding the perturbation is a stochastic optimisation with small batches inside large
ones; what is found is a lower bound of the vulnerability, never a certificate that there is none.

    perturbation = find_universal_perturbation(model.eval(), crafting_images, eps=8 / 255)
    print(evaluate(model, perturbation, test_loader).summary())

The inverse use, `adversarial_training_loss`, trains the model on batches half of which carry the perturbation, and the
same report says how the numbers have changed, clean accuracy included.
"""

from adadagrad.apps.universal_perturbation.evaluation import evaluate, transfer_matrix
from adadagrad.apps.universal_perturbation.file import load_perturbation, save_perturbation
from adadagrad.apps.universal_perturbation.find import find_universal_perturbation
from adadagrad.apps.universal_perturbation.perturbation import CraftingStep, Perturbation
from adadagrad.apps.universal_perturbation.robustness import ClassRobustness, RobustnessReport, TransferMatrix
from adadagrad.apps.universal_perturbation.training import adversarial_training_loss

__all__ = [
    "ClassRobustness",
    "CraftingStep",
    "Perturbation",
    "RobustnessReport",
    "TransferMatrix",
    "adversarial_training_loss",
    "evaluate",
    "find_universal_perturbation",
    "load_perturbation",
    "save_perturbation",
    "transfer_matrix",
]
