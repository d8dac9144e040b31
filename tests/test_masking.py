"""What is not part of the computation: exactly 0, whatever stands there; what is part, is."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss

POISONS = (float("nan"), float("inf"), float("-inf"))
IGNORE = -1.0


def masked_places(target: torch.Tensor) -> torch.Tensor:
    """Elements to which the table gives weight 0: all of ignored cells, poses of negative ones."""
    confidence = target[:, -1:]
    masked = (confidence <= 0).expand(target.shape).clone()
    masked[:, -1:] = confidence == IGNORE
    return masked


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("where", ["pred", "target", "both"])
def test_poison_in_masked_places_changes_nothing(
    impl: Implementation, where: str, reduction: str, dtype: torch.dtype
) -> None:
    settings = {"negative_weight": 0.3, "ignore_value": IGNORE, "reduction": reduction}
    pred, target = make_batch(
        (2, 7, 4, 9), dtype=dtype, device=impl.device, ignored=0.2, requires_grad=False
    )
    masked = masked_places(target)
    in_target = masked.clone()
    in_target[:, -1] = False  # the confidence there says that the cell is ignored
    assert masked.any()
    assert in_target.any()
    assert not masked.all()
    poison = torch.tensor(POISONS, device=impl.device, dtype=dtype).repeat(pred.numel())
    poison = poison[: pred.numel()].view(pred.shape)
    results = []
    for poisoned in (False, True):
        p, t = pred.clone(), target.clone()
        if poisoned and where != "target":
            p = torch.where(masked, poison, p)
        if poisoned and where != "pred":
            t = torch.where(in_target, poison, t)
        p.requires_grad_(), t.requires_grad_()
        loss, stats = impl.loss(p, t, return_stats=True, **settings)
        loss.sum().backward()
        assert (p.grad[masked] == 0).all()
        assert (t.grad[masked] == 0).all()
        if reduction == "none":
            assert (loss[masked] == 0).all()
        results.append((loss.detach(), p.grad, t.grad, *stats))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_poison_in_masked_places_leaves_second_derivatives_alone(
    impl: Implementation, reduction: str
) -> None:
    results = []
    for poisoned in (False, True):
        pred, target = make_batch(device=impl.device, ignored=0.2, dtype=torch.float64)
        masked = masked_places(target)
        if poisoned:
            pred = torch.where(masked, torch.nan, pred.detach()).requires_grad_()
        loss = impl.loss(pred, target, ignore_value=IGNORE, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), pred, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), pred)
        assert (second[masked] == 0).all()
        assert second.count_nonzero() > 0
        results.append(second)
    assert torch.equal(*results)


@pytest.mark.parametrize("reduction", ["cell", "none"])
def test_grad_output_that_is_not_a_number_stays_out_of_ignored_cells(
    impl: Implementation, reduction: str
) -> None:
    pred, target = make_batch(device=impl.device, ignored=0.4)
    ignored = target[:, -1] == IGNORE
    loss = impl.loss(pred, target, ignore_value=IGNORE, reduction=reduction)
    grad_output = torch.ones_like(loss)
    if reduction == "cell":
        grad_output[ignored] = torch.nan
    else:
        grad_output[masked_places(target)] = torch.nan
    loss.backward(grad_output)
    assert (pred.grad[masked_places(target)] == 0).all()
    assert pred.grad.isfinite().all()
    assert pred.grad.count_nonzero() > 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.1], ids=lambda share: f"{share:.0%}")
def test_poison_beside_every_pattern_of_positives(impl: Implementation, share: float) -> None:
    """Long rows, so that the sectors and vectors of a kernel hold every mixture of kinds."""
    pred, target = make_batch((2, 7, 16, 37), device=impl.device, positives=share)
    masked = masked_places(target)
    with torch.no_grad():
        pred[masked] = torch.nan
    target[masked & (torch.arange(7, device=impl.device) < 6).view(7, 1, 1)] = torch.inf
    loss = impl.loss(pred, target, negative_weight=0.1)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.1)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


def test_all_ignored_is_zero_even_if_nothing_is_a_number(impl: Implementation) -> None:
    for reduction in REDUCTIONS:
        pred = torch.full((2, 3, 4), torch.nan, device=impl.device, requires_grad=True)
        target = torch.full((2, 3, 4), torch.nan, device=impl.device)
        target[:, -1] = 255
        loss, stats = impl.loss(
            pred, target, ignore_value=255, reduction=reduction, return_stats=True
        )
        loss.sum().backward()
        assert (loss == 0).all()
        assert (pred.grad == 0).all()
        assert [part.item() for part in stats] == [0, 0, 0, 0]


CELLS = {"positive": 0, "negative": 1}


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize(
    ("kind", "element"),
    [("positive", 0), ("positive", 1), ("positive", 2), ("negative", 2)],
    ids=["positive-pose-0", "positive-pose-1", "positive-confidence", "negative-confidence"],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_poison_that_is_part_reaches_the_loss(
    impl: Implementation, reduction: str, kind: str, element: int, poison: float
) -> None:
    pred, target = make_batch((1, 3, 2), device=impl.device, requires_grad=False)
    target[0, 2] = torch.tensor([1.0, 0.0], device=impl.device)
    cell = CELLS[kind]
    pred[0, element, cell] = poison
    pred.requires_grad_()
    loss = impl.loss(pred, target, reduction=reduction)
    loss.sum().backward()
    want = torch.nan if poison != poison else torch.inf
    hit = {"none": (0, element, cell), "cell": (0, cell)}.get(reduction, ())
    torch.testing.assert_close(loss[hit].item(), want, equal_nan=True)
    torch.testing.assert_close(pred.grad[0, element, cell].item(), poison, equal_nan=True)
    others = torch.ones_like(pred, dtype=torch.bool)
    others[0, element, cell] = False
    assert pred.grad[others].isfinite().all()


def test_a_target_confidence_that_is_no_number_is_a_negative_cell_that_says_so(
    impl: Implementation,
) -> None:
    pred = torch.zeros(1, 2, 1, device=impl.device, requires_grad=True)
    target = torch.tensor([[[torch.inf], [torch.nan]]], device=impl.device)
    for settings in ({}, {"ignore_value": -1.0}):
        loss, stats = impl.loss(pred, target, reduction="none", return_stats=True, **settings)
        assert loss[0, 0].item() == 0
        assert loss[0, 1].isnan().all()
        assert stats.num_positive.item() == 0
        assert stats.negative_conf.isnan()


@pytest.mark.parametrize(
    ("name", "element", "cell"),
    [("coord_weight", 0, 0), ("positive_weight", 2, 0), ("negative_weight", 2, 1)],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_weight_of_zero_is_no_mask(
    impl: Implementation, name: str, element: int, cell: int, as_tensor: bool
) -> None:
    if as_tensor and name == "positive_weight":
        pytest.skip("positive_weight is a number by the contract")
    weight = torch.zeros((), device=impl.device) if as_tensor else 0.0
    pred, target = make_batch((1, 3, 2), device=impl.device, requires_grad=False)
    target[0, 2] = torch.tensor([1.0, 0.0], device=impl.device)
    pred.requires_grad_()
    for reduction in REDUCTIONS:
        clean = impl.loss(pred, target, reduction=reduction, **{name: weight})
        (grad,) = torch.autograd.grad(clean.sum(), pred)
        assert clean.isfinite().all()
        assert grad[0, element, cell] == 0
    poisoned = pred.detach().clone()
    poisoned[0, element, cell] = torch.nan
    poisoned.requires_grad_()
    for reduction in REDUCTIONS:
        loss = impl.loss(poisoned, target, reduction=reduction, **{name: weight})
        (grad,) = torch.autograd.grad(loss.sum(), poisoned)
        assert loss.isnan().any()
        assert grad[0, element, cell].isnan()


def test_each_masked_element_by_itself(impl: Implementation) -> None:
    """One NaN at a time in every masked element of a small grid, in pred and in target."""
    pred, target = make_batch((1, 3, 2, 3), device=impl.device, requires_grad=False, ignored=0.3)
    target[0, -1] = torch.tensor([[1.0, 0.0, -1.0], [0.5, -1.0, 0.0]], device=impl.device)
    clean = impl.loss(pred, target, ignore_value=IGNORE)
    places = masked_places(target).nonzero().tolist()
    assert len(places) == 10
    for place, poisons_target in itertools.product(places, (False, True)):
        p, t = pred.clone(), target.clone()
        if poisons_target and place[1] < 2:
            t[tuple(place)] = torch.nan
        else:
            p[tuple(place)] = torch.nan
        p.requires_grad_()
        loss = impl.loss(p, t, ignore_value=IGNORE)
        loss.backward()
        assert torch.equal(loss.detach(), clean)
        assert p.grad.isfinite().all()
        assert p.grad[tuple(place)] == 0
