"""SIGTERM and SIGINT: the step in progress is finished, saved, and the run left with status 143."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.cases import Sizes, make_engine, make_model, mean_loss, train, weights


def build(folder: Path | None, **options: Any) -> Any:
    model = make_model(0.3)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    options = {"checkpoint_every": 10**9, **options}
    return make_engine(model, optimizer, policy=Sizes(), log_dir=folder, total_samples=500, **options)


def told_to_stop(engine: Any, number: int, at: int, where: str) -> int:
    """Train, get the signal at a step, and return the step after which the run was left."""

    def run() -> None:
        for step in engine:
            if where == "before" and engine.steps == at:
                os.kill(os.getpid(), number)
            step.run(mean_loss(engine.model))
            step.update()
            if where == "between" and engine.steps == at + 1:
                os.kill(os.getpid(), number)  # as if it came while the user evaluates

    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 143
    return engine.steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["before", "between"])
def test_a_signal_ends_the_run_at_a_step_and_it_goes_on_from_there(number: int, where: str, tmp_path: Path) -> None:
    whole = build(None, checkpoint_every=None)
    train(whole)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    engine = build(tmp_path)
    assert told_to_stop(engine, number, 3, where) == (4 if where == "before" else 5)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    torch.manual_seed(9)
    again = build(tmp_path)
    assert again.resume()
    assert again.steps == engine.steps
    train(again)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    engine = build(tmp_path)
    loop = iter(engine)
    step = next(loop)
    os.kill(os.getpid(), signal.SIGINT)
    assert engine.stop_requested
    assert not step.finished
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    loop.close()


def test_under_torchrun_which_may_send_one_wish_twice_the_second_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    engine = build(tmp_path)
    loop = iter(engine)
    next(loop)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert engine.stop_requested
    loop.close()


def test_handlers_of_others_and_runs_that_do_not_save_are_left_alone(tmp_path: Path) -> None:
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        engine = build(tmp_path)
        for step in engine:
            os.kill(os.getpid(), signal.SIGTERM)
            step.run(mean_loss(engine.model))
            step.update()
            break
        assert caught == [1]
        assert not engine.stop_requested
    finally:
        signal.signal(signal.SIGTERM, before)
    loop = iter(build(None, checkpoint_every=None))
    next(loop)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    loop.close()


def test_outside_the_main_thread_nothing_is_caught(tmp_path: Path) -> None:
    engine, found = build(tmp_path), []
    thread = threading.Thread(target=lambda: found.append(len(train(engine))))
    thread.start()
    thread.join(60)
    assert found
    assert found[0] == engine.steps
