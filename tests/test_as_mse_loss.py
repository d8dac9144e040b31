"""Under autograd as `F.mse_loss`: batched gradients, changes in place, saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from counting import passes
from implementations import Implementation
from tolerances import assert_gradient
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

SHAPE = (2, 3, 2, 3)
SETTINGS = {"negative_weight": 0.3, "coord_weight": [0.5, 2.0], "ignore_value": -1.0}


def batch(device: str) -> tuple[Tensor, Tensor]:
    pred, target = make_batch(SHAPE, dtype=torch.float64, device=device, ignored=0.2)
    return pred, target.requires_grad_()


# ---- several gradients at once ------------------------------------------------------------------


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_grads_batched(impl: Implementation, reduction: str, stats: bool) -> None:
    """At the first and at the second call, for both inputs: what a loop gives."""
    pred, target = batch(impl.device)
    loss = impl.loss(pred, target, reduction=reduction, return_stats=stats, **SETTINGS)
    loss = loss[0] if stats else loss
    grad_outputs = torch.randn(4, *loss.shape, dtype=torch.float64).to(impl.device)
    first, second = (
        torch.autograd.grad(
            loss, (pred, target), grad_outputs, is_grads_batched=True, retain_graph=True
        )
        for _ in range(2)
    )
    each = [torch.autograd.grad(loss, (pred, target), v, retain_graph=True) for v in grad_outputs]
    want = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_grads_batched_in_other_dtypes(impl: Implementation, dtype: torch.dtype) -> None:
    pred, target = make_batch(SHAPE, dtype=dtype, target_dtype=torch.float32, device=impl.device)
    target.requires_grad_()
    loss = impl.loss(pred, target, reduction="sum")
    grad_outputs = torch.tensor([1.0, -3.0], device=impl.device)
    grads = torch.autograd.grad(loss, (pred, target), grad_outputs, is_grads_batched=True)
    for i, scale in enumerate((1.0, -3.0)):
        truth = oracle.fcrn_loss(pred, target, reduction="sum", grad_output=scale)
        assert_gradient(grads[0][i], truth.grad, dtype)
        assert_gradient(grads[1][i], -truth.grad, torch.float32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("derivative", [jacobian, hessian], ids=["jacobian", "hessian"])
def test_vectorized_derivatives(
    impl: Implementation, derivative: Callable[..., Any], reduction: str
) -> None:
    pred, target = (x.detach() for x in batch(impl.device))

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        value = impl.loss(pred, target, reduction=reduction, **SETTINGS)
        return value.sum() if derivative is hessian else value

    want = derivative(loss, (pred, target))
    got = derivative(loss, (pred, target), vectorize=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_over_autograd_grad(impl: Implementation, reduction: str) -> None:
    pred, target = batch(impl.device)
    loss = impl.loss(pred, target, reduction=reduction, **SETTINGS)
    grad_outputs = torch.randn(4, *loss.shape, dtype=torch.float64).to(impl.device)

    def gradient(grad_output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (pred, target), grad_output, retain_graph=True)

    got = torch.vmap(gradient)(grad_outputs)  # first, when the gradient of forward is still there
    each = [gradient(grad_output) for grad_output in grad_outputs]
    want = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
    torch.testing.assert_close(got, want)


# ---- changed in place ---------------------------------------------------------------------------


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("grad_output", [1.0, 2.0])
@pytest.mark.parametrize("which", ["pred", "target"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_input_changed_in_place_is_an_error(
    fused: Implementation, reduction: str, which: str, grad_output: float, retain_graph: bool
) -> None:
    """Whatever comes from above; with a graph that is retained also at the second backward."""
    leaf, target = make_batch(device=fused.device)
    pred = leaf * 1
    loss = fused.loss(pred, target, reduction=reduction)
    v = torch.full_like(loss, grad_output)
    if retain_graph:
        torch.autograd.grad(loss, leaf, v, retain_graph=True)
    with torch.no_grad():
        {"pred": pred, "target": target}[which].mul_(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf, v, retain_graph=True)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("grad_output", [1.0, 3.0])
@pytest.mark.parametrize("name", ["negative_weight", "coord_weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_changed_in_place_gives_the_gradient_of_forward(
    impl: Implementation, reduction: str, name: str, grad_output: float, stats: bool
) -> None:
    """Or PyTorch's error, never another value: first and second backward, both inputs."""
    pred, target = make_batch(device=impl.device)
    target.requires_grad_()
    weight = torch.tensor(0.5, device=impl.device)
    loss = impl.loss(pred, target, reduction=reduction, return_stats=stats, **{name: weight})
    loss = loss[0] if stats else loss
    truth = oracle.fcrn_loss(
        pred, target, reduction=reduction, grad_output=grad_output, **{name: 0.5}
    )
    weight.fill_(7.0)
    for _ in range(2):
        try:
            grads = torch.autograd.grad(
                loss, (pred, target), torch.full_like(loss, grad_output), retain_graph=True
            )
        except RuntimeError as error:
            assert not impl.is_fused
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            assert_gradient(grads[0], truth.grad, torch.float32)
            assert_gradient(grads[1], -truth.grad, torch.float32)


def test_a_weight_changed_in_place_and_a_gradient_penalty(fused: Implementation) -> None:
    pred, target = make_batch(device=fused.device, dtype=torch.float64)
    penalties = []
    for changed in (False, True):
        weight = torch.tensor(0.5, device=fused.device)
        loss = fused.loss(pred, target, negative_weight=weight)
        if changed:
            weight.fill_(7.0)
        (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), pred)[0])
    torch.testing.assert_close(*penalties)


def test_two_forwards_with_an_annealed_weight_and_one_backward(impl: Implementation) -> None:
    """Accumulation over micro-batches with a schedule between; either each has its weight or
    PyTorch refuses."""
    pred, target = make_batch(device=impl.device)
    module = impl.module(negative_weight=0.25)
    first = module(pred, target)
    module.negative_weight.fill_(1.0)
    total = first + module(pred, target)
    want = sum(oracle.fcrn_loss(pred, target, negative_weight=w).grad for w in (0.25, 1.0))
    try:
        total.backward()
    except RuntimeError as error:
        assert not impl.is_fused
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(pred.grad.cpu(), torch.from_numpy(want.astype("float32")))


# ---- saved tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hooks_are_called_once_for_each_saved_tensor(fused: Implementation, reduction: str) -> None:
    pred, target = make_batch(device=fused.device)
    weight = torch.tensor(0.5, device=fused.device)
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach())
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked.append(index)
        return packed[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = fused.loss(pred, target, negative_weight=weight, reduction=reduction)
    assert len({tensor.data_ptr() for tensor in packed}) == len(packed)
    assert {pred.data_ptr(), target.data_ptr()} <= {tensor.data_ptr() for tensor in packed}
    (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, 2.0))
    assert sorted(unpacked) == list(range(len(packed)))
    truth = oracle.fcrn_loss(
        pred, target, negative_weight=0.5, reduction=reduction, grad_output=2.0
    )
    assert_gradient(grad, truth.grad, torch.float32)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, AttributeError, KeyError])
def test_an_exception_of_a_pack_hook_comes_out_as_it_is(
    fused: Implementation, error: type[Exception]
) -> None:
    pred, target = make_batch(device=fused.device)
    calls = []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise error("of the hook")

    def run() -> None:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            pytest.raises(error, match="of the hook"),
        ):
            fused.loss(pred, target)

    assert passes(run) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_exception_of_an_unpack_hook_comes_out_as_it_is(
    fused: Implementation, error: type[Exception]
) -> None:
    pred, target = make_batch(device=fused.device)
    calls = []

    def unpack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise error("of the hook")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), unpack):
        loss = fused.loss(pred, target)
    with pytest.raises(error, match="of the hook"):
        loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_save_on_cpu(impl: Implementation, reduction: str) -> None:
    pred, target = make_batch(device=impl.device)
    settings = {"reduction": reduction, "negative_weight": torch.tensor(0.5, device=impl.device)}
    with torch.autograd.graph.save_on_cpu():
        loss = impl.loss(pred, target, **settings)
    for scale in (1.0, 2.0):
        (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, scale), retain_graph=True)
        truth = oracle.fcrn_loss(pred, target, grad_output=scale, **settings)
        assert_gradient(grad, truth.grad, torch.float32)
