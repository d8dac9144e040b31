"""The clocks and the memory of the benchmarks."""

import pytest
import timing
import torch


def test_quartiles_of_rounds():
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_rounds_are_interleaved():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    progress = []
    seconds = timing.wall_clock(
        calls,
        rounds=4,
        round_seconds=1e-9,
        threads=1,
        progress=lambda: progress.append(len(order)),
    )
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 4, "b": 4}
    assert all(second > 0 for rounds in seconds.values() for second in rounds)
    ends = [order[end - 1] for end in progress]
    assert ends == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_slower_call_takes_longer():
    small, large = torch.zeros(10), torch.zeros(3_000_000)
    calls = {"small": lambda: small.sum(), "large": lambda: large.add(1)}
    seconds = timing.wall_clock(calls, rounds=3, round_seconds=0.01, threads=1)
    assert timing.quartiles(seconds["large"]).median > timing.quartiles(seconds["small"]).median


def test_the_threads_are_put_back():
    before = torch.get_num_threads()
    timing.wall_clock({"call": lambda: None}, rounds=1, round_seconds=1e-9, threads=1)
    assert torch.get_num_threads() == before


def test_peak_counts_temporaries_that_are_gone_at_the_end():
    values = torch.zeros(1_000_000)

    def two_at_once() -> torch.Tensor:
        return (values + 1) + (values + 2)

    assert timing.peak_bytes(two_at_once, torch.device("cpu")) == pytest.approx(12e6, rel=0.01)
    nothing = timing.peak_bytes(lambda: values.zero_(), torch.device("cpu"))
    assert nothing < 1000
