"""What a run is made of between two steps: taken out of an engine, put into another one, saved when it is time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adadagrad.checkpoint import random_states, set_random_states
from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.core.optimizing import Extrapolating
from adadagrad.core.shards import spread

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch


ENTRIES = (
    *("model", "optimizer", "random", "stream", "measuring", "learning_rate", "global_batch_size", "steps"),
    *("samples_seen", "samples_drawn", "skipped", "nonfinite_requests", "seconds", "log"),
)
"""What a state must hold; `parallel` and `grad_scaler`, which a version before this one did not save, it may hold."""


def engine_state(engine: AdaptiveBatch) -> dict[str, Any]:
    """Return everything that resuming needs; see `AdaptiveBatch.state_dict`.

    Args:
        engine: The engine, between two steps.

    Returns:
        Nested dicts and lists of tensors, numbers and words.

    Raises:
        StepError: A step is in progress.
    """
    _refuse_unfinished(engine)
    parallel = engine.parallel
    optimizer = engine.optimizer.state_dict()
    own = parallel.own_optimizer_state or _differs(engine, parallel.ranks.count)
    return {
        "model": engine.parallel.module.state_dict(),
        "optimizer": parallel.ranks.gather(optimizer) if own else optimizer,
        **with_random_states(engine, _progress(engine)),
    }


def progress_state(engine: AdaptiveBatch, *, random: bool = True) -> dict[str, Any]:
    """Return what resuming needs beside model and optimizer; see `AdaptiveBatch.progress_state`.

    Args:
        engine: The engine, between two steps.
        random: Whether the random states of all ranks are part of it; else it lacks them and asks no other rank.

    Returns:
        Nested dicts and lists of tensors, numbers and words.

    Raises:
        StepError: A step is in progress.
        InvalidArgument: The optimizer's state differs between ranks.
    """
    _refuse_unfinished(engine)
    if engine.parallel.own_optimizer_state or _differs(engine, engine.parallel.ranks.count):
        raise InvalidArgument(
            f"{type(engine.optimizer).__name__} keeps a state of its own on every rank here, of which a trainer saves "
            "one: save with engine.save(path)"
        )
    return with_random_states(engine, _progress(engine)) if random else _progress(engine)


def with_random_states(
    engine: AdaptiveBatch, state: dict[str, Any], own: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a progress with the random states of all ranks; to be called on every rank.

    Args:
        engine: The engine.
        state: The progress.
        own: This rank's random states; None for those of now.
    """
    return {**state, "random": engine.parallel.ranks.gather(random_states() if own is None else own)}


def _progress(engine: AdaptiveBatch) -> dict[str, Any]:
    return {
        "parallel": engine.parallel.state_dict(),
        "grad_scaler": engine.scaling.state_dict(),
        "stream": engine._assembler.state_dict(),
        "measuring": engine.measuring.state_dict(),
        "learning_rate": engine.learning_rate.state_dict(),
        "global_batch_size": engine.global_batch_size,
        "steps": engine.steps,
        "samples_seen": engine.samples_seen,
        "samples_drawn": engine.samples_drawn,
        "skipped": [engine.skipped, engine._skipped_in_a_row],
        "nonfinite_requests": engine.nonfinite_requests,
        "seconds": [engine.seconds, engine.measuring.instrument.seconds],
        "log": engine._log.state_dict(),
    }


def _refuse_unfinished(engine: AdaptiveBatch) -> None:
    """Refuse to save in the middle of a step or of a round."""
    if engine._step is not None and not engine._step.finished:
        raise StepError("a step is in progress: save after step.update()")
    if not engine.parallel.together:
        raise StepError(
            "the ranks are in the middle of a round of local steps, and their models differ: save after a step in "
            "which engine.parallel.together holds, or call engine.parallel.finish() on all ranks first"
        )


def restore_engine(engine: AdaptiveBatch, state: Mapping[str, Any]) -> None:
    """Continue where a state was taken, and cut the log back to there; see `AdaptiveBatch.load_state_dict`.

    Args:
        engine: An engine on the same model, optimizer, data set and seed.
        state: What `engine_state` returned.

    Raises:
        StepError: A step is in progress.
        InvalidArgument: The state is incomplete, or belongs to another stream of data, model, optimizer or
            learning-rate rule, or `log_dir` holds the log of another run.
    """
    if engine._step is not None and not engine._step.finished:
        raise StepError("a step is in progress: load after step.update(), or outside the loop")
    _refuse_unfit(engine, state, ENTRIES)
    optimizer = _own_optimizer_state(engine, state["optimizer"])
    engine._assembler.load_state_dict(state["stream"])
    like = as_now(engine)
    try:
        model = {name: spread(value, like(f"/engine/model/{name}")) for name, value in state["model"].items()}
        optimizer = spread_state(optimizer, like)
        engine.parallel.module.load_state_dict(model)
        # Copied, because torch goes on training with the very tensors that it is given.
        engine.optimizer.load_state_dict(copy.deepcopy(optimizer))
    except (RuntimeError, ValueError, KeyError) as error:
        engine._assembler.seek(engine.samples_drawn)
        raise InvalidArgument(
            f"state does not fit this model and optimizer, which may hold parts of it now: build both as in the run "
            f"that saved it ({error})"
        ) from error
    if isinstance(engine.optimizer, Extrapolating) and _other_ranks(engine, state["optimizer"]):
        engine.optimizer.forget_local_gradients()
    _take_progress(engine, state)


def restore_progress(engine: AdaptiveBatch, state: Mapping[str, Any]) -> None:
    """Continue where `progress_state` was taken; see `AdaptiveBatch.load_progress_state`.

    Args:
        engine: An engine on the same model, optimizer, data set and seed, the first two as they were then.
        state: What `progress_state` returned, or `engine_state`.

    Raises:
        StepError: A step is in progress.
        InvalidArgument: As for `restore_engine`.
    """
    if engine._step is not None and not engine._step.finished:
        raise StepError("a step is in progress: load after step.update(), or outside the loop")
    _refuse_unfit(engine, state, ENTRIES[2:])
    engine._assembler.load_state_dict(state["stream"])
    _take_progress(engine, state)


def _refuse_unfit(engine: AdaptiveBatch, state: Mapping[str, Any], entries: tuple[str, ...]) -> None:
    """Refuse a state that lacks something, or belongs to another rate or log."""
    missing = [name for name in entries if name not in state]
    if missing:
        raise InvalidArgument(f"state lacks {', '.join(missing)}: give what engine.state_dict() returned")
    engine.learning_rate.refuse_other(state["learning_rate"])
    engine._log.refuse_other(state["log"])


def _take_progress(engine: AdaptiveBatch, state: Mapping[str, Any]) -> None:
    """Take over everything but model, optimizer and place in the stream, and cut the log back."""
    engine.learning_rate.load_state_dict(state["learning_rate"], samples_seen=state["samples_seen"])
    engine.measuring.load_state_dict(state["measuring"])
    cap = engine.max_batch_size - engine.max_batch_size % engine.bounds.multiple_of
    engine.global_batch_size = min(state["global_batch_size"], cap)
    engine.steps, engine.samples_seen = state["steps"], state["samples_seen"]
    engine.samples_drawn = state["samples_drawn"]
    engine.skipped, engine._skipped_in_a_row = state["skipped"]
    engine.nonfinite_requests = state["nonfinite_requests"]
    engine.seconds, engine.measuring.instrument.seconds = state["seconds"]
    engine._last_checkpoint = engine.samples_seen
    engine.parallel.load_state_dict(dict(state.get("parallel", {})))
    engine.scaling.load_state_dict(dict(state.get("grad_scaler", {})))
    engine._log.load_state_dict(state["log"])
    engine._begun = engine._log.position > 0
    _set_random_states(engine, state["random"])


def as_now(engine: AdaptiveBatch) -> Callable[[str], Tensor | None]:
    """Return which of the engine's tensors one of a checkpoint is to lie on the ranks like.

    Args:
        engine: The engine.

    Returns:
        From the path of a saved tensor of the model, or of the optimizer's state, to that parameter or buffer.
    """
    model = engine.parallel.module.state_dict()
    trained: list[Tensor] = [p for group in engine.optimizer.param_groups for p in group["params"]]

    def like(path: str) -> Tensor | None:
        _, _, part, *rest = path.split("/")
        if part == "model":
            found: Tensor | None = model.get("/".join(rest))
            return found
        if part == "optimizer" and len(rest) == 3 and rest[0] == "state" and int(rest[1]) < len(trained):
            return trained[int(rest[1])]
        return None

    return like


def spread_state(state: Any, like: Callable[[str], Tensor | None]) -> Any:
    """Lay an optimizer's saved state on the ranks as its parameters lie.

    Args:
        state: What `torch.optim.Optimizer.state_dict` returned, here or on other ranks.
        like: From `as_now`.

    Returns:
        The same with sharded tensors where parameters are sharded.
    """
    found = {
        number: {name: spread(value, like(f"/engine/optimizer/state/{number}/{name}")) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": found}


def _own_optimizer_state(engine: AdaptiveBatch, state: Any) -> Any:
    """Return this rank's part of what was saved of optimizers: one for all, or a list with one for each rank."""
    if not isinstance(state, list):
        return state
    ranks = engine.parallel.ranks
    if len(state) != ranks.count and _differs(engine, len(state)) and not engine.parallel.own_optimizer_state:
        return state[0]  # all but its past gradients is the same on every rank, and these are forgotten
    if len(state) != ranks.count:
        raise InvalidArgument(
            f"state holds an optimizer's state for each of {len(state)} ranks, and there are {ranks.count}: start as "
            'many, or train with optimizer_state="average", whose state fits any number'
        )
    return state[ranks.index]


def _differs(engine: AdaptiveBatch, ranks: int) -> bool:
    """Return whether the optimizer's state differs between so many ranks though they train one model."""
    return ranks > 1 and isinstance(engine.optimizer, Extrapolating) and engine.optimizer.own_state


def _other_ranks(engine: AdaptiveBatch, state: Any) -> bool:
    """Return whether an optimizer's state was saved by another number of ranks."""
    saved = len(state) if isinstance(state, list) else 1
    return saved != engine.parallel.ranks.count


def _set_random_states(engine: AdaptiveBatch, states: Any) -> None:
    """Give this rank its own random states back; a rank that the saved run did not have keeps those it has."""
    states = states if isinstance(states, list) else [states]  # which a version for one process saved
    if engine.parallel.ranks.index < len(states):
        set_random_states(states[engine.parallel.ranks.index])


def save_if_due(engine: AdaptiveBatch) -> None:
    """Save the engine once `checkpoint_every` samples have been seen since the last time, and all ranks hold one model.

    Args:
        engine: The engine, after a step.
    """
    every = engine._checkpoint_every
    due = every is not None and engine.samples_seen - engine._last_checkpoint >= every
    if due and engine.parallel.together:
        checkpoint(engine)


def checkpoint(engine: AdaptiveBatch) -> None:
    """Save into the engine's store; see `AdaptiveBatch.checkpoint`.

    Args:
        engine: The engine, between two steps.

    Raises:
        InvalidArgument: It has no directory.
    """
    if not engine._has_directory:
        raise InvalidArgument("checkpoint needs log_dir, the directory to save in: use engine.save(path)")
    engine._store.save(engine.steps, {"engine": engine_state(engine)})
    engine._last_checkpoint = engine.samples_seen


def resume(engine: AdaptiveBatch) -> bool:
    """Continue from the newest good checkpoint of the engine's store; see `AdaptiveBatch.resume`.

    Args:
        engine: The engine, between two steps.

    Returns:
        Whether there was one.

    Raises:
        InvalidArgument: It has no directory.
        StepError: It has made steps already, and there is no checkpoint.
    """
    if not engine._has_directory:
        raise InvalidArgument("resume needs log_dir, the directory that checkpoints are in: use engine.load(path)")
    content = engine._store.load_newest(as_now(engine))
    if content is not None:
        restore_engine(engine, content["engine"])
        return True
    if engine.steps:
        raise StepError("resume was called after the first step, and nothing has been saved: call it before")
    engine._log.restart()
    return False
