"""Hypothesis strategies for calls of the loss, for layouts and for weights in tensors."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import torch
from batches import DTYPES, REDUCTIONS


@st.composite
def shapes(draw: st.DrawFn, max_cells: int = 60) -> tuple[int, ...]:
    batch = draw(st.integers(0, 3))
    maps = draw(st.integers(1, 8))
    space: list[int] = []
    for _ in range(draw(st.integers(0, 3))):
        room = max(1, max_cells // max(1, math.prod(space)))
        space.append(draw(st.integers(0, min(room, 40))))
    return (batch, maps, *space)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any]:
    """How a tensor lies in memory: order of dimensions, gaps, offset, dimensions of stride 0."""
    dims = len(shape)
    return {
        "order": draw(
            st.one_of(
                st.just(tuple(range(dims))),
                st.just((0, *range(2, dims), 1)[:dims]),
                st.permutations(range(dims)).map(tuple),
            )
        ),
        "steps": draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=dims, max_size=dims)),
        "offset": draw(st.integers(0, 9)),
        "expanded": draw(st.sets(st.integers(0, max(0, dims - 1)), max_size=1)),
    }


WEIGHTS = st.one_of(
    st.sampled_from([0.0, 0.01, 1.0]),
    st.floats(1e-3, 1e3, allow_nan=False),
)


@st.composite
def any_call(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(shapes())
    maps = shape[1]
    ignore_value = draw(st.sampled_from([None, None, -1.0, 0.0, 0.5, 0.1, 255]))
    return {
        "shape": shape,
        "pred_dtype": draw(st.sampled_from(DTYPES)),
        "target_dtype": draw(st.sampled_from(DTYPES)),
        "pred_layout": draw(layouts(shape)),
        "target_layout": draw(layouts(shape)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "positives": draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        "poisoned": draw(st.booleans()),
        "magnitude": draw(st.sampled_from([1.0, 1e-2, 30.0])),
        "grad_output": draw(st.sampled_from([1.0, 0.5, -3.0, 100.0, 1.7])),
        "settings": {
            "reduction": draw(st.sampled_from(REDUCTIONS)),
            "negative_weight": draw(WEIGHTS),
            "positive_weight": draw(WEIGHTS),
            "coord_weight": draw(
                st.one_of(WEIGHTS, st.lists(WEIGHTS, min_size=maps - 1, max_size=maps - 1))
            ),
            "ignore_value": ignore_value,
        },
        "weights_in_tensors": draw(st.booleans()),
    }


@st.composite
def given_weights(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """None, or a weight (`calls.given_tensor`) that is broadcast to a shape."""
    kind = draw(st.sampled_from(["none", "0-dim", "full", "some", "some", "some"]))
    if kind == "none":
        return None
    repeated = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    if kind == "full":
        repeated = [False] * len(shape)
    given = tuple(1 if r else size for size, r in zip(shape, repeated, strict=True))
    given = () if kind == "0-dim" else given
    return {
        "shape": given,
        "dtype": draw(st.sampled_from((torch.bool, *DTYPES))),
        "layout": draw(layouts(given)),
        "zeros": draw(st.sampled_from([0.0, 0.3, 0.95, 1.0])),
    }


@st.composite
def given_kinds(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """None, or a `positive` (`calls.given_tensor`) that is broadcast to the cells of a shape."""
    plan = draw(given_weights((shape[0], 1, *shape[2:])))
    return {**plan, "dtype": torch.bool} if plan and plan["shape"] else None
