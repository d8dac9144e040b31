"""Out of memory says so, once: programs that catch it and take a smaller batch look for the words.

vllm-project/vllm#33591 is about an error that said nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import REDUCTIONS, make_batch
from counting import passes
from implementations import Implementation

# More than the addresses of a process, in a few bytes; a result for each cell is too large as well.
SHAPE = (1 << 23, 7, 1 << 22)


class Allocations:
    """What the package allocates by, watched: the errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed: list[Exception] = []
        self.error: Exception | None = None  # to be raised in place of the next large one
        for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            try:
                if self.error is not None:
                    raise self.error
                return allocate(*arguments, **keywords)
            except RuntimeError as error:
                self.failed.append(error)
                raise

        return watched


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    return Allocations(monkeypatch)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_cpu_says_what_pytorch_says(allocations: Allocations, reduction: str) -> None:
    """From one attempt, and no operator is run."""
    fused = Implementation("fused", "cpu")
    if why := fused.why_not():
        pytest.skip(why)
    pred = torch.zeros(1).expand(SHAPE).requires_grad_()
    target = torch.zeros(1).expand(SHAPE)

    def run() -> None:
        with pytest.raises(RuntimeError, match="you tried to allocate"):
            fused.loss(pred, target, reduction=reduction)

    assert passes(run) == 0
    assert len(allocations.failed) == 1, allocations.failed


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_the_error_of_forward_passes_through(
    fused: Implementation, allocations: Allocations, backend: str, reduction: str
) -> None:
    """As the allocator of CUDA raises it."""
    pred, target = make_batch(device=fused.device)
    error = allocations.error = torch.OutOfMemoryError("CUDA out of memory.")

    def run() -> None:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            Implementation(backend, fused.device).loss(pred, target, reduction=reduction)
        assert caught.value is error

    assert passes(run) == 0
    assert len(allocations.failed) == 1, allocations.failed


@pytest.mark.parametrize("which", ["pred", "target"])
def test_the_error_of_backward_passes_through(
    fused: Implementation, allocations: Allocations, which: str
) -> None:
    pred, target = make_batch(device=fused.device)
    pred.requires_grad_(which == "pred")
    target.requires_grad_(which == "target")
    loss = fused.loss(pred, target, reduction="none").sum()
    allocations.error = torch.OutOfMemoryError("CUDA out of memory.")

    def run() -> None:
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
            loss.backward()

    assert passes(run) == 0
    assert len(allocations.failed) == 1, allocations.failed


def test_the_loss_serves_again_afterwards(fused: Implementation) -> None:
    pred, target = make_batch(device=fused.device)
    want = fused.loss(pred, target)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Allocations(monkeypatch).error = torch.OutOfMemoryError("CUDA out of memory.")
        with pytest.raises(torch.OutOfMemoryError):
            fused.loss(pred, target)
    assert torch.equal(fused.loss(pred, target), want)
