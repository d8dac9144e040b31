"""What the loss is: the table of cells, the reductions, the stats."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss

import fcrn_fused
from fcrn_fused.reductions import DIVISORS

# One image of three cells: positive, negative, ignored. Every number below is exact in each dtype.
PRED = [[1.0, 5.0, 7.0], [2.0, 5.0, 7.0], [0.5, 0.25, 9.0]]
TARGET = [[0.0, 1.0, 1.0], [4.0, 1.0, 1.0], [1.0, 0.0, -1.0]]
SETTINGS = {
    "coord_weight": (2.0, 0.5),
    "positive_weight": 3.0,
    "negative_weight": 0.25,
    "ignore_value": -1.0,
}
ERRORS = [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.75, 0.015625, 0.0]]
SLOPES = [[4.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [-3.0, 0.125, 0.0]]
TOTAL = 4.765625
BY_HAND = {
    "mean": TOTAL / 9,
    "sum": TOTAL,
    "batchmean": TOTAL,
    "positive": TOTAL,
    "cell": [[[4.75 / 3, 0.015625 / 3, 0.0]]],
    "none": [[[row] for row in ERRORS]],
}


def example(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    pred = torch.tensor(PRED, dtype=dtype, device=device).view(1, 3, 1, 3).requires_grad_()
    return pred, torch.tensor(TARGET, dtype=dtype, device=device).view(1, 3, 1, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_example_by_hand(impl: Implementation, reduction: str, dtype: torch.dtype) -> None:
    pred, target = example(dtype, impl.device)
    loss = impl.loss(pred, target, reduction=reduction, **SETTINGS)
    want = torch.tensor(BY_HAND[reduction], dtype=torch.float64)
    assert loss.shape == want.shape
    torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-6, atol=0)

    loss.sum().backward()
    divisor = {"mean": 9.0, "cell": 3.0}.get(reduction, 1.0)
    want_grad = torch.tensor(SLOPES, dtype=torch.float64).view(1, 3, 1, 3) / divisor
    assert_gradient(pred.grad, want_grad.numpy().astype(np.longdouble), dtype)


def test_the_stats_of_the_example_by_hand(impl: Implementation) -> None:
    pred, target = example(torch.float32, impl.device)
    for reduction in REDUCTIONS:
        _, stats = impl.loss(pred, target, reduction=reduction, return_stats=True, **SETTINGS)
        assert stats.coord.item() == 4.0
        assert stats.positive_conf.item() == 0.75
        assert stats.negative_conf.item() == 0.015625
        assert stats.num_positive.item() == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (3, 1, 4), (2, 2), (1, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_gradient_and_stats_against_the_loops(
    impl: Implementation, shape: tuple[int, ...], reduction: str, dtype: torch.dtype
) -> None:
    settings = {
        "negative_weight": 0.3,
        "positive_weight": 1.7,
        "coord_weight": [0.5 + j for j in range(shape[1] - 1)],
        "ignore_value": -1.0,
        "reduction": reduction,
    }
    pred, target = make_batch(shape, dtype=dtype, device=impl.device, ignored=0.2)
    target.requires_grad_()
    loss, stats = impl.loss(pred, target, return_stats=True, **settings)
    grad_output = torch.randn_like(loss)
    grad_pred, grad_target = torch.autograd.grad(loss, (pred, target), grad_output)

    truth = oracle.fcrn_loss(pred, target, grad_output=grad_output, **settings)
    assert loss.shape == truth.loss.shape
    assert_loss(loss, truth.loss, dtype)
    assert_gradient(grad_pred, truth.grad, dtype)
    assert_gradient(grad_target, -truth.grad, dtype)
    assert_loss(stats.coord, truth.coord, dtype)
    assert_loss(stats.positive_conf, truth.positive_conf, dtype)
    assert_loss(stats.negative_conf, truth.negative_conf, dtype)
    assert stats.num_positive.item() == truth.num_positive


def test_defaults_are_weights_of_one_and_mean(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target)
    truth = oracle.fcrn_loss(pred, target)
    assert_loss(loss, truth.loss, torch.float32)
    loss.backward()
    assert_gradient(pred.grad, truth.grad, torch.float32)


def test_all_positive_with_weights_of_one_is_mse_loss(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device, positives=1.1)
    loss = impl.loss(pred, target)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred, target))


@pytest.mark.parametrize("confidence", [1e-3, 0.25, 0.999, 1.0, 7.0, float("inf")])
def test_any_confidence_above_zero_is_positive_and_regressed_to(
    impl: Implementation, confidence: float
) -> None:
    pred = torch.full((1, 2, 1), 0.5, device=impl.device)
    target = torch.tensor([[[2.0], [confidence]]], device=impl.device)
    loss, stats = impl.loss(pred, target, reduction="none", negative_weight=9.0, return_stats=True)
    assert stats.num_positive.item() == 1
    assert loss[0, 0].item() == 2.25
    assert loss[0, 1].item() == pytest.approx((0.5 - confidence) ** 2, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.0, -0.0, -1.0, -1e-6, float("-inf")])
def test_any_confidence_not_above_zero_is_negative(impl: Implementation, confidence: float) -> None:
    pred = torch.full((1, 2, 1), 0.5, device=impl.device)
    target = torch.tensor([[[2.0], [confidence]]], device=impl.device)
    loss, stats = impl.loss(pred, target, reduction="none", negative_weight=0.5, return_stats=True)
    assert stats.num_positive.item() == 0
    assert loss[0, 0].item() == 0
    assert loss[0, 1].item() == pytest.approx(0.5 * (0.5 - confidence) ** 2, rel=1e-6)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_value", [-1.0, 0.0, 0.1, 1 / 3, 255])
def test_ignore_value_is_rounded_to_the_dtype_of_target(
    impl: Implementation, ignore_value: float, target_dtype: torch.dtype
) -> None:
    """0.1 as float16 is not 0.1 as float32: a target that holds the rounded one is ignored."""
    stored = torch.tensor(ignore_value, dtype=torch.float64).to(target_dtype)
    other = (stored.double() * (1 + 2 * torch.finfo(target_dtype).eps)).to(target_dtype)
    if other == stored:
        other = torch.tensor(1e-3, dtype=target_dtype)
    target = torch.ones(1, 3, 3, dtype=target_dtype)
    target[0, 2] = torch.stack([stored, other, torch.ones((), dtype=target_dtype)])
    pred = torch.full((1, 3, 3), 3.0, device=impl.device, requires_grad=True)
    loss = impl.loss(pred, target.to(impl.device), ignore_value=ignore_value, reduction="none")
    loss.sum().backward()
    assert (loss[..., 0] == 0).all()
    assert (pred.grad[..., 0] == 0).all()
    assert loss[0, 2, 1].item() > 0
    assert (loss[..., 2] == 4).all()


def test_an_ignore_value_above_zero_wins_over_positive(impl: Implementation) -> None:
    pred = torch.full((1, 2, 2), 3.0, device=impl.device)
    target = torch.tensor([[[1.0, 1.0], [1.0, 0.5]]], device=impl.device)
    loss, stats = impl.loss(pred, target, ignore_value=0.5, reduction="none", return_stats=True)
    assert loss.tolist() == [[[4.0, 0.0], [4.0, 0.0]]]
    assert stats.num_positive.item() == 1


def test_without_ignore_value_minus_one_is_an_ordinary_negative(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device, ignored=0.4)
    loss = impl.loss(pred, target, negative_weight=0.5)
    assert_loss(loss, oracle.fcrn_loss(pred, target, negative_weight=0.5).loss, torch.float32)


def test_mean_divides_by_all_elements_and_positive_by_positive_cells(impl: Implementation) -> None:
    pred, target = make_batch((4, 7, 3, 3), device=impl.device, ignored=0.3)
    loss = {r: impl.loss(pred, target, ignore_value=-1, reduction=r) for r in REDUCTIONS}
    num_positive = int((target[:, -1] > 0).sum())
    assert num_positive > 1
    torch.testing.assert_close(loss["mean"] * pred.numel(), loss["sum"])
    torch.testing.assert_close(loss["batchmean"] * 4, loss["sum"])
    torch.testing.assert_close(loss["positive"] * num_positive, loss["sum"])
    torch.testing.assert_close(loss["none"].sum(), loss["sum"])
    torch.testing.assert_close(loss["cell"], loss["none"].mean(1))


def test_positive_without_a_positive_cell_divides_by_one(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device, positives=0)
    by_positive = impl.loss(pred, target, reduction="positive")
    by_positive.backward()
    truth = oracle.fcrn_loss(pred, target, reduction="sum")
    assert_loss(by_positive, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


COORD_WEIGHTS = {
    "number": 2.0,
    "integer": 2,
    "list": [1.0, 2.0, 3.0],
    "tuple": (0.0, 2.0, 3.5),
    "integers": [1, 2, 3],
    "numpy": np.array([1.0, 2.0, 3.0]),
    "numpy float32": np.array([1.0, 2.0, 3.0], dtype=np.float32),
    "numpy scalar": np.float32(1.5),
    "fraction": Fraction(3, 2),
    "0-dim tensor": torch.tensor(1.5),
    "tensor": torch.tensor([1.0, 2.0, 3.0]),
    "float64 tensor": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    "float16 tensor": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16),
    "tensor with a stride": torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0])[::2],
    "expanded tensor": torch.tensor(1.5).expand(3),
}


@pytest.mark.parametrize("weight", COORD_WEIGHTS.values(), ids=COORD_WEIGHTS.keys())
def test_every_form_of_coord_weight(impl: Implementation, weight: object) -> None:
    pred, target = make_batch((2, 4, 5), device=impl.device)
    given = weight.to(impl.device) if isinstance(weight, torch.Tensor) else weight
    loss = impl.loss(pred, target, coord_weight=given, reduction="sum")
    loss.backward()
    values = np.broadcast_to(np.asarray(weight, dtype=np.float64), (3,)).tolist()
    truth = oracle.fcrn_loss(pred, target, coord_weight=values, reduction="sum")
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


@pytest.mark.parametrize("form", ["list", "tensor", "float64 tensor with a stride"])
def test_more_pose_maps_than_anyone_has(impl: Implementation, form: str) -> None:
    """C = 77, a weight for each."""
    pred, target = make_batch((2, 77, 5), device=impl.device)
    values = [0.25 + 0.5 * j for j in range(76)]
    given = {
        "list": values,
        "tensor": torch.tensor(values, device=impl.device),
        "float64 tensor with a stride": torch.tensor(
            [value for value in values for _ in range(2)], dtype=torch.float64, device=impl.device
        )[::2],
    }[form]
    for reduction in REDUCTIONS:
        loss = impl.loss(pred, target, coord_weight=given, reduction=reduction)
        (grad,) = torch.autograd.grad(2 * loss.sum(), pred)
        truth = oracle.fcrn_loss(
            pred, target, coord_weight=values, reduction=reduction, grad_output=2.0
        )
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, truth.grad, torch.float32)


@pytest.mark.parametrize(
    "weight",
    [0.5, 1, True, np.float64(0.5), np.float32(0.5), Fraction(1, 2)],
    ids=lambda weight: type(weight).__name__,
)
def test_every_number_is_a_weight(impl: Implementation, weight: float) -> None:
    pred, target = make_batch((2, 3, 5), device=impl.device)
    for name in ("negative_weight", "positive_weight", "coord_weight"):
        loss = impl.loss(pred, target, **{name: weight})
        truth = oracle.fcrn_loss(pred, target, **{name: float(weight)})
        assert_loss(loss, truth.loss, torch.float32)


def test_integers_beyond_64_bits_are_numbers_too(impl: Implementation) -> None:
    pred, target = make_batch((2, 3, 5), device=impl.device)
    for name in ("negative_weight", "positive_weight", "coord_weight"):
        loss = impl.loss(pred, target, **{name: 2**70})
        assert_loss(loss, oracle.fcrn_loss(pred, target, **{name: 2.0**70}).loss, torch.float32)
    loss = impl.loss(pred, target, ignore_value=2**70)
    assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_weight_as_a_tensor(
    impl: Implementation, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    pred, target = make_batch(dtype=dtype, device=impl.device)
    weight = torch.tensor(0.3, dtype=weight_dtype, device=impl.device)
    loss = impl.loss(pred, target, negative_weight=weight)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target, negative_weight=weight)
    assert_loss(loss, truth.loss, loss.dtype)
    assert_gradient(pred.grad, truth.grad, dtype)


def test_a_weight_tensor_is_read_at_each_call(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    weight = torch.tensor(0.01, device=impl.device)
    for value in (0.01, 0.5, 1.0):
        weight.fill_(value)
        loss = impl.loss(pred, target, negative_weight=weight)
        truth = oracle.fcrn_loss(pred, target, negative_weight=weight)
        assert_loss(loss, truth.loss, torch.float32)


def test_no_gradient_runs_through_the_kind_of_a_cell(impl: Implementation) -> None:
    """dloss/dtarget is -dloss/dpred to the bit, also at the confidences that choose the kinds."""
    pred, target = make_batch(device=impl.device, ignored=0.2)
    target.requires_grad_()
    loss = impl.loss(pred, target, ignore_value=-1.0, reduction="positive")
    loss.backward()
    assert torch.equal(target.grad, -pred.grad)
    assert target.grad[:, -1].count_nonzero() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stats_are_detached_sums_before_any_division(impl: Implementation, reduction: str) -> None:
    pred, target = make_batch(device=impl.device, ignored=0.2)
    settings = {"negative_weight": 0.2, "coord_weight": 5.0, "ignore_value": -1.0}
    loss, stats = impl.loss(pred, target, reduction=reduction, return_stats=True, **settings)
    assert isinstance(stats, fcrn_fused.FCRNLossStats)
    assert stats._fields == ("coord", "positive_conf", "negative_conf", "num_positive")
    for part in stats:
        assert part.shape == ()
        assert not part.requires_grad
        assert part.device == pred.device
    assert stats.num_positive.dtype == torch.int64
    total = impl.loss(pred, target, reduction="sum", **settings)
    parts = stats.coord + stats.positive_conf + stats.negative_conf
    torch.testing.assert_close(parts, total.detach())
    assert loss.requires_grad


def test_stats_do_not_change_the_loss_or_the_gradient(impl: Implementation) -> None:
    for reduction in REDUCTIONS:
        grads, losses = [], []
        for return_stats in (False, True):
            pred, target = make_batch(device=impl.device)
            result = impl.loss(pred, target, reduction=reduction, return_stats=return_stats)
            loss = result[0] if return_stats else result
            loss.sum().backward()
            losses.append(loss.detach())
            grads.append(pred.grad)
        assert torch.equal(*losses)
        assert torch.equal(*grads)


def test_a_loss_of_confidence_alone(impl: Implementation) -> None:
    """C = 1: no pose maps, whatever form coord_weight has."""
    pred, target = make_batch((3, 1, 4, 4), device=impl.device)
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.1)
    for coord_weight in (1.0, [], (), torch.empty(0, device=impl.device), 3.0):
        loss = impl.loss(pred, target, negative_weight=0.1, coord_weight=coord_weight)
        assert_loss(loss, truth.loss, torch.float32)


def test_a_new_scalar_reduction_is_one_line(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry in DIVISORS is all: checks, loss, gradients and second derivatives follow it."""
    monkeypatch.setitem(DIVISORS, "cellsum", lambda pred: pred.numel() // pred.shape[1])
    for dtype in DTYPES:
        pred, target = make_batch((2, 3, 4, 5), dtype=dtype, device=impl.device)
        target.requires_grad_()
        grads = []
        for reduction, divisor in (("cellsum", 1), ("sum", 40)):
            loss = impl.loss(pred, target, reduction=reduction, negative_weight=0.3) / divisor
            first = torch.autograd.grad(3 * loss, (pred, target), retain_graph=True)
            (grad,) = torch.autograd.grad(3 * loss, pred, create_graph=True)
            grads.append([loss, *first, *torch.autograd.grad(grad.sum(), pred)])
        torch.testing.assert_close(*grads)
