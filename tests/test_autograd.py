"""First and second derivatives, kept graphs, and gradients that their owner changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from batches import REDUCTIONS, SCALAR_REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss

import fcrn_fused

SETTINGS = {"negative_weight": 0.3, "positive_weight": 1.3, "coord_weight": [0.5, 2.0]}


def differentiable_batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, and no target confidence where a small step would change the kind of its cell."""
    pred, target = make_batch((2, 3, 2, 3), dtype=torch.float64, device=device)
    target[:, -1] = torch.where(target[:, -1] > 0, 0.8, -0.6)
    assert 0 < (target[:, -1] > 0).sum() < target[:, -1].numel()
    return pred, target


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrt", ["pred", "target", "both"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_derivatives_by_finite_differences(
    impl: Implementation, order: str, wrt: str, reduction: str
) -> None:
    pred, target = differentiable_batch(impl.device)
    pred.requires_grad_(wrt != "target")
    target.requires_grad_(wrt != "pred")

    def loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return impl.loss(pred, target, reduction=reduction, **SETTINGS)

    check = torch.autograd.gradcheck if order == "first" else torch.autograd.gradgradcheck
    assert check(loss, (pred, target))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_with_ignored_cells_and_weights_in_tensors(
    impl: Implementation, reduction: str
) -> None:
    pred, target = differentiable_batch(impl.device)
    target[0, -1, 0] = 255
    settings = {
        "negative_weight": torch.tensor(0.3, device=impl.device),
        "coord_weight": torch.tensor([0.5, 2.0], device=impl.device, dtype=torch.float64),
        "ignore_value": 255,
        "reduction": reduction,
    }

    def loss(pred: torch.Tensor) -> torch.Tensor:
        return impl.loss(pred, target, **settings)

    assert torch.autograd.gradcheck(loss, (pred,))
    assert torch.autograd.gradgradcheck(loss, (pred,))


def test_derivatives_of_other_layouts(impl: Implementation) -> None:
    pred, target = differentiable_batch(impl.device)
    target = target.contiguous(memory_format=torch.channels_last)

    def loss(pred: torch.Tensor) -> torch.Tensor:
        return impl.loss(pred.transpose(2, 3), target.transpose(2, 3), **SETTINGS)

    assert torch.autograd.gradcheck(loss, (pred,))
    assert torch.autograd.gradgradcheck(loss, (pred,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
def test_a_gradient_penalty(impl: Implementation, reduction: str, dtype: torch.dtype) -> None:
    """loss + |dloss/dpred|^2: its gradient is g + 2 g dg/dpred, with g = s d and dg/dpred = s."""
    pred, target = make_batch((2, 3, 4, 5), dtype=dtype, device=impl.device, ignored=0.2)
    settings = {**SETTINGS, "ignore_value": -1.0, "reduction": reduction}
    loss = impl.loss(pred, target, **settings)
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    assert grad.requires_grad
    (loss + grad.to(loss.dtype).square().sum()).backward()

    g = oracle.fcrn_loss(pred, target, **settings).grad
    p, t = (tensor.detach().cpu().double().numpy() for tensor in (pred, target))
    slope = np.where(p != t, g / np.where(p != t, p - t, 1), 0)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    want = torch.from_numpy((g + 2 * g * slope).astype(np.float64))
    torch.testing.assert_close(pred.grad.cpu().double(), want, rtol=rtol, atol=rtol * 1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_penalty_through_a_network_equals_the_reference(
    impl: Implementation, reduction: str, dtype: torch.dtype
) -> None:
    """The penalty of the picture's gradient trains the weights of the network."""
    results = []
    for loss in (impl.loss, fcrn_fused.reference.fcrn_loss):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 7, 3, padding=1).to(impl.device)
        picture = torch.randn(2, 3, 6, 6).to(impl.device).requires_grad_()
        _, target = make_batch((2, 7, 6, 6), device=impl.device, dtype=dtype)
        value = loss(network(picture).tanh().to(dtype), target, reduction=reduction)
        (grad,) = torch.autograd.grad(value.sum(), picture, create_graph=True)
        (value.sum() + grad.square().sum()).backward()
        results.append([parameter.grad for parameter in network.parameters()])
    for got, want in zip(*results, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max())


def test_third_derivatives_are_zero(impl: Implementation) -> None:
    pred, target = differentiable_batch(impl.device)
    (first,) = torch.autograd.grad(impl.loss(pred, target), pred, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), pred, create_graph=True)
    assert second.count_nonzero() > 0
    if second.requires_grad:  # a graph through which nothing flows is right as well
        (third,) = torch.autograd.grad(second.sum(), pred, allow_unused=True)
        assert third is None or (third == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_second_backward_with_another_grad_output(
    impl: Implementation, reduction: str, dtype: torch.dtype
) -> None:
    pred, target = make_batch((2, 3, 4, 9), dtype=dtype, device=impl.device, ignored=0.2)
    target.requires_grad_()
    settings = {**SETTINGS, "reduction": reduction, "ignore_value": -1.0}
    loss = impl.loss(pred, target, **settings)
    for scale in (1.0, -2.5, 1.0, 0.0, 3e3):
        grad_output = torch.full_like(loss, scale)
        grads = torch.autograd.grad(loss, (pred, target), grad_output, retain_graph=True)
        truth = oracle.fcrn_loss(pred, target, grad_output=scale, **settings)
        assert_gradient(grads[0], truth.grad, dtype)
        assert_gradient(grads[1], -truth.grad, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("first", [1.0, 3.0])
def test_a_gradient_changed_by_its_owner_does_not_come_back(
    impl: Implementation, reduction: str, first: float
) -> None:
    """Clipping, weight decay and zero_() work in place on what backward gave away."""
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target, reduction=reduction)
    changes: list[Callable[[torch.Tensor], object]] = [
        lambda grad: grad.mul_(100),
        lambda grad: grad.zero_(),
        lambda grad: grad.fill_(torch.nan),
    ]
    for grad_output, change in zip((first, 1.0, 7.0), changes, strict=True):
        (grad,) = torch.autograd.grad(
            loss, pred, torch.full_like(loss, grad_output), retain_graph=True
        )
        truth = oracle.fcrn_loss(pred, target, reduction=reduction, grad_output=grad_output)
        assert_gradient(grad, truth.grad, torch.float32)
        change(grad)


def test_accumulated_gradients_of_two_backwards(impl: Implementation) -> None:
    """`.grad` takes over the first gradient and adds the second to it, in place."""
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target)
    loss.backward(retain_graph=True)
    once = pred.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(pred.grad, 2 * once)
    (3 * loss).backward()
    torch.testing.assert_close(pred.grad, 5 * once)


@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
def test_grad_output_is_not_one(impl: Implementation, reduction: str) -> None:
    """A squared, a scaled and a negated loss, and one that is part of a sum."""
    functions = {
        "squared": (lambda loss: loss**2, lambda loss: 2 * loss),
        "scaled": (lambda loss: 0.125 * loss, lambda loss: 0.125),
        "negated": (lambda loss: -loss, lambda loss: -1.0),
        "zero": (lambda loss: 0 * loss, lambda loss: 0.0),
        "logarithm": (lambda loss: loss.log(), lambda loss: 1 / loss),
        "plus": (lambda loss: loss + 5, lambda loss: 1.0),
    }
    for name, (function, derivative) in functions.items():
        pred, target = make_batch(device=impl.device, dtype=torch.float64, ignored=0.2)
        settings = {"reduction": reduction, "ignore_value": -1.0, "negative_weight": 0.1}
        loss = impl.loss(pred, target, **settings)
        function(loss).backward()
        truth = oracle.fcrn_loss(pred, target, **settings)
        want = truth.grad * np.longdouble(float(derivative(loss.detach())))
        np.testing.assert_allclose(
            pred.grad.cpu().numpy(), want.astype(np.float64), rtol=1e-13, err_msg=name
        )


def test_an_infinite_or_missing_grad_output(impl: Implementation) -> None:
    for scale in (torch.inf, torch.nan):
        pred, target = make_batch(device=impl.device, positives=1.1)
        (impl.loss(pred, target) * scale).backward()
        assert not pred.grad.isfinite().any()
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target)
    other = torch.ones((), device=impl.device, requires_grad=True)
    (grad,) = torch.autograd.grad(other * 2 + 0 * other, pred, allow_unused=True)
    assert grad is None
    loss.backward()
    assert pred.grad.count_nonzero() > 0


def test_two_losses_of_one_prediction(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    other = make_batch(device=impl.device, seed=1)[1]
    (impl.loss(pred, target) + 2 * impl.loss(pred, other, reduction="sum")).backward()
    want = oracle.fcrn_loss(pred, target).grad
    want = want + 2 * oracle.fcrn_loss(pred, other, reduction="sum").grad
    torch.testing.assert_close(pred.grad.cpu(), torch.from_numpy(want.astype(np.float32)))


def test_pred_and_target_of_one_tensor(impl: Implementation) -> None:
    x, _ = make_batch(device=impl.device, dtype=torch.float64)
    impl.loss(x, x, reduction="sum").backward()
    assert (x.grad == 0).all()
    x.grad = None
    loss = impl.loss(x, 3 * x, reduction="sum")  # d = -2 x, dloss/dx = 2 w d (1 - 3)
    loss.backward()
    truth = oracle.fcrn_loss(x, 3 * x, reduction="sum")
    assert_loss(loss, truth.loss, torch.float64)
    np.testing.assert_allclose(x.grad.cpu().numpy(), (-2 * truth.grad).astype(np.float64))


def test_only_what_is_asked_for_has_a_gradient(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device, requires_grad=False)
    assert not impl.loss(pred, target).requires_grad
    impl.loss(pred, target.requires_grad_()).backward()
    assert pred.grad is None
    truth = oracle.fcrn_loss(pred, target)
    assert_gradient(target.grad, -truth.grad, torch.float32)
    target = target.detach()
    impl.loss(pred.requires_grad_(), target).backward()
    assert target.grad is None
    assert_gradient(pred.grad, truth.grad, torch.float32)


def test_backward_with_respect_to_one_of_the_inputs(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    target.requires_grad_()
    impl.loss(pred, target).backward(inputs=[target])
    assert pred.grad is None
    assert_gradient(target.grad, -oracle.fcrn_loss(pred, target).grad, torch.float32)


def test_no_grad_and_inference_mode(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    want = impl.loss(pred, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, stats = impl.loss(pred, target, return_stats=True)
        assert not loss.requires_grad
        assert loss.grad_fn is None
        assert torch.equal(loss, want)
        assert not any(part.requires_grad for part in stats)
    with torch.inference_mode():
        made_there = pred * 1
        assert torch.equal(impl.loss(made_there, target), want)


def test_a_graph_that_was_freed_says_so(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    loss = impl.loss(pred, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("which", ["pred", "target"])
def test_an_input_changed_in_place_before_backward_is_an_error(
    impl: Implementation, which: str
) -> None:
    """As for mse_loss: PyTorch says so, and no wrong gradient comes out."""
    leaf, target = make_batch(device=impl.device)
    pred = leaf * 1
    loss = impl.loss(pred, target, reduction="sum") ** 2
    with torch.no_grad():
        {"pred": pred, "target": target}[which].mul_(2)
    if impl.is_fused:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:  # plain PyTorch saved the difference, so that nothing is lost
        loss.backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("grad_output", [1.0, 3.0])
def test_a_weight_filled_before_backward_never_gives_a_wrong_gradient(
    impl: Implementation, grad_output: float
) -> None:
    """The gradient of the weight at the time of the loss, or PyTorch's in-place error."""
    pred, target = make_batch(device=impl.device)
    weight = torch.tensor(0.5, device=impl.device)
    loss = impl.loss(pred, target, negative_weight=weight)
    truth = oracle.fcrn_loss(pred, target, negative_weight=weight, grad_output=grad_output)
    weight.fill_(1.0)
    for _ in range(2):
        try:
            (grad,) = torch.autograd.grad(
                loss, pred, torch.full_like(loss, grad_output), retain_graph=True
            )
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            assert_gradient(grad, truth.grad, torch.float32)


def test_hooks_see_the_gradient_and_may_change_it(impl: Implementation) -> None:
    leaf, target = make_batch(device=impl.device)
    seen = []
    pred = leaf * 1
    pred.register_hook(lambda grad: seen.append(grad.clone()))
    pred.register_hook(lambda grad: 2 * grad)
    impl.loss(pred, target).backward()
    truth = oracle.fcrn_loss(pred, target)
    assert_gradient(seen[0], truth.grad, torch.float32)
    assert_gradient(leaf.grad, 2 * truth.grad, torch.float32)


def test_saved_tensors_hooks(impl: Implementation) -> None:
    """Saved tensors that are packed elsewhere until backward, as `save_on_cpu` does it."""
    pred, target = make_batch(device=impl.device)
    with torch.autograd.graph.save_on_cpu():
        loss = impl.loss(pred, target)
    truth = oracle.fcrn_loss(pred, target, grad_output=2.0)
    for _ in range(2):
        (grad,) = torch.autograd.grad(2 * loss, pred, retain_graph=True)
        assert_gradient(grad, truth.grad, torch.float32)


def test_through_a_network_and_an_optimiser(impl: Implementation) -> None:
    """Twenty steps of training: the parameters follow those trained with the reference."""
    trained = []
    for loss in (impl.loss, fcrn_fused.reference.fcrn_loss):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 7, 3, padding=1).to(impl.device)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        picture = torch.randn(2, 3, 8, 8).to(impl.device)
        _, target = make_batch((2, 7, 8, 8), device=impl.device)
        losses = []
        for _ in range(20):
            optimiser.zero_grad()
            value = loss(network(picture), target, negative_weight=0.1, reduction="positive")
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            losses.append(value.item())
        assert losses[-1] < 0.9 * losses[0]
        trained.append([parameter.detach() for parameter in network.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def function_arguments(
    pred: torch.Tensor, target: torch.Tensor, coord_weight: object = 2.0, reduction: str = "mean"
) -> tuple[object, ...]:
    return (pred, target, 0.3, 1.3, coord_weight, -1.0, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_function_beneath(fused: Implementation, reduction: str) -> None:
    """`FCRNLossFunction.apply`: five results, of which the loss alone is differentiable."""
    pred, target = make_batch((2, 3, 4, 5), device=fused.device, ignored=0.2)
    results = fcrn_fused.FCRNLossFunction.apply(
        *function_arguments(pred, target, reduction=reduction)
    )
    assert len(results) == 5
    loss, *parts = results
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts)
    truth = oracle.fcrn_loss(
        pred,
        target,
        negative_weight=0.3,
        positive_weight=1.3,
        coord_weight=2.0,
        ignore_value=-1.0,
        reduction=reduction,
    )
    assert_loss(loss, truth.loss, torch.float32)
    for part, want in zip(parts[:3], truth[2:5], strict=True):
        assert_loss(part, want, torch.float32)
    assert parts[3].item() == truth.num_positive
    loss.sum().backward()
    assert_gradient(pred.grad, truth.grad, torch.float32)


@pytest.mark.parametrize(
    "coord_weight", [2.0, 2, [0.5, 2.0], (0.5, 2.0), torch.tensor([0.5, 2.0])], ids=str
)
def test_the_function_beneath_takes_every_form_of_coord_weight(
    fused: Implementation, coord_weight: object
) -> None:
    pred, target = make_batch((2, 3, 4, 5), device=fused.device, ignored=0.2)
    loss, *_ = fcrn_fused.FCRNLossFunction.apply(*function_arguments(pred, target, coord_weight))
    want = fcrn_fused.reference.fcrn_loss(
        pred,
        target,
        negative_weight=0.3,
        positive_weight=1.3,
        coord_weight=coord_weight,
        ignore_value=-1.0,
    )
    torch.testing.assert_close(loss, want)
    grads, penalties = [], []
    for value in (loss, want):
        (grad,) = torch.autograd.grad(value, pred, create_graph=True)
        grads.append(grad)
        penalties.append(torch.autograd.grad(grad.square().sum(), pred)[0])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(*penalties)
