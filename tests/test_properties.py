"""Hypothesis over shapes, strides, dtypes, kinds of cells and weights, against the loops."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import torch
from calls import check_call, tensors_of
from hypothesis import example, given
from implementations import Implementation
from strategies import any_call, shapes

import fcrn_fused


@given(call=any_call())
def test_any_call_against_the_loops(impl: Implementation, call: dict[str, Any]) -> None:
    check_call(impl, call)


@given(call=any_call())
@example(
    call={
        "shape": (1, 2, 3),
        "pred_dtype": torch.float64,
        "target_dtype": torch.float64,
        "pred_layout": {"order": (0, 2, 1), "steps": [1, 1, 1], "offset": 1, "expanded": set()},
        "target_layout": {"order": (0, 1, 2), "steps": [1, 2, 1], "offset": 0, "expanded": {0}},
        "seed": 1,
        "positives": 0.3,
        "poisoned": True,
        "magnitude": 1.0,
        "grad_output": 1.0,
        "settings": {
            "reduction": "mean",
            "negative_weight": 0.5,
            "positive_weight": 1.0,
            "coord_weight": 1.0,
            "ignore_value": -1.0,
        },
        "weights_in_tensors": False,
    }
)
def test_second_derivatives_against_the_reference(
    fused: Implementation, call: dict[str, Any]
) -> None:
    """A gradient penalty through any layout, in float64 beside the reference's own."""
    call = {**call, "pred_dtype": torch.float64, "target_dtype": torch.float64}
    results = []
    for loss in (fused.loss, fcrn_fused.reference.fcrn_loss):
        pred, target = tensors_of(call, fused.device)
        pred.requires_grad_()
        value = loss(pred, target, **call["settings"])
        (grad,) = torch.autograd.grad(value.sum(), pred, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), pred)
        results.append(second)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-300)


@given(
    shape=shapes(max_cells=200),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_images_and_maps_does_not_matter(
    impl: Implementation, shape: tuple[int, ...], seed: int, order: Any
) -> None:
    """Permuted images, and pose maps permuted with their weights, have permuted gradients."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=generator, dtype=torch.float64).to(impl.device)
    target = torch.randn(shape, generator=generator, dtype=torch.float64).to(impl.device)
    weights = [1.0 + j for j in range(shape[1] - 1)]
    images = list(range(shape[0]))
    maps = list(range(shape[1] - 1))
    order.shuffle(images)
    order.shuffle(maps)
    channels = [*maps, shape[1] - 1]
    pred.requires_grad_()
    plain = impl.loss(pred, target, coord_weight=weights, reduction="sum")
    (grad,) = torch.autograd.grad(plain, pred)
    permuted = impl.loss(
        pred[images][:, channels],
        target[images][:, channels],
        coord_weight=[weights[j] for j in maps],
        reduction="sum",
    )
    torch.testing.assert_close(permuted, plain)
    (grad_permuted,) = torch.autograd.grad(permuted, pred)
    torch.testing.assert_close(grad_permuted, grad, rtol=1e-14, atol=0)


@given(seed=st.integers(0, 2**32 - 1), weight=st.floats(0, 100), batch=st.integers(1, 5))
def test_the_loss_is_linear_in_its_weights_and_additive_over_images(
    impl: Implementation, seed: int, weight: float, batch: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn((batch, 4, 9), generator=generator, dtype=torch.float64).to(impl.device)
    target = torch.randn((batch, 4, 9), generator=generator, dtype=torch.float64).to(impl.device)
    parts = [
        impl.loss(
            pred[i : i + 1], target[i : i + 1], negative_weight=weight, reduction="sum"
        ).item()
        for i in range(batch)
    ]
    whole, stats = impl.loss(
        pred, target, negative_weight=weight, reduction="sum", return_stats=True
    )
    assert math.isclose(whole.item(), sum(parts), rel_tol=1e-12)
    with_one = impl.loss(pred, target, reduction="sum", return_stats=True)[1]
    assert math.isclose(
        stats.negative_conf.item(),
        weight * with_one.negative_conf.item(),
        rel_tol=1e-12,
        abs_tol=1e-300,
    )
    assert torch.equal(stats.coord, with_one.coord)
