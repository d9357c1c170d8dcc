"""How far an engine is, as a checkpoint of somebody else's holds it: all but model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from adadagrad.core.errors import InvalidArgument

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch


@final
class Progress:
    """What to register with a trainer that saves model and optimizer itself, and asks other objects for their state.

    The trainer must ask on every rank, and load the model and the optimizer too.

    Args:
        engine: The engine.

    Example:
        >>> import torch, adadagrad as ada
        >>> data, model = torch.utils.data.TensorDataset(torch.randn(64, 2)), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        >>> engine = ada.AdaptiveBatch(model, optimizer, data, ada.ConstantBatch(8), epochs=1)
        >>> Progress(engine).state_dict()["samples_seen"]
        0
    """

    def __init__(self, engine: AdaptiveBatch) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return how far the engine is.

        Returns:
            Nested dicts and lists of tensors, numbers and words.

        Raises:
            StepError: A step is in progress.
        """
        return {**self._engine.progress_state(), "optimizer_entries": len(self._engine.optimizer.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there; model and optimizer are loaded by who holds them.

        Args:
            state: What `state_dict` returned.

        Raises:
            StepError: A step is in progress.
            InvalidArgument: The optimizer's state has not been loaded before, as far as that can be seen; or the state
                belongs to another run's data or learning-rate rule.
        """
        saved, loaded = state.get("optimizer_entries", 0), len(self._engine.optimizer.state)
        if loaded < saved:
            raise InvalidArgument(
                f"the optimizer holds a state for {loaded} parameters, and held one for {saved} when this was saved: "
                "load the optimizer with it, and before it (Accelerate before 1.13 does not where models are sharded)"
            )
        self._engine.load_progress_state(state)
