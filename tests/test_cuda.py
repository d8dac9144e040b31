"""What only a GPU shows: launches, synchronisation, graphs, streams, devices, CPU weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from batches import REDUCTIONS, SCALAR_REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss
from torch.profiler import ProfilerActivity, profile

import fcrn_fused

SHAPE = (4, 7, 33, 35)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module", params=["reference", "fused"])
def cuda(request: pytest.FixtureRequest) -> Implementation:
    implementation = Implementation(request.param, "cuda")
    if reason := implementation.why_not():
        pytest.skip(f"{implementation}: {reason}")
    return implementation


@pytest.fixture(scope="module")
def kernels() -> Implementation:
    implementation = Implementation("fused", "cuda")
    if reason := implementation.why_not():
        pytest.skip(f"{implementation}: {reason}")
    return implementation


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


# ---- weights on the CPU --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_on_the_cpu(cuda: Implementation, reduction: str) -> None:
    pred, target = make_batch(device="cuda")
    weights = {
        "negative_weight": torch.tensor(0.3),
        "coord_weight": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    }
    for names in (["negative_weight"], ["coord_weight"], list(weights)):
        settings = {name: weights[name] for name in names}
        loss = cuda.loss(pred, target, reduction=reduction, **settings)
        (grad,) = torch.autograd.grad(2 * loss.sum(), pred)
        truth = oracle.fcrn_loss(pred, target, reduction=reduction, grad_output=2.0, **settings)
        assert loss.is_cuda
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, truth.grad, torch.float32)


def test_a_module_that_nobody_moved(cuda: Implementation) -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.01, backend=cuda.backend)
    schedule = fcrn_fused.StepNegativeWeight(module, step_size=1, gamma=2.0)
    pred, target = make_batch(device="cuda")
    for _ in range(3):
        loss = module(pred, target)
        (grad,) = torch.autograd.grad(loss, pred)
        truth = oracle.fcrn_loss(pred, target, negative_weight=module.negative_weight)
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, truth.grad, torch.float32)
        schedule.step()


# ---- launches and synchronisation ----------------------------------------------------------------


def kernel_names(run: object) -> list[str]:
    """The kernels that `run` launches, autograd's own fill of ones left out."""
    run()  # what is set up at the first call is not counted
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and "Memcpy" not in event.name
        and "FillFunctor" not in event.name
    ]


@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_is_two_launches(
    kernels: Implementation, dtype: torch.dtype, reduction: str
) -> None:
    module = kernels.module(negative_weight=0.1, reduction=reduction)
    pred, target = make_batch(SHAPE, dtype=dtype, device="cuda")

    def step() -> None:
        torch.autograd.grad(module(pred, target), pred)

    names = kernel_names(step)
    assert 1 <= len(names) <= 2, names


def test_a_loss_without_gradient_is_one_launch(kernels: Implementation) -> None:
    pred, target = make_batch(SHAPE, device="cuda", requires_grad=False)
    names = kernel_names(lambda: kernels.loss(pred, target, return_stats=True))
    assert len(names) == 1, names


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("_no_synchronisation")
def test_nothing_waits_for_the_device(cuda: Implementation, reduction: str) -> None:
    module = cuda.module(negative_weight=0.1, reduction=reduction, return_stats=True)
    schedule = fcrn_fused.StepNegativeWeight(module, step_size=1)
    pred = torch.randn(SHAPE, device="cuda", requires_grad=True)
    target = torch.rand(SHAPE, device="cuda", requires_grad=True)
    for settings in ({}, {"coord_weight": [1.0] * 6, "ignore_value": -1.0}):
        loss, _ = cuda.loss(
            pred,
            target,
            negative_weight=module.negative_weight,
            reduction=reduction,
            return_stats=True,
            **settings,
        )
        torch.autograd.grad((3 * loss).sum(), (pred, target), retain_graph=True)
        torch.autograd.grad((2 * loss).sum(), (pred, target))
        schedule.step()


# ---- CUDA graphs ---------------------------------------------------------------------------------


def captured_step(
    loss: object, pred: torch.Tensor, target: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(pred, target), pred)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(pred, target)
        (grad,) = torch.autograd.grad(value, pred)
    return graph, value, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_graph_sees_new_inputs_and_the_annealed_weight(
    cuda: Implementation, dtype: torch.dtype
) -> None:
    module = cuda.module(reduction="positive", ignore_value=-1.0)
    schedule = fcrn_fused.StepNegativeWeight(module, step_size=1, gamma=3.0)
    pred, target = make_batch(SHAPE, dtype=dtype, device="cuda", ignored=0.1)
    graph, loss, grad = captured_step(module, pred, target)
    for seed in range(4):
        new_pred, new_target = make_batch(SHAPE, dtype=dtype, device="cuda", ignored=0.1, seed=seed)
        with torch.no_grad():
            pred.copy_(new_pred)
            target.copy_(new_target)
        graph.replay()
        truth = oracle.fcrn_loss(
            new_pred,
            new_target,
            negative_weight=module.negative_weight,
            reduction="positive",
            ignore_value=-1.0,
        )
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, truth.grad, dtype)
        schedule.step()


def test_a_graph_keeps_the_value_of_a_weight_on_the_cpu(kernels: Implementation) -> None:
    weight = torch.tensor(0.25)
    pred, target = make_batch(SHAPE, device="cuda")
    graph, loss, _ = captured_step(
        lambda p, t: kernels.loss(p, t, negative_weight=weight), pred, target
    )
    weight.fill_(1.0)
    graph.replay()
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.25)
    assert_loss(loss, truth.loss, torch.float32)


def test_a_replay_gives_the_bits_of_the_eager_call(cuda: Implementation) -> None:
    pred, target = make_batch(SHAPE, device="cuda")
    graph, loss, grad = captured_step(cuda.loss, pred, target)
    eager = cuda.loss(pred, target)
    (eager_grad,) = torch.autograd.grad(eager, pred)
    for _ in range(3):
        graph.replay()
        assert torch.equal(loss, eager)
        assert torch.equal(grad, eager_grad)


def test_make_graphed_callables(cuda: Implementation) -> None:
    module = cuda.module(negative_weight=0.25)
    pred, target = make_batch(SHAPE, device="cuda")
    graphed = torch.cuda.make_graphed_callables(cuda.module(negative_weight=0.25), (pred, target))
    for seed in range(2):
        new_pred, new_target = make_batch(SHAPE, device="cuda", seed=seed)
        graphed(new_pred, new_target).backward()
        other = new_pred.detach().clone().requires_grad_()
        module(other, new_target).backward()
        torch.testing.assert_close(new_pred.grad, other.grad)


def test_compile_with_cuda_graphs(cuda: Implementation) -> None:
    torch._dynamo.reset()
    module = cuda.module()
    schedule = fcrn_fused.StepNegativeWeight(module, step_size=1, gamma=2.0)
    step = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        pred, target = make_batch(SHAPE, device="cuda", seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = step(pred, target)
        loss.backward()
        truth = oracle.fcrn_loss(pred, target, negative_weight=module.negative_weight)
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(pred.grad, truth.grad, torch.float32)
        schedule.step()


# ---- streams, threads, devices -------------------------------------------------------------------


def test_another_stream_than_the_default(cuda: Implementation) -> None:
    """The inputs are made on the stream just before: a launch elsewhere would read too early."""
    _, target = make_batch(SHAPE, device="cuda")
    want, _ = make_batch(SHAPE, device="cuda")
    truth = oracle.fcrn_loss(want, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            pred = torch.zeros_like(want)
            torch.cuda._sleep(20_000_000)
            pred.copy_(want.detach())
            pred.requires_grad_()
            loss = cuda.loss(pred, target)
            (grad,) = torch.autograd.grad(2 * loss, pred)
    stream.synchronize()
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(grad, 2 * truth.grad, torch.float32)


def test_two_streams_and_threads_at_once(cuda: Implementation) -> None:
    """Large and small losses over each other; no partial sum or counter is shared."""
    shapes = [(16, 7, 64, 64), (2, 7, 16, 16), (32, 7, 48, 48), (1, 7, 5, 5)]
    inputs = [make_batch(shape, device="cuda", seed=i) for i, shape in enumerate(shapes)]
    wanted = []
    for pred, target in inputs:
        loss = cuda.loss(pred, target)
        wanted.append((loss.detach(), torch.autograd.grad(loss, pred)[0]))
    torch.cuda.synchronize()
    start = threading.Barrier(len(shapes))

    def work(i: int) -> None:
        pred, target = inputs[i]
        stream = torch.cuda.Stream()
        start.wait()
        with torch.cuda.stream(stream):
            for _ in range(100):
                loss = cuda.loss(pred, target)
                (grad,) = torch.autograd.grad(loss, pred)
                stream.synchronize()
                assert torch.equal(loss, wanted[i][0])
                assert torch.equal(grad, wanted[i][1])

    with ThreadPoolExecutor(len(shapes)) as pool:
        for future in [pool.submit(work, i) for i in range(len(shapes))]:
            future.result()


def test_another_device_than_the_current(cuda: Implementation) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device, two are needed")
    assert torch.cuda.current_device() == 0
    pred, target = make_batch(SHAPE, device="cuda:1")
    for weight in (0.3, torch.tensor(0.3), torch.tensor(0.3, device="cuda:1")):
        loss, stats = cuda.loss(pred, target, negative_weight=weight, return_stats=True)
        (grad,) = torch.autograd.grad(2 * loss, pred, retain_graph=True)
        (again,) = torch.autograd.grad(loss, pred)
        truth = oracle.fcrn_loss(pred, target, negative_weight=0.3)
        assert {t.device.index for t in (loss, *stats, grad, again)} == {1}
        assert_loss(loss, truth.loss, torch.float32)
        assert_gradient(grad, 2 * truth.grad, torch.float32)
        assert_gradient(again, truth.grad, torch.float32)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="cuda:0"):
        cuda.loss(pred, target, negative_weight=torch.ones((), device="cuda:0"))
    with pytest.raises(ValueError, match="cuda:0"):
        cuda.loss(pred, target.to("cuda:0"))


def test_the_caching_allocator_may_reuse_what_was_freed(cuda: Implementation) -> None:
    """Temporaries freed before the kernel ran are reused on the same stream, and only there."""
    pred, target = make_batch((64, 7, 64, 64), device="cuda")
    want = torch.autograd.grad(cuda.loss(pred, target), pred)[0]
    for _ in range(20):
        torch.cuda._sleep(1_000_000)
        (grad,) = torch.autograd.grad(cuda.loss(pred, target.clone()), pred)
        torch.full_like(target, torch.nan)
        assert torch.equal(grad, want)
