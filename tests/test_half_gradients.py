"""Gradients of the half types under a GradScaler: neither flushed to zero nor short of bits."""

from __future__ import annotations

import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, ulps_apart

LOSS_SCALE = 65536.0
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("negative_weight", [1.0, 0.01])
def test_a_scaled_mean_at_an_ordinary_size(
    impl: Implementation, dtype: torch.dtype, negative_weight: float
) -> None:
    """(16, 7, 32, 32): 2 w d / numel is below float16's smallest number, times 65536 it is not."""
    shape = (16, 7, 32, 32)
    pred, target = make_batch(shape, dtype=dtype, device=impl.device, positives=0.02)
    loss = impl.loss(pred, target, negative_weight=negative_weight)
    (loss * LOSS_SCALE).backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in (pred, target)]
    truth = impl.loss(*wide, negative_weight=negative_weight) * LOSS_SCALE
    truth.backward()
    want = wide[0].grad.cpu()
    assert_gradient(pred.grad, want.numpy().astype("longdouble"), dtype)
    assert torch.equal(pred.grad.cpu() != 0, want != 0)
    if dtype == torch.float16 and negative_weight < 1:
        # rounded before the scale, most of these gradients would be wrong and many 0
        too_early = (want / LOSS_SCALE).to(dtype) * LOSS_SCALE
        wrong = ulps_apart(too_early, want.numpy().astype("longdouble")) > 2
        assert wrong.sum() > 0.5 * want.count_nonzero()
        assert (too_early == 0).sum() > (want == 0).sum()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_scale", [1.0, 3.0, LOSS_SCALE, 2.0**-8])
def test_every_reduction_under_every_scale(
    impl: Implementation, reduction: str, loss_scale: float, dtype: torch.dtype
) -> None:
    settings = {"reduction": reduction, "negative_weight": 0.01, "ignore_value": -1.0}
    pred, target = make_batch((4, 7, 3, 5), dtype=dtype, device=impl.device, ignored=0.1)
    target.requires_grad_()
    loss = impl.loss(pred, target, **settings)
    (loss * loss_scale).sum().backward()
    truth = oracle.fcrn_loss(pred, target, grad_output=loss_scale, **settings)
    assert_gradient(pred.grad, truth.grad, dtype)
    assert_gradient(target.grad, -truth.grad, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_large_batch_of_small_differences(impl: Implementation, dtype: torch.dtype) -> None:
    """Nearly a million elements, all negative: unscaled, float16 holds none of these gradients."""
    shape = (32, 7, 64, 64)
    pred, target = make_batch(shape, dtype=dtype, device=impl.device, positives=0.0)
    loss = impl.loss(pred, target)
    (loss * LOSS_SCALE).backward()
    want = torch.zeros(shape, dtype=torch.float64)
    difference = pred.detach().double().cpu() - target.double().cpu()
    want[:, -1] = 2 * difference[:, -1] * LOSS_SCALE / pred.numel()
    assert_gradient(pred.grad, want.numpy().astype("longdouble"), dtype)
    assert pred.grad[:, -1].count_nonzero() > 0.999 * pred[:, -1].numel()


def test_a_second_backward_under_another_scale(impl: Implementation) -> None:
    """A GradScaler lowers its scale: the second gradient is computed afresh, not rescaled."""
    pred, target = make_batch((8, 7, 16, 16), dtype=torch.float16, device=impl.device)
    loss = impl.loss(pred, target, negative_weight=0.01)
    for scale in (1.0, LOSS_SCALE):
        pred.grad = None
        (loss * scale).backward(retain_graph=True)
        truth = oracle.fcrn_loss(pred, target, negative_weight=0.01, grad_output=scale)
        assert_gradient(pred.grad, truth.grad, torch.float16)


def test_a_scale_that_overflows_gives_infinities_as_grad_scaler_wants(
    impl: Implementation,
) -> None:
    pred, target = make_batch((1, 3, 4), dtype=torch.float16, device=impl.device, positives=1.1)
    loss = impl.loss(pred, target, reduction="sum")
    (loss * 2.0**20).backward()
    truth = oracle.fcrn_loss(pred, target, reduction="sum", grad_output=2.0**20)
    assert_gradient(pred.grad, truth.grad, torch.float16)
    assert pred.grad.isinf().any()
    assert not pred.grad.isnan().any()
