"""How near the truth: gradients in ulps, the loss of 10^8 elements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batches import DTYPES, SCALAR_REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import GRADIENT_ULPS, LOSS_RTOL, assert_gradient, assert_loss, ulps_apart

import fcrn_fused

SETTINGS = {
    "negative_weight": 0.013,
    "positive_weight": 1.3,
    "coord_weight": [0.1, 0.3, 0.7, 1.1, 3.3, 5.7],
    "ignore_value": -1.0,
}


def formula(
    pred: torch.Tensor, target: torch.Tensor, reduction: str, grad_output: float
) -> np.ndarray:
    """dloss/dpred in extended precision, for C = 7 and SETTINGS."""
    p, t = (each.detach().cpu().double().numpy().astype(np.longdouble) for each in (pred, target))
    confidence = t[:, -1:]
    weight = np.zeros(p.shape, np.longdouble)
    coord = np.array(SETTINGS["coord_weight"], np.longdouble).reshape(1, 6, 1, 1)
    weight[:, :-1] = np.where(confidence > 0, coord, 0)
    weight[:, -1:] = np.where(
        confidence > 0,
        np.longdouble(SETTINGS["positive_weight"]),
        np.longdouble(SETTINGS["negative_weight"]),
    )
    weight = np.where(confidence == SETTINGS["ignore_value"], 0, weight)
    divisor = {
        "mean": p.size,
        "sum": 1,
        "batchmean": p.shape[0],
        "positive": int((confidence > 0).sum()),
    }[reduction]
    return 2 * weight * (p - t) * np.longdouble(grad_output) / divisor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
@pytest.mark.parametrize("grad_output", [1.0, 0.7, 1234.5])
def test_gradients_in_ulps(
    impl: Implementation, reduction: str, dtype: torch.dtype, grad_output: float
) -> None:
    """Sixty thousand elements, divisors and weights that no binary fraction holds."""
    pred, target = make_batch(
        (3, 7, 53, 57), dtype=dtype, device=impl.device, positives=0.4, ignored=0.1
    )
    loss = impl.loss(pred, target, reduction=reduction, **SETTINGS)
    upstream = torch.tensor(grad_output, dtype=loss.dtype, device=impl.device)
    (grad,) = torch.autograd.grad(loss, pred, upstream)
    assert_gradient(grad, formula(pred, target, reduction, upstream.item()), dtype)


ODD_PLANES = (300, 7, 13, 13)  # chunks of cells end inside of an image
PAST_THE_CACHES = (24, 7, 131, 127)  # two million elements
LARGE = [
    *itertools.product(
        [ODD_PLANES],
        [
            (torch.float32, "mean"),
            (torch.float32, "cell"),
            (torch.float32, "none"),
            (torch.bfloat16, "positive"),
            (torch.float16, "none"),
            (torch.float64, "mean"),
        ],
        ["contiguous", "channels_last", "strided", "misaligned"],
    ),
    *itertools.product(
        [PAST_THE_CACHES],
        [(torch.float32, "mean"), (torch.bfloat16, "positive"), (torch.float32, "none")],
        ["contiguous", "misaligned"],
    ),
    ((1, 7, 300_007), (torch.float32, "mean"), "contiguous"),
]


@pytest.mark.parametrize(("shape", "dtype_and_reduction", "layout"), LARGE, ids=str)
def test_large_tensors_of_every_layout(
    fused: Implementation,
    shape: tuple[int, ...],
    dtype_and_reduction: tuple[torch.dtype, str],
    layout: str,
) -> None:
    """Several threads, vectors and their tails, stores past the caches."""
    dtype, reduction = dtype_and_reduction
    settings = {"negative_weight": 0.25, "ignore_value": -1.0, "reduction": reduction}
    pred, target = make_batch(
        shape, dtype=dtype, device=fused.device, positives=0.05, ignored=0.05, requires_grad=False
    )
    if layout == "channels_last":
        pred, target = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (pred, target))
    elif layout == "strided":
        pred = torch.stack([pred, torch.full_like(pred, torch.nan)], -1)[..., 0]
    elif layout == "misaligned":
        store = pred.new_empty(pred.numel() + 3)
        pred = store[3:].view(shape).copy_(pred)
    pred.requires_grad_()
    loss = fused.loss(pred, target, **settings)
    wide = [tensor.detach().double().contiguous().requires_grad_() for tensor in (pred, target)]
    want = fcrn_fused.reference.fcrn_loss(*wide, **settings)
    torch.testing.assert_close(loss.double(), want, rtol=LOSS_RTOL[loss.dtype], atol=0)
    for scale in (1.0, 0.7):
        upstream = torch.full_like(loss, scale)
        (grad,) = torch.autograd.grad(loss, pred, upstream, retain_graph=True)
        (want_grad,) = torch.autograd.grad(want, wide[0], upstream.double(), retain_graph=True)
        error = (grad.double() - want_grad).abs()
        # float16's mean is in its subnormals, where an ulp is not relative
        allowed = GRADIENT_ULPS[dtype] * torch.finfo(dtype).eps * want_grad.abs()
        assert (error <= allowed.clamp(min=torch.finfo(dtype).smallest_normal * 2**-9)).all()
        assert ((grad == 0) == (want_grad == 0)).double().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_nearly_equal_numbers(impl: Implementation, dtype: torch.dtype) -> None:
    """pred within a few ulps of target: the difference must not be rounded twice."""
    generator = torch.Generator().manual_seed(1)
    target = torch.rand((2, 7, 24, 24), generator=generator, dtype=torch.float64).to(dtype)
    steps = torch.randint(-4, 5, target.shape, generator=generator).double()
    pred = (target.double() * (1 + steps * torch.finfo(dtype).eps)).to(dtype)
    pred, target = pred.to(impl.device).requires_grad_(), target.to(impl.device)
    impl.loss(pred, target, reduction="sum", **SETTINGS).backward()
    assert_gradient(pred.grad, formula(pred, target, "sum", 1.0), dtype)
    assert pred.grad.count_nonzero() > 0.5 * pred.numel()


@pytest.mark.parametrize("exponent", [-12, -6, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_small_and_large_numbers(
    impl: Implementation, dtype: torch.dtype, exponent: int
) -> None:
    pred, target = make_batch(dtype=dtype, device=impl.device, requires_grad=False)
    pred = (pred * 10.0**exponent).requires_grad_()
    target[:, :-1] *= 10.0**exponent
    impl.loss(pred, target, **SETTINGS).backward()
    assert_gradient(pred.grad, formula(pred, target, "mean", 1.0), dtype)


def test_the_yardstick_sees_one_ulp_too_many() -> None:
    """`assert_gradient` itself: what is allowed passes, one step more does not."""
    for dtype, allowed in GRADIENT_ULPS.items():
        want = np.array([1.0, -3.0, 0.0, 1e-3], np.longdouble)
        right = torch.tensor([1.0, -3.0, 0.0, 1e-3], dtype=torch.float64).to(dtype)
        assert_gradient(right, want, dtype)
        eps = torch.finfo(dtype).eps
        for steps, passes in ((allowed, True), (allowed + 1, False)):
            off = right.clone()
            off[0] = 1 + steps * eps
            assert (ulps_apart(off, want).max() <= allowed) == passes
        wrong_zero = right.clone()
        wrong_zero[2] = torch.finfo(dtype).smallest_normal
        with pytest.raises(AssertionError, match="too far"):
            assert_gradient(wrong_zero, want, dtype)
        with pytest.raises(AssertionError, match="too far"):
            assert_gradient(right * torch.nan, want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["random", "constant"])
@pytest.mark.parametrize("share", [0.02, 1.1], ids=["2% positive", "all positive"])
def test_float32_loss_of_a_hundred_million_elements(
    impl: Implementation, pattern: str, share: float
) -> None:
    """The same image over and over, so that its float64 loss, times their number, is the truth.

    A constant error is the worst case of a naive float32 sum: the sum stops growing.
    """
    repeats = 100 if impl.is_fused else 10  # plain PyTorch takes several times the memory
    pred, target = make_batch((1, 7, 378, 378), positives=share, requires_grad=False)
    if pattern == "constant":
        pred = target + 0.1
    truth = sum_in_float64(pred, target)
    pred, target = (
        tensor.to(impl.device).expand(repeats, -1, -1, -1).contiguous() for tensor in (pred, target)
    )
    assert pred.numel() == repeats * 1_000_188
    with torch.no_grad():
        for reduction, divisor in (("sum", 1), ("mean", pred.numel())):
            loss, stats = impl.loss(
                pred, target, reduction=reduction, negative_weight=0.01, return_stats=True
            )
            assert_loss(loss, repeats * truth / divisor, torch.float32)
            parts = stats.coord + stats.positive_conf + stats.negative_conf
            assert_loss(parts, repeats * truth, torch.float32)
            assert stats.num_positive.item() == int((target[0, -1] > 0).sum()) * repeats


def sum_in_float64(pred: torch.Tensor, target: torch.Tensor) -> float:
    squared = (pred.double() - target.double()) ** 2
    positive = target[:, -1:] > 0
    weight = torch.where(positive, 1.0, 0.0).double().expand(squared.shape).clone()
    weight[:, -1:] = torch.where(positive, 1.0, 0.01)
    return float((weight * squared).sum())


def test_a_naive_float32_sum_would_fail() -> None:
    """The test above can fail: adding one after the other loses 1e-6 long before 10^8."""
    terms = np.full(10**7, 0.01, np.float32)
    naive = np.add.accumulate(terms, dtype=np.float32)[-1]
    assert abs(naive / (0.01 * 10**7) - 1) > 100 * LOSS_RTOL[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_loss_of_halves_is_summed_as_well(impl: Implementation, dtype: torch.dtype) -> None:
    pred, target = make_batch((8, 7, 128, 128), dtype=dtype, device=impl.device)
    loss = impl.loss(pred, target, reduction="sum", negative_weight=0.01)
    assert_loss(loss, sum_in_float64(pred.detach(), target), torch.float32)


def test_positive_cells_are_counted_beyond_the_integers_of_float32(impl: Implementation) -> None:
    cells = 2**24 + 3
    target = torch.ones((1, 1, cells), dtype=torch.float16, device=impl.device)
    pred = torch.zeros_like(target)
    with torch.no_grad():
        loss, stats = impl.loss(pred, target, reduction="positive", return_stats=True)
    assert stats.num_positive.item() == cells
    assert loss.item() == 1
