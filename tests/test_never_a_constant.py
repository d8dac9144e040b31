"""A program that was exported, traced or calls the operators has eager mode's gradient, or says so.

pytorch/pytorch#193279: a training step that was exported lost the gradient without a word.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fcrn_fused
from fcrn_fused import ops
from fcrn_fused.validation import Rule


class Step(torch.nn.Module):
    """A network, its loss and a second term, without which a constant would show at once."""

    def __init__(self, impl: Implementation, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Conv2d(3, 7, 4, 4)
        self.loss = impl.module(negative_weight=0.25, **settings)
        self.to(impl.device)

    def forward(self, picture: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(self.network(picture), target)
        return loss + 1e-3 * self.network.weight.square().sum()


def example(device: str, batch: int = 2) -> tuple[Tensor, Tensor]:
    picture = torch.rand((batch, 3, 16, 16), generator=torch.Generator().manual_seed(batch))
    return picture.to(device), make_batch((batch, 7, 4, 4), device=device, ignored=0.2)[1]


Program = Callable[[Tensor, Tensor], Tensor]


def gradients(program: Program, parameters: Any, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = program(*inputs)
    grads = torch.autograd.grad(loss, list(parameters), torch.full_like(loss, 3.0))
    return [loss.detach(), *grads]


# ---- torch.export and torch.jit.trace -----------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_exported_step_trains(impl: Implementation, reduction: str, strict: bool) -> None:
    step = Step(impl, reduction=reduction, ignore_value=-1.0)
    inputs = example(impl.device)
    want = gradients(step, step.parameters(), inputs)
    exported = torch.export.export(step, inputs, strict=strict).module()
    torch.testing.assert_close(gradients(exported, exported.parameters(), inputs), want)


def test_an_exported_step_of_any_batch_trains_from_a_file(impl: Implementation) -> None:
    step = Step(impl)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        step, example(impl.device), dynamic_shapes=({0: batch}, {0: batch})
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (2, 5):
        inputs = example(impl.device, size)
        want = gradients(step, step.parameters(), inputs)
        torch.testing.assert_close(gradients(loaded, loaded.parameters(), inputs), want)


@pytest.mark.parametrize("is_loaded", [False, True], ids=["traced", "loaded"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_of_jit_trace_trains(impl: Implementation, reduction: str, is_loaded: bool) -> None:
    """With batches of another size than the example's as well."""
    step = Step(impl, reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about shapes that are looked at
        traced = torch.jit.trace(step, example(impl.device))
        if is_loaded:
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
            buffer.seek(0)
            traced = torch.jit.load(buffer)
        for size in (2, 5):
            inputs = example(impl.device, size)
            want = gradients(step, step.parameters(), inputs)
            torch.testing.assert_close(gradients(traced, traced.parameters(), inputs), want)


# ---- make_fx ------------------------------------------------------------------------------------

MODES = ["real", "fake", "symbolic"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_loss_of_make_fx_can_be_differentiated(
    impl: Implementation, reduction: str, mode: str, needs_grad: bool
) -> None:
    """Also where it was traced with inputs that need no gradient."""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return impl.loss(pred, target, reduction=reduction, negative_weight=0.25)

    pred, target = make_batch(device=impl.device)
    target.requires_grad_()
    want = gradients(loss, (pred, target), (pred, target))
    sample = [x.detach().clone().requires_grad_(needs_grad) for x in (pred, target)]
    program = make_fx(loss, tracing_mode=mode)(*sample)
    torch.testing.assert_close(gradients(program, (pred, target), (pred, target)), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_of_make_fx_with_its_backward(
    impl: Implementation, reduction: str, mode: str
) -> None:
    """Forward and backward in one graph: the gradients are not those of the example's values."""

    def step(pred: Tensor, target: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        pred, target = (x.detach().requires_grad_() for x in (pred, target))
        loss = impl.loss(pred, target, reduction=reduction, negative_weight=0.25)
        return torch.autograd.grad(loss, (pred, target), grad_output.expand(loss.shape))

    def arguments(seed: int) -> tuple[Tensor, ...]:
        pred, target = make_batch(device=impl.device, requires_grad=False, seed=seed)
        return pred, target, torch.tensor(1.0 + seed, device=impl.device)

    program = make_fx(step, tracing_mode=mode)(*arguments(0))
    for seed in range(3):
        torch.testing.assert_close(program(*arguments(seed)), step(*arguments(seed)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_backward_of_make_fx_over_an_eager_forward(impl: Implementation, reduction: str) -> None:
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target, reduction=reduction)

    def backward(grad_output: Tensor) -> Tensor:
        return torch.autograd.grad(loss, pred, grad_output, retain_graph=True)[0]

    program = make_fx(backward)(torch.ones_like(loss))
    for scale in (1.0, 2.0):
        grad_output = torch.full_like(loss, scale)
        torch.testing.assert_close(program(grad_output), backward(grad_output))


# ---- the operators by themselves ----------------------------------------------------------------


def arguments_of(pred: Tensor, reduction: str, device: str) -> tuple[Any, ...]:
    weight = torch.tensor(0.25, device=device)
    return ops.op_arguments(pred, Rule(weight, 1.5, 2.0, -1.0, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_operator_forward_can_be_differentiated(fused: Implementation, reduction: str) -> None:
    pred, target = make_batch(device=fused.device, ignored=0.2)
    target.requires_grad_()
    settings = {
        "negative_weight": 0.25,
        "positive_weight": 1.5,
        "coord_weight": 2.0,
        "ignore_value": -1.0,
        "reduction": reduction,
    }
    want = gradients(lambda p, t: fused.loss(p, t, **settings), (pred, target), (pred, target))
    arguments = arguments_of(pred, reduction, fused.device)

    def operator(pred: Tensor, target: Tensor) -> Tensor:
        loss, *parts = torch.ops.fcrn_fused.forward(pred, target, *arguments)
        assert not any(part.requires_grad for part in parts)
        return loss

    torch.testing.assert_close(gradients(operator, (pred, target), (pred, target)), want)


def test_the_operator_forward_with_one_input_that_needs_a_gradient(fused: Implementation) -> None:
    for which in (0, 1):
        inputs = list(make_batch(device=fused.device, requires_grad=False))
        inputs[which].requires_grad_()
        arguments = arguments_of(inputs[0], "mean", fused.device)
        torch.ops.fcrn_fused.forward(*inputs, *arguments)[0].backward()
        assert inputs[which].grad.count_nonzero() > 0
        assert inputs[1 - which].grad is None


def test_the_operator_forward_and_a_weight_that_needs_a_gradient(fused: Implementation) -> None:
    """The weights are constants; there is no gradient of 0 for them."""
    pred, target = make_batch(device=fused.device)
    negative, *rest = arguments_of(pred, "mean", fused.device)
    loss = torch.ops.fcrn_fused.forward(pred, target, negative.requires_grad_(), *rest)[0]
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, negative)


@pytest.mark.parametrize("which", ["pred", "target", "grad_output"])
def test_the_pass_itself_refuses_what_needs_a_gradient(fused: Implementation, which: str) -> None:
    pred, target = make_batch(device=fused.device, requires_grad=False)
    grad_output = torch.ones((), device=fused.device)
    arguments = arguments_of(pred, "mean", fused.device)
    grad = torch.empty_like(pred)
    given = (grad_output, pred, target, *arguments, None, False, False, grad)
    torch.ops.fcrn_fused.backward_into(*given)
    {"pred": pred, "target": target, "grad_output": grad_output}[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"backward_into\S* cannot be differentiated"):
        torch.ops.fcrn_fused.backward_into(*given)
    with torch.no_grad():
        torch.ops.fcrn_fused.backward_into(*given)


# ---- second derivatives -------------------------------------------------------------------------


def of_export(impl: Implementation) -> tuple[Program, list[Tensor], tuple[Tensor, Tensor]]:
    inputs = example(impl.device)
    exported = torch.export.export(Step(impl), inputs).module()
    return exported, [exported.network.bias], inputs


def of_jit_trace(impl: Implementation) -> tuple[Program, list[Tensor], tuple[Tensor, Tensor]]:
    inputs = example(impl.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Step(impl), inputs)
    return traced, [traced.network.bias], inputs


def of_make_fx(impl: Implementation) -> tuple[Program, list[Tensor], tuple[Tensor, Tensor]]:
    pred, target = make_batch(device=impl.device)
    return make_fx(lambda p, t: impl.loss(p, t))(pred, target), [pred], (pred, target)


def of_operator(impl: Implementation) -> tuple[Program, list[Tensor], tuple[Tensor, Tensor]]:
    pred, target = make_batch(device=impl.device)
    arguments = arguments_of(pred, "mean", impl.device)
    return (
        lambda p, t: torch.ops.fcrn_fused.forward(p, t, *arguments)[0],
        [pred],
        (pred, target),
    )


@pytest.mark.parametrize("make", [of_export, of_jit_trace, of_make_fx, of_operator])
def test_second_derivatives_of_a_traced_loss_are_an_error(
    fused: Implementation, make: Callable[..., Any]
) -> None:
    program, parameters, inputs = make(fused)
    grads = torch.autograd.grad(program(*inputs), parameters, create_graph=True)
    assert grads[0].requires_grad
    with pytest.raises(RuntimeError, match=r"second derivatives .* eager mode only"):
        torch.autograd.grad(grads[0].square().sum(), parameters)


def test_eager_mode_after_all_that_has_its_second_derivatives(fused: Implementation) -> None:
    pred, target = make_batch(device=fused.device)
    second = []
    for loss in (fused.loss, fcrn_fused.reference.fcrn_loss):
        (grad,) = torch.autograd.grad(loss(pred, target), pred, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), pred)[0])
    torch.testing.assert_close(*second)
