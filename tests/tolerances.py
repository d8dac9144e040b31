"""How near to the truth is near enough, by dtype: the figures of the contract, in one place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Gradients against the formula in extended precision, in units in the last place of their own.
GRADIENT_ULPS = {torch.float64: 4, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}

# Losses and stats, which are sums of terms that are not negative, relative to the exact sum.
LOSS_RTOL = {torch.float64: 1e-14, torch.float32: 1e-6}


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance of the neighbouring numbers of `dtype` at each value."""
    info = torch.finfo(dtype)
    smallest_exponent = round(float(np.log2(info.smallest_normal)))
    _, exponent = np.frexp(np.where(np.isfinite(values), values, 1))
    exponent = np.maximum(exponent - 1, smallest_exponent)
    return np.ldexp(np.longdouble(info.eps), exponent)


def ulps_apart(got: Tensor, want: np.ndarray) -> np.ndarray:
    """How many units in the last place of got's dtype it lies from `want`, element by element.

    0 where both are the same NaN or infinity, infinite where only one of them is; a `want` too
    large for the dtype may have become the infinity of its sign.
    """
    # by way of float64, which holds every value of the others
    got_values = got.detach().cpu().double().numpy().astype(np.longdouble)
    assert got_values.shape == want.shape, f"shape {got_values.shape}, expected {want.shape}"
    largest = np.longdouble(torch.finfo(got.dtype).max)
    overflown = np.isinf(got_values) & (np.abs(want) > largest) & (got_values * want > 0)
    same = (got_values == want) | (np.isnan(got_values) & np.isnan(want)) | overflown
    with np.errstate(invalid="ignore"):
        distance = np.abs(got_values - want) / ulp(want, got.dtype)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    # an exact zero of the formula is a promise
    distance = np.where((want == 0) & (got_values != 0), np.inf, distance)
    return np.where(same, 0, distance)


def assert_gradient(got: Tensor | None, want: np.ndarray, dtype: torch.dtype) -> None:
    """`got` has the dtype and lies within the ulps that the contract allows; zeros are exact."""
    assert got is not None, "no gradient"
    assert got.dtype == dtype, f"gradient of {got.dtype}, expected {dtype}"
    distance = ulps_apart(got, want)
    if distance.size == 0:
        return
    worst = np.unravel_index(np.argmax(distance), distance.shape)
    allowed = GRADIENT_ULPS[dtype]
    assert distance[worst] <= allowed, (
        f"gradient at {tuple(map(int, worst))} is {got[worst].item()!r}, expected "
        f"{float(want[worst])!r}: {float(distance[worst]):.2f} ulp apart, {allowed} allowed; "
        f"{int((distance > allowed).sum())} of {distance.size} elements are too far"
    )


def assert_loss(got: Tensor, want: np.ndarray | float, dtype: torch.dtype) -> None:
    """`got` has the dtype and lies within the relative error that the contract allows."""
    assert got.dtype == dtype, f"loss of {got.dtype}, expected {dtype}"
    np.testing.assert_allclose(
        got.detach().cpu().double().numpy(),
        np.asarray(want, dtype=np.float64),
        rtol=LOSS_RTOL[dtype],
        atol=torch.finfo(dtype).tiny,
        equal_nan=True,
    )


def loss_dtype(pred: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The wider of the two dtypes, at least float32."""
    return torch.float64 if torch.float64 in (pred, target) else torch.float32
