"""The clocks and the memory of the benchmarks, and what they say of the machine."""

import getpass
import json
import socket

import measure
import pytest
import torch

CPU = torch.device("cpu")


def test_quartiles_of_rounds():
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert measure.quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_rounds_are_interleaved():
    order = []

    def timer(name):
        def run(times):
            order.append(name)
            return 1.0 * times  # longer than a round: once is enough

        return run

    seconds = measure.interleaved({name: timer(name) for name in "ab"}, 4, 1e-9)
    assert seconds == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_call_is_repeated_until_a_round_is_full():
    asked = []

    def run(times):
        asked.append(times)
        return times * 1e-3

    assert measure.interleaved({"call": run}, 1, 0.5)["call"] == [pytest.approx(1e-3)]
    assert asked[-1] == 500


def test_a_slower_call_takes_longer():
    small, large = torch.zeros(10), torch.zeros(3_000_000)
    calls = {"small": lambda: small.sum(), "large": lambda: large.add(1)}
    timers = {name: measure.host_timer(call, CPU) for name, call in calls.items()}
    seconds = measure.interleaved(timers, 3, 0.01)
    assert measure.quartiles(seconds["large"]).median > measure.quartiles(seconds["small"]).median


def test_peak_counts_temporaries_that_are_gone_at_the_end():
    values = torch.zeros(1_000_000)
    peak = measure.allocations(lambda: (values + 1) + (values + 2), CPU).peak
    assert peak == pytest.approx(12e6, rel=0.01)
    assert measure.allocations(lambda: values.zero_(), CPU).peak < 1000


def test_a_record_says_where_it_comes_from_and_not_on_whose_machine(tmp_path):
    path = tmp_path / "record.json"
    measure.write_json({"benchmark": "x", **measure.describe_run(CPU), "rows": [1, 2]}, path)
    record = measure.read_json(path, "x")
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]["type"] == "cpu"
    assert record["device"]["threads"] >= 1
    assert record["rows"] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]
    text = path.read_text()
    for private in (socket.gethostname(), str(tmp_path), "/home/", f"/{getpass.getuser()}/"):
        assert private not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("figures", "is not JSON"), ("{}", "not a result of gpu.py")],
)
def test_a_file_that_is_no_record_is_named(text, message, tmp_path):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"old.json: .*{message}"):
        measure.read_json(path, "gpu")


def test_without_a_repository_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setattr(measure, "ROOT", "/nowhere")
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert measure.git_commit() == "abc1234"
    assert json.dumps(measure.describe_run(CPU)["git_commit"]) == '"abc1234"'
