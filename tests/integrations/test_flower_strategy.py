"""The strategy in this process, on a grid that can spoil what clients send: the same weights as without Flower."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.federated import LocalWork, simulate

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'adadagrad[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from adadagrad.integrations.flower import OverTheAir, client_app
from tests.integrations.fake_grid import (
    FakeGrid,
    Spoil,
    loss,
    make_dataset,
    make_model,
    make_server,
    server_of,
    trained_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:the running statistics of 1 stay")  # buffers do stay, as is tested here

COUNT = 6
ROUNDS = 4


def in_process(rounds: int = ROUNDS, **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    server = make_server()
    clients = [make_dataset(number, COUNT) for number in range(COUNT)]
    records = simulate(server, clients, loss, rounds=rounds, **options)
    return trained_weights(server), records


def under_flower(
    rounds: int = ROUNDS, *, work: LocalWork | None = None, spoil: Spoil | None = None, **options: Any
) -> tuple[dict[str, Tensor], OverTheAir]:
    grid = FakeGrid(client_app(make_model, make_dataset, loss, work, seed=options.get("seed", 0)), COUNT, spoil)
    strategy = OverTheAir(make_server(), num_clients=COUNT, **options)
    strategy.run(grid, rounds)
    return trained_weights(strategy.server), strategy


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize(
    ("work", "options"),
    [
        (LocalWork(batch_size=5), {}),
        (LocalWork(message="drift", epochs=2, batch_size=5), {}),
        (LocalWork(), {"seed": 8}),
        (LocalWork(), {"fraction": 0.5}),
        (LocalWork(message="drift"), {"fraction": 0.34, "seed": 3}),
        (LocalWork(), {"first_round": 5}),
    ],
    ids=["gradient", "drift", "seed", "half", "third", "later"],
)
def test_rounds_end_with_the_weights_of_rounds_without_flower(work: LocalWork, options: dict[str, Any]) -> None:
    weights, strategy = under_flower(work=work, **options)
    expected, records = in_process(work=work, **options)
    assert_same(weights, expected)
    assert strategy.records == records
    plain, _ = in_process()
    assert (work == LocalWork() and not options) or any(not torch.equal(plain[name], weights[name]) for name in plain)


def test_rounds_may_be_cut_where_another_run_goes_on() -> None:
    server = make_server()
    app = client_app(make_model, make_dataset, loss)
    OverTheAir(server, num_clients=COUNT).run(FakeGrid(app, COUNT), 1)
    resumed = make_server()
    resumed.load_state_dict(server.state_dict())
    OverTheAir(resumed, num_clients=COUNT, first_round=2).run(FakeGrid(app, COUNT), ROUNDS - 1)
    assert_same(trained_weights(resumed), in_process()[0])


def test_buffers_and_frozen_parameters_stay_on_the_server_and_on_the_clients() -> None:
    weights, strategy = under_flower()
    start = make_model().state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "3.bias"):
        assert torch.equal(weights[name], start[name])
    assert set(strategy.arrays()) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}


def spoilt(how: str) -> Spoil:
    """What happens to the reply of client 2 in round 2, and to nothing else."""

    def spoil(number: int, request: Message, reply: Message) -> Message | None:
        if number != 2 or request.content["round"]["number"] != 2:
            return reply
        record = reply.content["message"]
        assert isinstance(record, ArrayRecord)
        weight = torch.from_numpy(record["0.weight"].numpy())
        if how == "none":
            return None
        if how == "error":
            return Message(Error(0, "ray:\n  the actor\n died " + 300 * "x"), reply_to=request)
        if how == "name":
            record["other"] = record["0.bias"]
        elif how == "missing":
            del record["0.bias"]
        elif how == "shape":
            record["0.weight"] = Array(weight[:1])
        elif how == "lie":  # metadata that do not fit the bytes
            record["0.weight"] = Array("float32", (6, 4), "numpy.ndarray", Array(weight[:1]).data)
        elif how == "bytes":
            record["0.weight"] = Array("float32", (6, 4), "numpy.ndarray", b"\x93NUMPY\x01\x00")
        elif how == "pickle":
            record["0.weight"] = Array("float32", (6, 4), "pickle", b"cos\nsystem\n(S'false'\ntR.")
        elif how == "integers":
            record["0.weight"] = Array(weight.long())
        elif how == "complex":
            record["0.weight"] = Array(weight.to(torch.complex64))
        elif how == "nan":
            record["0.weight"] = Array(torch.full_like(weight, float("nan")))
        elif how == "inf":
            weight[0, 0] = float("inf")
            record["0.weight"] = Array(weight)
        elif how == "huge":  # finite as float64, and not as the model's float32
            record["0.weight"] = Array(torch.full(weight.shape, 1e300, dtype=torch.float64))
        elif how == "empty":
            del reply.content["message"]
        elif how == "blank":
            reply.__dict__["_content"] = None
        elif how == "nobody":
            del reply.content["client"]
        elif how == "words":
            reply.content["client"] = MetricRecord({"number": 2.5})
        return reply

    return spoil


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("none", "no reply within 600 s"),
        ("error", r"error: ray: the actor died x+$"),
        ("name", "names differ from the model's at other"),
        ("missing", "names differ from the model's at 0.bias"),
        ("shape", r"0.weight has shape \(1, 4\), not \(6, 4\)"),
        ("lie", r"0.weight has shape \(1, 4\), not \(6, 4\)"),
        ("bytes", "0.weight cannot be read: "),
        ("pickle", "0.weight cannot be read: "),
        ("integers", "0.weight holds torch.int64, not floating-point numbers"),
        ("complex", "0.weight holds torch.complex64, not floating-point numbers"),
        ("nan", "0.weight is not finite"),
        ("inf", "0.weight is not finite"),
        ("huge", "0.weight is not finite"),
        ("empty", "the reply holds no arrays"),
        ("blank", "error: an empty reply$"),
        ("nobody", "the reply does not say whose it is"),
        ("words", "the reply does not say whose it is"),
    ],
)
def test_a_reply_that_cannot_be_used_is_left_out_and_the_round_goes_on(
    how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="adadagrad"):
        weights, strategy = under_flower(spoil=spoilt(how))
    assert_same(weights, in_process(drops_out=lambda round_number, client: (round_number, client) == (2, 2))[0])
    record = strategy.records[1]
    assert record.answered == (0, 1, 3, 4, 5)
    assert record.asked == tuple(range(COUNT))
    assert list(record.left_out) == [2]
    assert re.match(reason, record.left_out[2])
    assert len(record.left_out[2]) < 250
    assert any("round 2: client 2" in line for line in caplog.messages)
    assert [len(other.left_out) for other in strategy.records] == [0, 1, 0, 0]


def test_a_round_without_any_reply_leaves_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    weights, strategy = under_flower(2, spoil=lambda number, request, reply: None)
    assert_same(weights, trained_weights(make_server()))
    assert [record.answered for record in strategy.records] == [(), ()]
    assert set(strategy.records[0].left_out.values()) == {"no message"}  # nobody has ever said a number
    assert "node" in caplog.text


def test_a_client_whose_function_fails_is_left_out_with_its_error() -> None:
    def failing(number: int, count: int) -> Any:
        if number == 4:
            raise OSError("the disk is gone")
        return make_dataset(number, count)

    strategy = OverTheAir(make_server(), num_clients=COUNT)
    strategy.run(FakeGrid(client_app(make_model, failing, loss), COUNT), 2)
    expected, _ = in_process(2, drops_out=lambda round_number, client: client == 4)
    assert_same(trained_weights(strategy.server), expected)
    assert strategy.records[0].left_out == {4: "no message"}  # an error reply does not say whose it is


def test_numbers_that_do_not_fit_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    last, first = sorted(grid.numbers, key=lambda node: -grid.numbers[node])[0], min(grid.numbers)
    assert (grid.numbers[last], grid.numbers[first]) == (5, 5)
    other = max(grid.numbers)
    grid.places[other] = {"partition-id": 5, "num-partitions": COUNT}  # instead of 0
    one = sorted(grid.numbers)[-2]
    grid.places[one] = {"partition-id": 17, "num-partitions": COUNT}  # instead of 1
    strategy = OverTheAir(make_server(), num_clients=COUNT)
    strategy.run(grid, 2)
    expected, _ = in_process(2, drops_out=lambda round_number, client: client < 2)
    assert_same(trained_weights(strategy.server), expected)
    assert strategy.records[0].left_out == {0: "no message", 1: "no message"}
    assert strategy.records[0].asked == tuple(range(COUNT))
    assert f"node {other} is left out: another node is client 5 too" in caplog.text
    assert f"node {one} is left out: its number 17 is not below num_clients = {COUNT}" in caplog.text


def test_only_those_who_are_asked_get_the_weights_once_their_numbers_are_known() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    OverTheAir(make_server(), num_clients=COUNT, fraction=0.5).run(grid, 3)
    assert [len(requests) for requests in grid.requests if requests] == [COUNT, 3, 3]


def test_a_reply_of_somebody_who_was_not_asked_is_not_added(caplog: pytest.LogCaptureFixture) -> None:
    everybody = client_app(make_model, make_dataset, loss)

    def eager(number: int, request: Message, reply: Message) -> Message:
        content = RecordDict(dict(request.content))
        content["round"] = ConfigRecord({"number": request.content["round"]["number"]})
        node = request.metadata.dst_node_id
        spare = FakeGrid(everybody, COUNT)
        asked = Message(content, node, "train")
        return Message(next(iter(spare.send_and_receive([asked]))).content, reply_to=request)

    weights, strategy = under_flower(2, spoil=eager, fraction=0.5)
    expected, records = in_process(2, fraction=0.5)
    assert_same(weights, expected)
    assert strategy.records == records
    assert "was not asked" in caplog.text


def test_without_a_number_of_clients_whoever_is_connected_is_asked() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    gone = max(grid.numbers)
    grid.connected.remove(gone)
    strategy = OverTheAir(make_server())
    strategy.run(grid, 2)
    expected, records = in_process(2, drops_out=lambda round_number, client: client == grid.numbers[gone])
    assert_same(trained_weights(strategy.server), expected)
    assert strategy.records[0].asked == (1, 2, 3, 4, 5)
    assert strategy.records[0].grad_norm == records[0].grad_norm


def test_the_first_round_waits_for_all_clients_and_later_ones_for_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    away, looks = [grid.connected.pop(), grid.connected.pop()], 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            grid.connected.extend(away)

    monkeypatch.setattr("adadagrad.integrations.flower.strategy.time.sleep", look)
    strategy = OverTheAir(make_server(), num_clients=COUNT, min_clients=3, on_round=lambda _: grid.connected.sort())
    strategy.run(grid, 1)
    assert looks == 3
    assert len(strategy.records[0].answered) == COUNT
    del grid.connected[2:]
    monkeypatch.setattr("adadagrad.integrations.flower.strategy.time.monotonic", iter(range(0, 10**6, 25)).__next__)
    strategy.run(grid, 1)
    assert looks == 5  # at 25 and 50 of 60 seconds
    assert len(strategy.records[1].answered) == 2
    assert "2 of 3 clients are connected after 60 s: the round goes on with them" in caplog.text


def test_requests_say_how_long_a_reply_is_waited_for_and_which_round_it_is() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    OverTheAir(make_server(), round_timeout=12.5, first_round=7).run(grid, 1)
    assert {(one.metadata.ttl, one.metadata.group_id) for one in grid.requests[0]} == {(12.5, "7")}


def test_each_record_is_handed_on_and_told_to_flower() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT, spoilt("nan"))
    seen: list[Any] = []
    strategy = OverTheAir(make_server(), num_clients=COUNT, on_round=seen.append)
    result = strategy.run(grid, 2)
    assert seen == strategy.records
    told = result.train_metrics_clientapp[2]
    assert told == MetricRecord({"answered": 5, "left-out": 1, "grad-norm": strategy.records[1].grad_norm or 0.0})
    for name, tensor in result.arrays.to_torch_state_dict().items():
        assert torch.equal(tensor, strategy.server.model.state_dict()[name])


def test_the_weights_that_flower_starts_from_are_taken_over() -> None:
    strategy = OverTheAir(make_server(), num_clients=COUNT)
    other = {name: 2 * tensor for name, tensor in make_model().state_dict().items()}
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    strategy.start(grid, ArrayRecord(other), num_rounds=1)
    model = make_model()
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.mul_(2)
    reference = server_of(model)
    simulate(reference, [make_dataset(number, COUNT) for number in range(COUNT)], loss, rounds=1)
    assert_same(trained_weights(strategy.server), trained_weights(reference))
    with pytest.raises(InvalidArgument, match=r"names differ from the model's at 0\.bias"):
        strategy.start(grid, ArrayRecord({"0.weight": Array(torch.zeros(6, 4))}), num_rounds=1)


def test_evaluation_is_the_mean_over_all_examples_in_the_rounds_that_ask_for_it() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss, LocalWork(batch_size=5)), COUNT)
    strategy = OverTheAir(make_server(), num_clients=COUNT, evaluate_every=2)
    result = strategy.run(grid, 5)
    assert sorted(result.evaluate_metrics_clientapp) == [2, 4]
    server = make_server()
    clients = [make_dataset(number, COUNT) for number in range(COUNT)]
    simulate(server, clients, loss, rounds=2, work=LocalWork(batch_size=5))
    server.model.eval()
    inputs, labels = (torch.cat(parts) for parts in zip(*(data.tensors for data in clients), strict=True))
    expected = loss(server.model, [inputs, labels]).item()
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(expected, rel=1e-6)
    assert strategy.run(FakeGrid(grid.app, COUNT), 1).evaluate_metrics_clientapp == {}


def test_evaluation_leaves_out_what_is_no_number(caplog: pytest.LogCaptureFixture) -> None:
    def found(model: nn.Module, data: Any) -> dict[str, float]:
        return {"size": len(data), "odd": float("nan") if len(data) == 8 else 1.0}

    def spoil(number: int, request: Message, reply: Message) -> Message | None:
        if request.metadata.message_type == "train":
            return reply
        if number == 3:
            return Message(Error(1, "gone"), reply_to=request)
        if number == 4:
            reply.content["metrics"] = MetricRecord({"size": 1000.0})
        return None if number == 5 else reply

    grid = FakeGrid(client_app(make_model, make_dataset, loss, evaluate=found), COUNT, spoil)
    result = OverTheAir(make_server(), num_clients=COUNT, evaluate_every=1).run(grid, 1)
    sizes = [7, 8, 9]
    assert result.evaluate_metrics_clientapp[1]["size"] == pytest.approx(sum(size**2 for size in sizes) / sum(sizes))
    assert result.evaluate_metrics_clientapp[1]["odd"] == 1.0
    for line in ("error: gone", "odd of client 1 is no finite number", "client 4 does not say"):
        assert line in caplog.text


def test_a_node_that_does_not_know_its_number_says_how_to_start_it() -> None:
    grid = FakeGrid(client_app(make_model, make_dataset, loss), COUNT)
    node = max(grid.numbers)
    grid.places[node] = {"partition-id": "0"}
    errors: list[str] = []

    def listen(number: int, request: Message, reply: Message) -> Message:
        if reply.has_error():
            errors.append(reply.error.reason)
        return reply

    grid.spoil = listen
    OverTheAir(make_server()).run(grid, 1)
    assert len(errors) == 1
    assert "the node must know its partition-id and num-partitions, got" in errors[0]
    assert '--node-config "partition-id=0 num-partitions=10"' in errors[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_clients": 0}, InvalidArgument, "num_clients must be"),
        ({"fraction": 0.0, "num_clients": 3}, InvalidArgument, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 0.5}, InvalidArgument, "fraction = 0.5 needs num_clients: say how many clients there are"),
        ({"seed": -1}, InvalidArgument, "seed must be"),
        ({"first_round": -1}, InvalidArgument, "first_round must be"),
        ({"min_clients": 0}, InvalidArgument, "min_clients must be"),
        ({"connect_timeout": 0.0}, InvalidArgument, "connect_timeout must be > 0"),
        ({"round_timeout": -1.0}, InvalidArgument, "round_timeout must be > 0"),
        ({"evaluate_every": -1}, InvalidArgument, "evaluate_every must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OverTheAir(make_server(), **options)


def test_arguments_of_runs_and_clients_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="rounds must be"):
        OverTheAir(make_server()).run(FakeGrid(client_app(make_model, make_dataset, loss), COUNT), -1)
    with pytest.raises(InvalidArgument, match="seed must be"):
        client_app(make_model, make_dataset, loss, seed=-1)
    with pytest.raises(UnknownName, match="message"):
        client_app(make_model, make_dataset, loss, LocalWork(message="weights"))  # type: ignore[arg-type]
