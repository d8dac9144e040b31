"""The same inputs give the same bits, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from batches import make_batch
from implementations import Implementation

# more than one thread's share each, in every order of large and small dimensions
SHAPES = [(2, 7, 111, 113), (1, 2, 70_001), (600, 7, 3, 5)]


def results(impl: Implementation, pred: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """Losses, stats and gradients, with a grad_output of 1 and another."""
    collected = []
    for reduction in ("mean", "positive", "none"):
        loss, stats = impl.loss(
            pred, target, reduction=reduction, negative_weight=0.3, return_stats=True
        )
        first = torch.autograd.grad(loss.sum(), (pred, target), retain_graph=True)
        second = torch.autograd.grad(0.7 * loss.sum(), (pred, target))
        collected += [loss.detach(), *stats, *first, *second]
    return [tensor.clone() for tensor in collected]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, torch.float32) for s in SHAPES), (SHAPES[0], torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_every_number_of_threads(
    impl: Implementation, layout: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if impl.device != "cpu":
        pytest.skip("the number of threads is the CPU's")
    pred, target = make_batch(shape, dtype=dtype, requires_grad=False)
    if layout == "channels_last":
        pred, target = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (pred, target))
    elif layout == "strided":
        pred = torch.stack([pred, pred], -1)[..., 0]
    pred.requires_grad_(), target.requires_grad_()
    torch.set_num_threads(1)
    want = results(impl, pred, target)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for got, expected in zip(results(impl, pred, target), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_in_every_run(impl: Implementation, shape: tuple[int, ...]) -> None:
    pred, target = make_batch(shape, device=impl.device)
    target.requires_grad_()
    want = results(impl, pred, target)
    for _ in range(3):
        for got, expected in zip(results(impl, pred, target), want, strict=True):
            assert torch.equal(got, expected)


def test_the_same_bits_wherever_the_memory_lies(impl: Implementation) -> None:
    """A sum must not be grouped by the address at which the numbers happen to begin."""
    shape = (2, 7, 33, 35)
    pred, target = make_batch(shape, device=impl.device, requires_grad=False)
    want = impl.loss(pred, target)
    for offset in range(1, 17):
        store = pred.new_empty(pred.numel() + offset)
        moved = store[offset:].view(shape).copy_(pred)
        assert torch.equal(impl.loss(moved, target), want)
        assert torch.equal(impl.loss(pred, target), want)
