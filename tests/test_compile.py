"""torch.compile: no graph break, no recompilation while a weight is annealed, right gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss
from torch import Tensor
from torch._dynamo.utils import counters

import fcrn_fused

# Dynamo traces and AOTAutograd differentiates in both; "inductor" builds code as well.
TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], backend: str = TRACED, dynamic: bool | None = None
) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def num_graphs() -> int:
    """How many graphs were compiled in this test; more than one is a recompilation."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, TRACED), (torch.float16, TRACED), (torch.float32, "inductor")],
    ids=str,
)
def test_one_graph_of_loss_and_gradients(
    impl: Implementation, dtype: torch.dtype, backend: str
) -> None:
    settings = {"negative_weight": 0.3, "coord_weight": [1.0, 2.0], "ignore_value": -1.0}
    step = compiled(lambda p, t: impl.loss(p, t, return_stats=True, **settings), backend)
    for seed in range(2):
        pred, target = make_batch(
            (2, 3, 4, 5), dtype=dtype, device=impl.device, ignored=0.2, seed=seed
        )
        target.requires_grad_()
        loss, stats = step(pred, target)
        (3 * loss).backward()
        truth = oracle.fcrn_loss(pred, target, grad_output=3.0, **settings)
        assert_loss(loss, truth.loss, torch.float32)
        assert_loss(stats.coord, truth.coord, torch.float32)
        assert stats.num_positive.item() == truth.num_positive
        assert not stats.coord.requires_grad
        assert_gradient(pred.grad, truth.grad, dtype)
        assert_gradient(target.grad, -truth.grad, dtype)
    assert num_graphs() == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_reduction(
    impl: Implementation, reduction: str, memory_format: torch.memory_format
) -> None:
    step = compiled(lambda p, t: impl.loss(p, t, reduction=reduction))
    pred, target = make_batch((2, 3, 4, 5), device=impl.device, requires_grad=False)
    pred = pred.contiguous(memory_format=memory_format).requires_grad_()
    loss = step(pred, target)
    (grad,) = torch.autograd.grad(2 * loss.sum(), pred)
    truth = oracle.fcrn_loss(pred, target, reduction=reduction, grad_output=2.0)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(grad, truth.grad, torch.float32)
    assert grad.is_contiguous(memory_format=memory_format)
    assert num_graphs() == 1


@pytest.mark.parametrize("reduction", ["mean", "positive", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_second_backward_with_another_grad_output(
    impl: Implementation, dtype: torch.dtype, reduction: str
) -> None:
    """A gradient kept by a traced forward must not be handed out twice, nor come back changed."""
    step = compiled(lambda p, t: impl.loss(p, t, reduction=reduction))
    pred, target = make_batch((2, 3, 4, 5), dtype=dtype, device=impl.device)
    loss = step(pred, target)
    for scale in (1.0, 5.0, -2.0):
        (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, scale), retain_graph=True)
        truth = oracle.fcrn_loss(pred, target, reduction=reduction, grad_output=scale)
        assert_gradient(grad, truth.grad, dtype)
        grad.fill_(torch.nan)


@pytest.mark.parametrize("schedule", ["step", "linear"])
def test_annealing_the_module_does_not_recompile(impl: Implementation, schedule: str) -> None:
    module = impl.module()
    if schedule == "step":
        annealing: Any = fcrn_fused.StepNegativeWeight(module, step_size=1, gamma=2.0)
    else:
        annealing = fcrn_fused.LinearNegativeWeight(module, total_iters=5)
    step = compiled(module)
    for seed in range(8):
        pred, target = make_batch((2, 3, 4, 5), device=impl.device, seed=seed)
        loss = step(pred, target)
        loss.backward()
        weight = annealing.get_last_weight()
        truth = oracle.fcrn_loss(pred, target, negative_weight=float(module.negative_weight))
        assert float(module.negative_weight) == pytest.approx(weight)
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(pred.grad, truth.grad, torch.float32)
        annealing.step()
    assert num_graphs() == 1


def test_a_new_weight_tensor_does_not_recompile(impl: Implementation) -> None:
    step = compiled(lambda p, t, w: impl.loss(p, t, negative_weight=w))
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    for value in (0.01, 0.1, 1.0, 0.0):
        weight = torch.tensor(value, device=impl.device)
        loss = step(pred, target, weight)
        truth = oracle.fcrn_loss(pred, target, negative_weight=value)
        assert_loss(loss, truth.loss, torch.float32)
    assert num_graphs() == 1


def test_a_number_that_changes_costs_at_most_one_recompilation(impl: Implementation) -> None:
    step = compiled(lambda p, t, w: impl.loss(p, t, negative_weight=w))
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    for value in (0.01, 0.02, 0.05, 0.1, 0.7, 1.0):
        loss = step(pred, target, value)
        (grad,) = torch.autograd.grad(loss, pred)
        truth = oracle.fcrn_loss(pred, target, negative_weight=value)
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, truth.grad, torch.float32)
    assert num_graphs() <= 2


@pytest.mark.parametrize("reduction", ["mean", "cell", "positive"])
def test_dynamic_shapes_compile_once(impl: Implementation, reduction: str) -> None:
    step = compiled(lambda p, t: impl.loss(p, t, reduction=reduction), dynamic=True)
    for batch, height, width in ((2, 4, 5), (3, 6, 7), (4, 5, 9), (2, 13, 13)):
        pred, target = make_batch((batch, 3, height, width), device=impl.device)
        loss = step(pred, target)
        loss.sum().backward()
        truth = oracle.fcrn_loss(pred, target, reduction=reduction)
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(pred.grad, truth.grad, torch.float32)
    assert num_graphs() == 1


def test_shapes_that_turn_out_to_change_cost_one_recompilation(impl: Implementation) -> None:
    step = compiled(lambda p, t: impl.loss(p, t))
    for height in (4, 6, 8, 11):
        pred, target = make_batch((2, 3, height, 5), device=impl.device)
        loss = step(pred, target)
        assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)
    assert num_graphs() <= 2


@pytest.mark.parametrize("backend", [TRACED, "inductor"])
def test_a_network_with_its_loss(impl: Implementation, backend: str) -> None:
    """The whole step in one graph, with the schedule's weight, against eager training."""
    trained = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 7, 3, padding=1).to(impl.device)
        module = impl.module(reduction="positive")
        annealing = fcrn_fused.StepNegativeWeight(module, step_size=1, gamma=1.5)
        picture = torch.randn(2, 3, 6, 6).to(impl.device)
        _, target = make_batch((2, 7, 6, 6), device=impl.device)

        def step(picture: Tensor, target: Tensor, network=network, module=module) -> Tensor:
            return module(network(picture), target)

        if is_compiled:
            step = compiled(step, backend)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(4):
            optimiser.zero_grad()
            step(picture, target).backward()
            optimiser.step()
            annealing.step()
        assert num_graphs() == int(is_compiled)
        trained.append([parameter.detach() for parameter in network.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


def test_auto_is_traced_as_a_whole(device: str) -> None:
    """The default backend, whatever serves it here: no graph break for the choice itself."""
    step = compiled(lambda p, t: fcrn_fused.fcrn_loss(p, t, negative_weight=0.1))
    pred, target = make_batch((2, 3, 4, 5), device=device)
    loss = step(pred, target)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.1)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)
    assert num_graphs() == 1


def test_no_grad_under_compile(impl: Implementation) -> None:
    step = compiled(lambda p, t: impl.loss(p, t))
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    with torch.no_grad():
        loss = step(pred, target)
    assert not loss.requires_grad
    assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)
    assert num_graphs() == 1


def test_compiled_autograd(impl: Implementation) -> None:
    """The backward pass traced as well, of a traced forward and of an eager one."""
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    truth = oracle.fcrn_loss(pred, target, grad_output=3.0)
    for forward in (impl.loss, compiled(impl.loss)):

        def backward(forward: Callable[..., Any] = forward) -> None:
            (3 * forward(pred, target)).backward()

        pred.grad = None
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(backward, backend=TRACED)()
        assert_gradient(pred.grad, truth.grad, torch.float32)


def test_second_derivatives_under_compile_say_that_there_are_none(impl: Implementation) -> None:
    """AOTAutograd's limit, not a wrong answer; the eager loss has them."""
    step = compiled(lambda p, t: impl.loss(p, t))
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):  # noqa: PT012
        (grad,) = torch.autograd.grad(step(pred, target), pred, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"reduction": "average"}, "average"), ({"positive_weight": -2.0}, "-2.0")],
    ids=str,
)
def test_bad_input_is_refused_under_compile_too(
    impl: Implementation, arguments: dict[str, Any], error: str
) -> None:
    step = torch.compile(lambda p, t: impl.loss(p, t, **arguments), backend=TRACED)
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    with pytest.raises(ValueError, match=error):
        step(pred, target)


def test_a_compiled_forward_of_an_eager_network(impl: Implementation) -> None:
    """pred from eager code, the loss compiled: the gradients reach the network."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 1).to(impl.device)
    picture = torch.randn(2, 3, 4, 5).to(impl.device)
    _, target = make_batch((2, 3, 4, 5), device=impl.device)
    step = compiled(lambda p, t: impl.loss(p, t))
    step(network(picture), target).backward()
    got = network.weight.grad.clone()
    network.weight.grad = None
    fcrn_fused.reference.fcrn_loss(network(picture), target).backward()
    torch.testing.assert_close(got, network.weight.grad)
