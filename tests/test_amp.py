"""Autocast casts nothing; a GradScaler's steps train."""

from __future__ import annotations

import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss
from torch.profiler import ProfilerActivity, profile

CASTS = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::clone", "aten::contiguous")


@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(
    impl: Implementation, amp_dtype: torch.dtype, pred_dtype: torch.dtype
) -> None:
    for reduction in REDUCTIONS:
        results = []
        for enabled in (False, True):
            pred, target = make_batch(
                dtype=pred_dtype, target_dtype=torch.float32, device=impl.device, ignored=0.2
            )
            with torch.autocast(impl.device, dtype=amp_dtype, enabled=enabled):
                loss, stats = impl.loss(
                    pred, target, reduction=reduction, ignore_value=-1.0, return_stats=True
                )
            loss.sum().backward()
            results.append((loss.detach(), pred.grad, *stats))
        for plain, autocast in zip(*results, strict=True):
            assert plain.dtype == autocast.dtype
            assert torch.equal(plain, autocast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, None], ids=str)
def test_no_cast_kernel_is_run(
    fused: Implementation, target_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Half predictions of an autocast network, float32 or half targets: read as they are."""
    module = fused.module(negative_weight=0.01, ignore_value=-1.0)
    activities = [ProfilerActivity.CPU]
    if fused.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for requires_grad in (False, True):
        pred, target = make_batch(
            dtype=dtype, target_dtype=target_dtype, device=fused.device, requires_grad=requires_grad
        )
        loss_scale = torch.tensor(65536.0, device=fused.device)
        with profile(activities=activities, record_shapes=True) as profiler:
            with torch.autocast(fused.device, dtype=dtype):
                loss = module(pred, target)
            if requires_grad:
                torch.autograd.grad(loss, pred, loss_scale)
        events = profiler.key_averages(group_by_input_shape=True)
        assert any("fcrn_fused" in event.key for event in events), events
        # a weight, of no dimension, may be copied
        casts = [event for event in events if event.key in CASTS and event.input_shapes[:1] != [[]]]
        assert not casts, casts


def test_the_profiler_does_see_casts(device: str) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.zeros(3, device=device, dtype=torch.float16).float()
    assert {event.key for event in profiler.key_averages()}.intersection(CASTS)


@pytest.mark.parametrize("reduction", ["mean", "positive"])
def test_a_network_under_autocast_with_a_grad_scaler(impl: Implementation, reduction: str) -> None:
    """float16 where the device's convolutions have it; the scaled steps reduce the loss."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 7, 3, padding=1).to(impl.device)
    module = impl.module(reduction=reduction, negative_weight=0.1)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.3 if reduction == "mean" else 0.02)
    scaler = torch.amp.GradScaler(impl.device, init_scale=65536.0)
    picture = torch.randn(2, 3, 8, 8).to(impl.device)
    _, target = make_batch((2, 7, 8, 8), device=impl.device)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        with torch.autocast(impl.device, dtype=torch.float16):
            pred = network(picture)
            assert pred.dtype == torch.float16
            loss = module(pred, target)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_scale_too_large_is_found_and_lowered(impl: Implementation) -> None:
    parameter = torch.full((1, 3, 4), 3.0, device=impl.device, requires_grad=True)
    _, target = make_batch((1, 3, 4), device=impl.device, positives=1.1)
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler(impl.device, init_scale=2.0**20)
    loss = impl.loss(parameter.half(), target, reduction="sum")
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**19
    assert (parameter == 3).all(), "the step was to be skipped"


def test_unscaled_gradients_are_right(impl: Implementation) -> None:
    pred, target = make_batch((4, 7, 8, 8), dtype=torch.float16, device=impl.device)
    leaf = pred.detach().float().requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=1.0)
    scaler = torch.amp.GradScaler(impl.device, init_scale=65536.0)
    with torch.autocast(impl.device, dtype=torch.float16):
        loss = impl.loss(leaf.half(), target, negative_weight=0.01)
    scaler.scale(loss).backward()
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.01, grad_output=65536.0)
    assert_loss(loss, oracle.fcrn_loss(pred, target, negative_weight=0.01).loss, torch.float32)
    assert_gradient(leaf.grad.half(), truth.grad, torch.float16)
    scaler.unscale_(optimiser)
    want = torch.from_numpy((truth.grad / 65536).astype("float32"))
    torch.testing.assert_close(leaf.grad.cpu(), want, rtol=2e-3, atol=0)


def test_autocast_under_compile(impl: Implementation) -> None:
    torch._dynamo.reset()
    pred, target = make_batch(dtype=torch.bfloat16, target_dtype=torch.float32, device=impl.device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(impl.device, dtype=torch.bfloat16):
            return impl.loss(pred, target)

    loss = step(pred, target)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.bfloat16)
