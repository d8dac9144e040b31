"""Checkpointing, anomaly detection, deterministic algorithms, default devices and dtypes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss
from torch.utils.checkpoint import checkpoint

import fcrn_fused


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpoint(impl: Implementation, reduction: str, use_reentrant: bool) -> None:
    """The loss inside of what is computed again in backward."""
    pred, target = make_batch(device=impl.device)

    def loss(pred: torch.Tensor) -> torch.Tensor:
        return impl.loss(pred.tanh(), target, reduction=reduction)

    value = checkpoint(loss, pred, use_reentrant=use_reentrant)
    (2 * value.sum()).backward()
    other = pred.detach().clone().requires_grad_()
    (2 * loss(other).sum()).backward()
    assert torch.equal(pred.grad, other.grad)


def test_checkpoint_around_a_network_and_its_loss(impl: Implementation) -> None:
    network = torch.nn.Conv2d(3, 7, 1).to(impl.device)
    _, target = make_batch((2, 7, 4, 4), device=impl.device)
    picture = torch.randn(2, 3, 4, 4).to(impl.device)

    def step(picture: torch.Tensor) -> torch.Tensor:
        return impl.loss(network(picture), target)

    grads = []
    for run in (step, lambda p: checkpoint(step, p, use_reentrant=False)):
        network.zero_grad()
        run(picture).backward()
        grads.append([parameter.grad.clone() for parameter in network.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_detect_anomaly_passes_what_is_right_and_names_a_nan(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, that anomaly detection is slow
        with torch.autograd.detect_anomaly():
            impl.loss(pred, target).backward()
            assert_gradient(pred.grad, oracle.fcrn_loss(pred, target).grad, torch.float32)
            poisoned = pred.detach().clone()
            poisoned[0, -1] = torch.nan
            poisoned.requires_grad_()
            with pytest.raises(RuntimeError, match="returned nan values"):
                impl.loss(poisoned, target).backward()


@pytest.fixture
def _deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic_algorithms")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deterministic_algorithms(impl: Implementation, reduction: str) -> None:
    """Also with the filling of empty tensors that they switch on."""
    pred, target = make_batch(device=impl.device, ignored=0.2)
    settings = {"reduction": reduction, "ignore_value": -1.0}
    loss = impl.loss(pred, target, **settings)
    (3 * loss).sum().backward()
    truth = oracle.fcrn_loss(pred, target, grad_output=3.0, **settings)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_a_default_device_elsewhere(impl: Implementation, default: str) -> None:
    """What the loss makes by itself belongs where pred is, not on the default device."""
    if default == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pred, target = make_batch(device=impl.device, ignored=0.2)
    settings = {"coord_weight": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "ignore_value": -1.0}
    for negative_weight in (0.3, torch.tensor(0.3, device=impl.device)):
        for reduction in REDUCTIONS:
            pred.grad = None
            with torch.device(default):
                loss, stats = impl.loss(
                    pred,
                    target,
                    reduction=reduction,
                    return_stats=True,
                    negative_weight=negative_weight,
                    **settings,
                )
                (2 * loss).sum().backward(retain_graph=True)
                (grad,) = torch.autograd.grad(loss.sum(), pred, create_graph=True)
                (second,) = torch.autograd.grad(grad.sum(), pred)
            assert {loss.device, pred.grad.device, second.device} == {pred.device}
            assert {part.device for part in stats} == {pred.device}
            truth = oracle.fcrn_loss(
                pred, target, reduction=reduction, negative_weight=0.3, grad_output=2.0, **settings
            )
            assert_loss(loss, truth.loss, torch.float32)
            assert_gradient(pred.grad, truth.grad, torch.float32)


def test_set_default_device_for_a_module(device: str) -> None:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        module = fcrn_fused.FCRNLoss(negative_weight=0.5)
        assert module.negative_weight.device.type == device
        loss = module(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))
        assert loss.device.type == device
        assert loss.item() == 0.25
    finally:
        torch.set_default_device(before)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_default_dtype_changes_nothing(impl: Implementation, default: torch.dtype) -> None:
    pred, target = make_batch(device=impl.device)
    want = impl.loss(pred, target, negative_weight=0.3, coord_weight=0.7)
    torch.set_default_dtype(default)
    try:
        loss = impl.loss(pred, target, negative_weight=0.3, coord_weight=0.7)
        module = fcrn_fused.FCRNLoss(negative_weight=0.01)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    assert module.negative_weight.dtype == torch.float32
    assert module.negative_weight.item() == torch.tensor(0.01).item()


def test_subnormal_gradients_are_not_flushed(impl: Implementation) -> None:
    """As long as PyTorch was not told to flush them (`torch.set_flush_denormal`)."""
    pred = torch.full((1, 1, 64), 1e-30, dtype=torch.float32, device=impl.device)
    pred.requires_grad_()
    target = torch.zeros_like(pred)
    impl.loss(pred, target, reduction="sum", negative_weight=1e-10).backward()
    torch.testing.assert_close(
        pred.grad, torch.full_like(pred, 2e-40), rtol=1e-4, atol=0, msg="a gradient was flushed"
    )


def test_parameters_and_other_subclasses(impl: Implementation) -> None:
    """A Parameter, and a subclass that only carries a name: what comes out is right."""

    class Named(torch.Tensor):
        pass

    pred, target = make_batch(device=impl.device)
    truth = oracle.fcrn_loss(pred, target)
    parameter = torch.nn.Parameter(pred.detach().clone())
    impl.loss(parameter, target).backward()
    assert_gradient(parameter.grad, truth.grad, torch.float32)
    named = pred.detach().clone().as_subclass(Named).requires_grad_()
    loss = impl.loss(named, target.as_subclass(Named))
    loss.backward()
    assert_loss(loss.as_subclass(torch.Tensor), truth.loss, torch.float32)
    assert_gradient(named.grad.as_subclass(torch.Tensor), truth.grad, torch.float32)


@pytest.fixture
def _process_group() -> Iterator[None]:
    """One process alone, which is enough for a DTensor."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_forwards_and_one_backward_under_ddp(fused: Implementation, reduction: str) -> None:
    """The second forward broadcasts the buffers, in place: the first one's weight is a copy."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = torch.nn.Conv2d(3, 7, 1)
            self.loss = fused.module(
                reduction=reduction, negative_weight=0.5, coord_weight=torch.full((6,), 2.0)
            )

        def forward(self, picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.loss(self.network(picture), target).sum()

    picture = torch.randn(2, 3, 4, 4, device=fused.device)
    target = make_batch((2, 7, 4, 4), device=fused.device)[1]
    model = Model().to(fused.device)
    (3 * (model(picture, target) + model(2 * picture, target))).backward()
    want = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    (3 * (parallel(picture, target) + parallel(2 * picture, target))).backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], want)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_a_dtensor_is_refused_by_name(backend: str) -> None:
    """Its shards need a decision about the divisor that only the caller can take."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    pred, target = make_batch()
    mesh = init_device_mesh("cpu", (1,))
    shards = [distribute_tensor(tensor.detach(), mesh, [Shard(0)]) for tensor in (pred, target)]
    for arguments in (shards, (shards[0], target), (pred, shards[1])):
        with pytest.raises(ValueError, match=r"DTensor.*to_local\(\)"):
            fcrn_fused.fcrn_loss(*arguments, backend=backend)
    local = fcrn_fused.reference.fcrn_loss(*(shard.to_local() for shard in shards))
    assert_loss(local, oracle.fcrn_loss(pred, target).loss, torch.float32)


def test_a_masked_tensor_is_refused_by_name() -> None:
    from torch.masked import masked_tensor

    pred, target = make_batch(requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, that these are a prototype
        masked = masked_tensor(pred, torch.ones_like(pred, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"pred.*MaskedTensor"):
            fcrn_fused.fcrn_loss(masked, target)


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(3, 5)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"pred.*jagged"):
        fcrn_fused.fcrn_loss(nested, nested)


def test_a_dispatch_mode_sees_the_loss(impl: Implementation) -> None:
    """FlopCounterMode and its like work over it."""
    from torch.utils.flop_counter import FlopCounterMode

    pred, target = make_batch(device=impl.device)
    with FlopCounterMode(display=False):
        loss = impl.loss(pred, target)
        loss.backward()
    assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)


def test_conjugate_negative_and_zero_views(impl: Implementation) -> None:
    """Lazily negated tensors, as `torch.imag` of a conjugate gives them, are read as they mean."""
    pred, target = make_batch(device=impl.device, requires_grad=False)
    lazily_negated = torch._neg_view(-pred)
    assert lazily_negated.is_neg()
    assert torch.equal(impl.loss(lazily_negated, target), impl.loss(pred, target))


def test_a_copied_graph_is_refused_as_any_other(impl: Implementation) -> None:
    """A loss is a non-leaf: deepcopy says so, as for every PyTorch result."""
    pred, target = make_batch(device=impl.device)
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(impl.loss(pred, target))
