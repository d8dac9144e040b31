"""Inputs without elements: what mse_loss gives, an empty gradient, never an error."""

from __future__ import annotations

import warnings

import pytest
import torch
from batches import DTYPES, REDUCTIONS
from implementations import Implementation
from tolerances import loss_dtype

SHAPES = [(0, 7, 4, 4), (2, 7, 0, 4), (2, 7, 4, 0), (0, 7), (0, 1), (2, 7, 0), (0, 7, 0), (0, 2, 3)]
SHAPES += [(0, 4, 2)]  # as many elements of an image as a vector has, but not as many cells


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(
    impl: Implementation, dtype: torch.dtype, reduction: str, shape: tuple[int, ...]
) -> None:
    pred = torch.empty(shape, dtype=dtype, device=impl.device, requires_grad=True)
    target = torch.empty(shape, dtype=dtype, device=impl.device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, stats = impl.loss(
            pred, target, reduction=reduction, return_stats=True, ignore_value=-1.0
        )
        loss.sum().backward()
    assert loss.dtype == loss_dtype(dtype, dtype)
    if reduction == "none":
        assert loss.shape == shape
    elif reduction == "cell":
        assert loss.shape == (shape[0], *shape[2:])
    else:
        assert loss.shape == ()
        zero_divisor = reduction == "mean" or (reduction == "batchmean" and shape[0] == 0)
        torch.testing.assert_close(
            loss.item(), torch.nan if zero_divisor else 0.0, equal_nan=True, rtol=0, atol=0
        )
    if reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.mse_loss(pred, target, reduction=reduction)
        torch.testing.assert_close(loss, want, equal_nan=True, check_dtype=False)
    assert [part.item() for part in stats] == [0, 0, 0, 0]
    for tensor in (pred, target):
        assert tensor.grad.shape == shape
        assert tensor.grad.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_empty_in_every_other_way(impl: Implementation, shape: tuple[int, ...]) -> None:
    """Transposed, without gradient, twice, with second derivatives, with weights in tensors."""
    pred = torch.empty(shape, device=impl.device, requires_grad=True)
    target = torch.empty(shape, device=impl.device)
    weight = torch.tensor(0.5, device=impl.device)
    coord_weight = torch.ones(shape[1] - 1, device=impl.device)
    for reduction in REDUCTIONS:
        settings = {
            "reduction": reduction,
            "negative_weight": weight,
            "coord_weight": coord_weight,
        }
        with torch.no_grad():
            assert not impl.loss(pred, target, **settings).requires_grad
        loss = impl.loss(pred.movedim(1, -1).movedim(-1, 1), target, **settings).sum()
        for scale in (1.0, 2.0):
            (grad,) = torch.autograd.grad(scale * loss, pred, retain_graph=True)
            assert grad.shape == shape
        (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), pred)
        assert second.shape == shape


def test_a_batch_with_images_but_no_cells_has_a_batchmean_of_zero(impl: Implementation) -> None:
    pred = torch.empty(3, 7, 0, device=impl.device)
    assert impl.loss(pred, pred, reduction="batchmean").item() == 0
    assert impl.loss(pred, pred, reduction="positive").item() == 0


def test_an_empty_batch_does_not_spoil_the_next(impl: Implementation) -> None:
    empty = torch.empty(0, 7, 4, 4, device=impl.device, requires_grad=True)
    full = torch.ones(1, 7, 4, 4, device=impl.device, requires_grad=True)
    impl.loss(empty, empty.detach()).backward()
    loss = impl.loss(full, torch.zeros_like(full))
    loss.backward()
    assert loss.item() == pytest.approx(1 / 7)
    assert full.grad[:, -1].unique().tolist() == [pytest.approx(2 / 112)]
