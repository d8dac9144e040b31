"""The robustness run, for a few seconds, and that it finds what it is there to find."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import soak
import torch
from implementations import IMPLEMENTATIONS, Implementation


def available() -> list[Implementation]:
    return [each for each in IMPLEMENTATIONS if each.why_not() is None]


@pytest.mark.slow
def test_a_few_seconds_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--seconds", "4", "--seed", "1000000", "--memory-calls", "0"]) == 0
    output = capsys.readouterr().out
    assert "all right" in output
    calls = int(output.split(" calls, seeds")[0].rsplit("\n", 1)[-1])
    assert calls > 20


def test_a_seed_belongs_to_one_call() -> None:
    for seed in range(50):
        assert str(soak.random_call(seed)) == str(soak.random_call(seed))
    assert len({str(soak.random_call(seed)) for seed in range(50)}) == 50


def test_every_kind_of_call_is_among_the_seeds() -> None:
    calls = [soak.random_call(seed) for seed in range(500)]
    assert {call["pred_dtype"] for call in calls} == {call["target_dtype"] for call in calls}
    assert len({call["pred_dtype"] for call in calls}) == 4
    assert len({call["settings"]["reduction"] for call in calls}) == 6
    assert any(0 in call["shape"] for call in calls)
    assert any(call["target_layout"]["expanded"] for call in calls)


def test_a_wrong_loss_is_found_and_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is off by 1e-4 for positive cells: the run stops and says how to see it again."""
    right = Implementation.loss

    def wrong(
        self: Implementation, pred: torch.Tensor, target: torch.Tensor, **settings: Any
    ) -> Any:
        settings["positive_weight"] = settings.get("positive_weight", 1.0) * (1 + 1e-4)
        return right(self, pred, target, **settings)

    monkeypatch.setattr(Implementation, "loss", wrong)
    assert soak.main(["--seconds", "30", "--seed", "7", "--memory-calls", "0"]) == 1
    output = capsys.readouterr().out
    seed = int(output.split("--replay ")[1].split()[0])
    assert "the call: {'shape'" in output
    assert soak.main(["--replay", str(seed)]) == 1
    monkeypatch.undo()
    assert soak.main(["--replay", str(seed)]) == 0


def test_memory_does_not_grow(fused: Implementation) -> None:
    """Five thousand steps; `python -m tests.soak` makes a hundred thousand."""
    growth = soak.memory_growth(fused, 5_000)
    assert growth < 2**20, f"{growth / 1024:.0f} KiB in 5,000 calls"


def test_the_yardstick_sees_a_leak(device: str) -> None:
    before = soak.memory(device)
    if device == "cuda":
        held: Any = torch.ones(16 * 2**20, device=device)
    else:  # past the allocator, which may have as much left from earlier tests
        held = mmap.mmap(-1, 64 * 2**20)
        held.write(b"x" * len(held))
    assert soak.memory(device) - before > 60 * 2**20
    del held
