"""torch.func transforms and forward-mode AD: "auto" is the reference, "fused" refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from batches import REDUCTIONS, make_batch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fcrn_fused

SHAPE = (2, 3, 2, 3)
SETTINGS = {"negative_weight": 0.3, "coord_weight": [0.5, 2.0], "ignore_value": -1.0}


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """None of these is worth a warning, the first of the process included."""
    before = fcrn_fused.functional._warned
    fcrn_fused.functional._warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    fcrn_fused.functional._warned = before


def batch(device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return make_batch(
        SHAPE, dtype=torch.float64, device=device, ignored=0.2, requires_grad=False, seed=seed
    )


def by_autograd(pred: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    pred, target = (x.detach().clone().requires_grad_() for x in (pred, target))
    loss = fcrn_fused.reference.fcrn_loss(pred, target, **settings)
    return torch.autograd.grad(loss.sum(), (pred, target))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_and_vjp(device: str, reduction: str) -> None:
    pred, target = batch(device)
    settings = {**SETTINGS, "reduction": reduction}

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, **settings).sum()

    want = by_autograd(pred, target, **settings)
    torch.testing.assert_close(grad(loss, argnums=(0, 1))(pred, target), want)
    value, pull_back = vjp(loss, pred, target)
    torch.testing.assert_close(pull_back(torch.ones_like(value)), want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_jvp_and_linearize(device: str, reduction: str) -> None:
    pred, target = batch(device)
    tangents = batch(device, seed=1)[0], torch.zeros_like(target)

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, reduction=reduction, **SETTINGS)

    value, tangent = jvp(loss, (pred, target), tangents)
    torch.testing.assert_close(
        value, fcrn_fused.reference.fcrn_loss(pred, target, reduction=reduction, **SETTINGS)
    )
    grad_pred, _ = by_autograd(pred, target, reduction=reduction, **SETTINGS)
    torch.testing.assert_close(tangent.sum(), (grad_pred * tangents[0]).sum())
    _, pushed = linearize(loss, pred, target)
    torch.testing.assert_close(pushed(*tangents), tangent)


def test_forward_mode_ad_of_pred_and_of_target(device: str) -> None:
    pred, target = batch(device)
    direction = batch(device, seed=1)[0]
    grad_pred, grad_target = by_autograd(pred, target, **SETTINGS)
    with forward_ad.dual_level():
        loss = fcrn_fused.fcrn_loss(forward_ad.make_dual(pred, direction), target, **SETTINGS)
        tangent = forward_ad.unpack_dual(loss).tangent
        torch.testing.assert_close(tangent, (grad_pred * direction).sum())
        loss = fcrn_fused.fcrn_loss(pred, forward_ad.make_dual(target, direction), **SETTINGS)
        tangent = forward_ad.unpack_dual(loss).tangent
        torch.testing.assert_close(tangent, (grad_target * direction).sum())


def test_jacobians_and_hessian(device: str) -> None:
    pred, target = batch(device)

    def each(pred: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, reduction="none", **SETTINGS)

    def total(pred: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, reduction="sum", **SETTINGS)

    grad_pred, _ = by_autograd(pred, target, reduction="sum", **SETTINGS)
    diagonal = torch.diag(grad_pred.flatten()).view(*SHAPE, *SHAPE)
    torch.testing.assert_close(jacrev(each)(pred), diagonal)
    torch.testing.assert_close(jacfwd(each)(pred), diagonal)
    # d2E/dpred2 = 2 w = (dE/dpred) / (pred - target) where the element is part of the computation
    counted = grad_pred != 0
    curvature = torch.where(counted, grad_pred / torch.where(counted, pred - target, 1), 0)
    torch.testing.assert_close(
        hessian(total)(pred), torch.diag(curvature.flatten()).view(*SHAPE, *SHAPE)
    )


def test_vmap_over_examples(device: str) -> None:
    preds = torch.stack([batch(device, seed)[0] for seed in range(4)])
    targets = torch.stack([batch(device, seed)[1] for seed in range(4)])

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, reduction="positive", **SETTINGS)

    want = torch.stack([loss(*pair) for pair in zip(preds, targets, strict=True)])
    torch.testing.assert_close(vmap(loss)(preds, targets), want)
    torch.testing.assert_close(
        vmap(loss, in_dims=(1, None))(preds.transpose(0, 1), targets[0]),
        torch.stack([loss(pred, targets[0]) for pred in preds]),
    )
    per_example = vmap(grad(loss))(preds, targets)
    each = [
        by_autograd(*pair, reduction="positive", **SETTINGS)[0]
        for pair in zip(preds, targets, strict=True)
    ]
    torch.testing.assert_close(per_example, torch.stack(each))


def test_vmap_over_negative_weights(device: str) -> None:
    pred, target = batch(device)
    weights = torch.tensor([0.01, 0.1, 1.0], device=device, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return fcrn_fused.fcrn_loss(pred, target, negative_weight=weight)

    torch.testing.assert_close(vmap(loss)(weights), torch.stack([loss(w) for w in weights]))


def test_stats_under_a_transform(device: str) -> None:
    pred, target = batch(device)

    def loss(pred: Tensor) -> tuple[Tensor, Tensor]:
        value, stats = fcrn_fused.fcrn_loss(pred, target, return_stats=True, **SETTINGS)
        return value, stats.num_positive

    gradient, num_positive = grad(loss, has_aux=True)(pred)
    torch.testing.assert_close(gradient, by_autograd(pred, target, **SETTINGS)[0])
    assert num_positive == (target[:, -1] > 0).sum()


def test_a_module_with_functional_call(device: str) -> None:
    pred, target = batch(device)
    module = fcrn_fused.FCRNLoss(negative_weight=0.3).to(device)
    buffers = {"negative_weight": torch.tensor(0.7, device=device)}

    def loss(pred: Tensor) -> Tensor:
        return functional_call(module, buffers, (pred, target))

    want, _ = by_autograd(pred, target, negative_weight=buffers["negative_weight"])
    torch.testing.assert_close(grad(loss)(pred), want)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda loss, pred: grad(loss)(pred),
    "vmap": lambda loss, pred: vmap(loss)(torch.stack([pred, pred])),
    "jvp": lambda loss, pred: jvp(loss, (pred,), (pred,)),
    "jacrev": lambda loss, pred: jacrev(loss)(pred),
    "jacfwd": lambda loss, pred: jacfwd(loss)(pred),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_fused_refuses_a_transform(
    device: str, transform: Callable[[Callable[[Tensor], Tensor], Tensor], object]
) -> None:
    pred, target = batch(device)
    with pytest.raises(RuntimeError, match=r"fused.*torch\.func"):
        transform(lambda p: fcrn_fused.fcrn_loss(p, target, backend="fused"), pred)


@pytest.mark.parametrize("which", ["pred", "target"])
def test_fused_refuses_forward_mode(device: str, which: str) -> None:
    pred, target = batch(device)
    with forward_ad.dual_level():
        if which == "pred":
            pred = forward_ad.make_dual(pred, torch.ones_like(pred))
        else:
            target = forward_ad.make_dual(target, torch.ones_like(target))
        with pytest.raises(RuntimeError, match=r"fused.*forward-mode"):
            fcrn_fused.fcrn_loss(pred, target, backend="fused")


def test_a_dual_level_without_a_dual_tensor_changes_nothing(impl: Any) -> None:
    pred, target = batch(impl.device)
    with forward_ad.dual_level():
        loss = impl.loss(pred, target, **SETTINGS)
    torch.testing.assert_close(loss, fcrn_fused.reference.fcrn_loss(pred, target, **SETTINGS))


def test_tensor_that_leaked_out_of_a_transform() -> None:
    """What a transform left behind is an ordinary tensor again, its gradient goes on."""
    weight = torch.randn(2, 7, 4, 4, requires_grad=True)
    target = torch.rand(2, 7, 4, 4)
    leaked: list[Tensor] = []

    def leaks(x: Tensor) -> Tensor:
        leaked.append(x * weight)
        return leaked[0].sum()

    x = torch.randn(2, 7, 4, 4)
    torch.func.grad(leaks)(x)
    fcrn_fused.fcrn_loss(leaked[0], target).backward()
    got, weight.grad = weight.grad, None
    fcrn_fused.fcrn_loss(x * weight, target).backward()
    assert got is not None
    torch.testing.assert_close(got, weight.grad)
