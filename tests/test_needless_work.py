"""Nothing is computed or allocated for a gradient that no one needs, and no more than it else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from batches import REDUCTIONS, SCALAR_REDUCTIONS, make_batch
from implementations import Implementation

from benchmarks import measure

SHAPE = (16, 7, 64, 64)
NUMEL = 16 * 7 * 64 * 64
SMALL = 64 * 1024  # bytes for what does not grow with the input


def allocations(device: str, run: Callable[[], object]) -> tuple[int, int]:
    """`(peak, total)` bytes that PyTorch's allocator hands out while `run` runs."""
    run()  # what is set up at a first call is not counted
    return measure.allocations(run, torch.device(device))


def test_the_yardstick_sees_memory(device: str) -> None:
    tensor = torch.zeros(NUMEL, device=device)
    peak, total = allocations(device, lambda: (tensor + 1) + 1)
    assert 8 * NUMEL <= peak <= 8 * NUMEL + SMALL
    assert 8 * NUMEL <= total <= 8 * NUMEL + SMALL
    assert allocations(device, tensor.zero_) == (0, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
def test_a_loss_without_gradient_allocates_nothing_that_grows(
    fused: Implementation, reduction: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    pred, target = make_batch(SHAPE, dtype=dtype, device=fused.device, requires_grad=False)
    pred = pred.contiguous(memory_format=layout)
    settings = {"reduction": reduction, "negative_weight": torch.tensor(0.1, device=fused.device)}
    peak, _ = allocations(fused.device, lambda: fused.loss(pred, target, **settings))
    assert peak <= SMALL
    pred.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            peak, _ = allocations(
                fused.device, lambda: fused.loss(pred, target, return_stats=True, **settings)
            )
        assert peak <= SMALL


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("grad_output", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
def test_a_step_allocates_the_gradient_and_nothing_else_that_grows(
    fused: Implementation,
    reduction: str,
    dtype: torch.dtype,
    grad_output: float,
    return_stats: bool,
) -> None:
    pred, target = make_batch(SHAPE, dtype=dtype, device=fused.device)

    def step() -> torch.Tensor:
        loss = fused.loss(pred, target, reduction=reduction, return_stats=return_stats)
        loss = loss[0] if return_stats else loss
        (grad,) = torch.autograd.grad(grad_output * loss, pred)
        return grad

    peak, total = allocations(fused.device, step)
    gradient = NUMEL * dtype.itemsize
    assert gradient <= peak <= gradient + SMALL
    assert total <= gradient + SMALL


def test_channels_last_and_strided_inputs_are_not_copied(fused: Implementation) -> None:
    pred, target = make_batch(SHAPE, device=fused.device, requires_grad=False)
    layouts = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "slice": lambda x: torch.cat([x, x], 1)[:, 3:10],
        "expanded": lambda x: x[:1].expand(SHAPE),
    }
    for name, layout in layouts.items():
        p, t = layout(pred), layout(target)
        peak, _ = allocations(fused.device, lambda p=p, t=t: fused.loss(p, t))
        assert peak <= SMALL, name


@pytest.mark.parametrize("reduction", ["cell", "none"])
def test_a_result_for_each_cell_is_all_that_forward_allocates(
    fused: Implementation, reduction: str
) -> None:
    pred, target = make_batch(SHAPE, device=fused.device)
    output = 4 * (NUMEL // 7 if reduction == "cell" else NUMEL)
    peak, _ = allocations(fused.device, lambda: fused.loss(pred, target, reduction=reduction))
    assert output <= peak <= output + SMALL
    with torch.no_grad():
        peak, _ = allocations(fused.device, lambda: fused.loss(pred, target, reduction=reduction))
    assert output <= peak <= output + SMALL


def test_a_gradient_of_target_alone(fused: Implementation) -> None:
    """Forward writes no gradient of pred; backward writes one gradient, that of target."""
    pred, target = make_batch(SHAPE, device=fused.device, requires_grad=False)
    target.requires_grad_()
    peak, _ = allocations(fused.device, lambda: fused.loss(pred, target))
    assert peak <= SMALL
    peak, total = allocations(
        fused.device, lambda: torch.autograd.grad(fused.loss(pred, target), target)
    )
    assert 4 * NUMEL <= peak <= total <= 4 * NUMEL + SMALL


def test_a_second_backward_allocates_one_gradient(fused: Implementation) -> None:
    pred, target = make_batch(SHAPE, device=fused.device)
    loss = fused.loss(pred, target)
    torch.autograd.grad(loss, pred, retain_graph=True)
    peak, total = allocations(
        fused.device, lambda: torch.autograd.grad(2 * loss, pred, retain_graph=True)
    )
    assert 4 * NUMEL <= peak <= total <= 4 * NUMEL + SMALL


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_kept_without_a_gradient(impl: Implementation, reduction: str) -> None:
    """After a loss under no_grad, or of inputs that need no gradient, the inputs can go."""
    for mode in (torch.no_grad, torch.enable_grad):
        pred, target = make_batch(device=impl.device, requires_grad=mode is torch.no_grad)
        with mode():
            loss, stats = impl.loss(pred, target, reduction=reduction, return_stats=True)
        assert loss.grad_fn is None
        references = [weakref.ref(pred), weakref.ref(target)]
        del pred, target
        gc.collect()
        assert [reference() for reference in references] == [None, None]
        assert stats.num_positive.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_everything_goes_with_the_loss(impl: Implementation, dtype: torch.dtype) -> None:
    """No cycle of references keeps a graph, its inputs or its gradient until a collection."""
    gc.disable()
    try:
        for backward in (False, True):
            leaf, target = make_batch(dtype=dtype, device=impl.device)
            pred = leaf * 1
            references = [weakref.ref(pred), weakref.ref(target)]
            loss, stats = impl.loss(pred, target, return_stats=True)
            if backward:
                loss.backward()
            del pred, target, loss, stats
            assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
