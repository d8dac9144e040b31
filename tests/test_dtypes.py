"""All sixteen pairs of dtypes: what is computed in, returned in, and read in place."""

from __future__ import annotations

import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, SCALAR_REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss, loss_dtype

PAIRS = [(pred, target) for pred in DTYPES for target in DTYPES]
each_pair = pytest.mark.parametrize(("pred_dtype", "target_dtype"), PAIRS, ids=str)


@each_pair
def test_dtypes_of_loss_stats_and_gradients(
    impl: Implementation, pred_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    wide = loss_dtype(pred_dtype, target_dtype)
    for reduction in REDUCTIONS:
        pred, target = make_batch(dtype=pred_dtype, target_dtype=target_dtype, device=impl.device)
        target.requires_grad_()
        loss, stats = impl.loss(pred, target, reduction=reduction, return_stats=True)
        loss.sum().backward()
        assert loss.dtype == wide
        assert {part.dtype for part in stats[:3]} == {wide}
        assert stats.num_positive.dtype == torch.int64
        assert pred.grad.dtype == pred_dtype
        assert target.grad.dtype == target_dtype


@each_pair
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_of_every_pair(
    impl: Implementation, reduction: str, pred_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    settings = {
        "negative_weight": 0.3,
        "coord_weight": 1.7,
        "ignore_value": -1.0,
        "reduction": reduction,
    }
    pred, target = make_batch(
        (2, 4, 3, 7), dtype=pred_dtype, target_dtype=target_dtype, device=impl.device, ignored=0.2
    )
    target.requires_grad_()
    loss, stats = impl.loss(pred, target, return_stats=True, **settings)
    truth = oracle.fcrn_loss(pred, target, **settings)
    wide = loss_dtype(pred_dtype, target_dtype)
    assert_loss(loss, truth.loss, wide)
    for name in ("coord", "positive_conf", "negative_conf"):
        assert_loss(getattr(stats, name), getattr(truth, name), wide)
    assert stats.num_positive.item() == truth.num_positive

    grad_pred, grad_target = torch.autograd.grad(loss.sum(), (pred, target))
    assert_gradient(grad_pred, truth.grad, pred_dtype)
    assert_gradient(grad_target, -truth.grad, target_dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(impl: Implementation, dtype: torch.dtype) -> None:
    """300 - (-300) squared is beyond float16, and 2048 + 1 is lost to both halves."""
    pred = torch.full((1, 2, 4096), 300.0, dtype=dtype, device=impl.device)
    target = torch.full((1, 2, 4096), -300.0, dtype=dtype, device=impl.device)
    target[:, 1] = 1
    pred[:, 1] = 2
    for reduction in SCALAR_REDUCTIONS:
        loss, stats = impl.loss(pred, target, reduction=reduction, return_stats=True)
        truth = oracle.fcrn_loss(pred, target, reduction=reduction)
        assert_loss(loss, truth.loss, torch.float32)
        assert stats.coord.item() == pytest.approx(4096 * 600.0**2, rel=1e-6)
        assert stats.positive_conf.item() == 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planar", "strided"])
def test_every_half_is_read_and_written_right(
    impl: Implementation, layout: str, dtype: torch.dtype
) -> None:
    """All 65,536 of them, subnormals, infinities and NaN included, as pred and as target."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).to(impl.device).view(1, 1, -1)
    if dtype == torch.bfloat16:  # twice its largest is infinity in float32
        values = torch.where(values.isfinite(), values.clamp(-(2.0**126), 2.0**126), values)
    if layout == "strided":
        values = torch.stack([values, values], -1)[..., 0]
    pred = values.detach().requires_grad_()
    zero = torch.zeros_like(pred, requires_grad=True)
    loss = impl.loss(pred, zero, reduction="none")
    wide = values.float()
    torch.testing.assert_close(loss, wide * wide, rtol=1e-6, atol=0, equal_nan=True)
    # halved, a gradient of 2 (pred - target) is pred again, to the bit
    (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, 0.5), retain_graph=True)
    torch.testing.assert_close(grad, values, rtol=0, atol=0, equal_nan=True)
    # times 0.3 it is rounded to the nearest, from float32: an x86 PyTorch rounds a double that way
    # too, an arm64 one at once
    (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, 0.15), retain_graph=True)
    want = (wide.double() * 2 * torch.tensor(0.15).double()).float().to(dtype)
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(grad, want, rtol=spacing, atol=0, equal_nan=True)
    assert (grad == want).double().mean() > 0.95
    # as a target's confidence: what is not above zero is negative, NaN included
    loss, stats = impl.loss(zero.detach(), values, negative_weight=0.5, return_stats=True)
    assert stats.num_positive.item() == (wide > 0).sum()
    assert loss.isnan()


def test_float64_is_not_computed_in_float32(impl: Implementation) -> None:
    """1 + 1e-12 against 1: float32 sees no difference."""
    pred = torch.full((1, 1, 8), 1 + 1e-12, dtype=torch.float64, device=impl.device)
    pred.requires_grad_()
    for target_dtype in DTYPES:
        target = torch.ones(1, 1, 8, dtype=target_dtype, device=impl.device)
        loss = impl.loss(pred, target, reduction="sum")
        assert_loss(loss, oracle.fcrn_loss(pred, target, reduction="sum").loss, torch.float64)
        assert loss.item() > 0
        (grad,) = torch.autograd.grad(loss, pred)
        truth = oracle.fcrn_loss(pred, target, reduction="sum")
        assert_gradient(grad, truth.grad, torch.float64)


def test_weights_are_not_rounded_to_the_dtype_of_the_input(impl: Implementation) -> None:
    """0.01 as bfloat16 is off by 0.1 %."""
    for dtype in DTYPES:
        pred, target = make_batch(dtype=dtype, device=impl.device, positives=0.0)
        loss = impl.loss(pred, target, negative_weight=0.01)
        truth = oracle.fcrn_loss(pred, target, negative_weight=0.01)
        assert_loss(loss, truth.loss, loss.dtype)
