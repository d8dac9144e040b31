"""What only a GPU shows: kernels, launches, synchronisation, graphs, streams, devices, sizes."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from batches import REDUCTIONS, SCALAR_REDUCTIONS, make_batch, make_weight
from implementations import Implementation
from test_large import needs_memory
from tolerances import GRADIENT_ULPS, LOSS_RTOL, assert_gradient, assert_loss, loss_dtype
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fcrn_fused

pytestmark = pytest.mark.cuda
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


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- every kernel --------------------------------------------------------------------------------

HALVES = (torch.float16, torch.bfloat16)
VECTOR_PAIRS = (
    (torch.float32, torch.float32),
    *((half, torch.float32) for half in HALVES),
    *((half, half) for half in HALVES),
)
OTHER_PAIRS = ((torch.float64, torch.float64), (torch.float32, torch.bfloat16))
# the kernel, the dtypes of pred and target, and the reductions that it computes
KERNELS = [
    *itertools.product(["planar", "interleaved"], VECTOR_PAIRS, [("mean", "positive")]),
    *itertools.product(["general"], VECTOR_PAIRS, [("mean", "cell", "none")]),
    *itertools.product(["strided"], VECTOR_PAIRS + OTHER_PAIRS, [("mean", "cell")]),
]

each_kernel = pytest.mark.parametrize(("kernel", "dtypes", "reductions"), KERNELS, ids=str)


def inputs_of(
    kernel: str, pred_dtype: torch.dtype, target_dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`(pred, target, settings)` for which that kernel is chosen, on several blocks."""
    shape = (5, 7, 13, 13) if kernel == "strided" else (5, 7, 32, 32)
    pred, target = make_batch(
        shape, dtype=pred_dtype, target_dtype=target_dtype, ignored=0.1, requires_grad=False
    )
    if kernel == "interleaved":
        pred, target = (
            each.contiguous(memory_format=torch.channels_last) for each in (pred, target)
        )
    settings = {"negative_weight": 0.25, "coord_weight": [1.0, 2.0, 0.5, 1.0, 3.0, 1.0]}
    settings["ignore_value"] = -1.0
    if kernel == "general":
        settings["weight"] = make_weight((5, 1, 32, 32), device="cuda")
    return pred.cuda().requires_grad_(), target.cuda().requires_grad_(), settings


@pytest.mark.sanitizer
@each_kernel
def test_every_kernel_against_the_loops(
    kernels: Implementation,
    kernel: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    reductions: tuple[str, ...],
) -> None:
    """Forward, the gradient that it writes, and both gradients computed by backward."""
    pred, target, settings = inputs_of(kernel, *dtypes)
    wide = loss_dtype(*dtypes)
    for reduction in reductions:
        loss, stats = kernels.loss(pred, target, reduction=reduction, return_stats=True, **settings)
        truth = oracle.fcrn_loss(pred, target, reduction=reduction, grad_output=2.0, **settings)
        assert_loss(loss, truth.loss, wide)
        assert_loss(stats.coord, truth.coord, wide)
        assert stats.num_positive.item() == truth.num_positive
        grad_output = torch.full(loss.shape, 2.0, dtype=wide).cuda()
        for _ in range(2):
            grads = torch.autograd.grad(loss, (pred, target), grad_output, retain_graph=True)
            assert_gradient(grads[0], truth.grad, dtypes[0])
            assert_gradient(grads[1], -truth.grad, dtypes[1])


@pytest.mark.sanitizer
@pytest.mark.parametrize("weight_shape", [(5, 1, 32, 32), (5, 7, 32, 32), (1, 7, 1, 1)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_every_kernel_of_the_masked_loss(
    kernels: Implementation,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    weight_shape: tuple[int, ...],
) -> None:
    pred, target, _ = inputs_of("planar", dtype, dtype)
    weight = make_weight(weight_shape, weight_dtype, device="cuda")
    loss = kernels.masked_loss(pred, target, weight)
    value, gradient = oracle.masked_mse_loss(pred, target, weight, grad_output=2.0)
    assert_loss(loss, value, loss_dtype(dtype, dtype))
    grad_output = torch.full((), 2.0, dtype=loss.dtype).cuda()
    grads = torch.autograd.grad(loss, (pred, target), grad_output)
    assert_gradient(grads[0], gradient, dtype)
    assert_gradient(grads[1], -gradient, dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(0, 7, 4, 4), (0, 4, 2), (2, 7, 0, 4), (2, 7, 4, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_empty_inputs(kernels: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """With every tensor that a call may have; `positive` has one map."""
    pred = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
    target = torch.rand_like(pred)
    cells = (shape[0], 1, *shape[2:])
    for weight_shape, reduction in itertools.product((None, (), cells, shape), REDUCTIONS):
        settings: dict[str, Any] = {"reduction": reduction}
        if weight_shape is not None:
            settings["weight"] = torch.ones(weight_shape, dtype=dtype, device="cuda")
            settings["positive"] = torch.ones(cells, dtype=torch.bool, device="cuda")
            settings["negative_weight"] = torch.tensor(0.5, dtype=torch.float64, device="cuda")
        loss, stats = kernels.loss(pred, target, return_stats=True, **settings)
        torch.cuda.synchronize()
        (grad,) = torch.autograd.grad(2 * loss.sum(), pred)
        torch.cuda.synchronize()
        assert grad.shape == shape
        assert stats.num_positive.item() == 0
        if reduction in ("sum", "positive"):
            assert loss.item() == 0


@each_kernel
def test_the_kernel_that_is_meant_is_run(
    kernels: Implementation,
    kernel: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    reductions: tuple[str, ...],
) -> None:
    """The two tests above reach the kernels that they name."""
    pred, target, settings = inputs_of(kernel, *dtypes)
    for reduction in reductions:
        names = kernel_names(
            lambda reduction=reduction: kernels.loss(pred, target, reduction=reduction, **settings)
        )
        wanted = "planar" if kernel == "general" else kernel
        assert [name for name in names if f"{wanted}_kernel" in name] == names, names


# ---- sizes at which a float64 loss on the device is the truth ------------------------------------


def check_image_by_image(
    kernels: Implementation, pred: Tensor, target: Tensor, reduction: str, grad_output: float
) -> None:
    """Loss and gradient of a batch against the definition in float64, an image at a time."""
    pred.requires_grad_()
    loss = kernels.loss(pred, target, negative_weight=0.25, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, grad_output))
    divisor = pred.numel() if reduction == "mean" else 1
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    eps, smallest = torch.finfo(grad.dtype).eps, torch.finfo(grad.dtype).smallest_normal
    for image in range(len(pred)):
        wide = pred.detach()[image : image + 1].double().requires_grad_()
        wide_target = target[image : image + 1].double()
        truth = fcrn_fused.reference.fcrn_loss(
            wide, wide_target, negative_weight=0.25, reduction="sum"
        )
        (want,) = torch.autograd.grad(truth * (grad_output / divisor), wide)
        total += truth.detach() / divisor
        _, exponent = torch.frexp(want)
        least = 1 + round(math.log2(smallest))
        ulp = torch.ldexp(torch.full_like(want, eps), exponent.clamp(min=least) - 1)
        distance = (grad[image : image + 1].double() - want).abs() / ulp
        assert distance.max().item() <= GRADIENT_ULPS[grad.dtype], image
        assert (grad[image : image + 1][want == 0] == 0).all(), image
    assert loss.item() == pytest.approx(total.item(), rel=LOSS_RTOL[loss.dtype], abs=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", GRADIENT_ULPS, ids=str)
@pytest.mark.parametrize(("reduction", "grad_output"), [("sum", 0.75), ("mean", 65536.0)])
def test_a_dense_grid(
    kernels: Implementation,
    reduction: str,
    grad_output: float,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """65536 is the scale of a GradScaler: no gradient of float16 is flushed to 0."""
    pred, target = make_batch((64, 7, 128, 128), dtype=dtype, positives=0.02, requires_grad=False)
    pred, target = (each.contiguous(memory_format=layout).cuda() for each in (pred, target))
    check_image_by_image(kernels, pred, target, reduction, grad_output)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_2_to_the_31_elements(
    kernels: Implementation, layout: torch.memory_format
) -> None:
    needs_memory("cuda", 24)
    shape = (64, 7, 2200, 2200)
    generator = torch.Generator("cuda").manual_seed(0)
    pred, target = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_(
            generator=generator
        )
        for _ in range(2)
    )
    for image in target:
        image[-1].copy_(torch.rand(image[-1].shape, generator=generator, device="cuda") < 0.02)
    assert pred.numel() > 2**31
    check_image_by_image(kernels, pred, target, "sum", 1.0)


def test_two_hundred_runs_give_the_same_bits(kernels: Implementation) -> None:
    pred, target = make_batch((64, 7, 128, 128), device="cuda", positives=0.02)
    want = kernels.loss(pred, target, return_stats=True)
    want = (want[0], *want[1], *torch.autograd.grad(want[0], pred))
    for _ in range(200):
        loss, stats = kernels.loss(pred, target, return_stats=True)
        got = (loss, *stats, *torch.autograd.grad(loss, pred))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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
    """The kernels that `run` launches.

    Left out are autograd's own fill of ones, copies, and the memset of the four bytes by which the
    blocks of a launch count each other.
    """
    run()  # what is set up at the first call is not counted
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    left_out = ("Memcpy", "Memset", "FillFunctor")
    return [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not any(each in event.name for each in left_out)
    ]


@pytest.mark.parametrize("shape", [SHAPE, (16, 7, 16, 16), (64, 7, 128, 128)], ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_is_two_launches(
    kernels: Implementation, dtype: torch.dtype, reduction: str, shape: tuple[int, ...]
) -> None:
    module = kernels.module(negative_weight=0.1, reduction=reduction)
    pred, target = make_batch(shape, dtype=dtype, device="cuda")
    for grad_output in (None, torch.tensor(3.0, device="cuda")):
        names = kernel_names(
            lambda grad_output=grad_output: torch.autograd.grad(
                module(pred, target), pred, grad_output
            )
        )
        assert 1 <= len(names) <= 2, names
        assert all("fcrn::" in name for name in names), names


def test_a_loss_without_gradient_is_one_launch(kernels: Implementation) -> None:
    pred, target = make_batch(SHAPE, device="cuda", requires_grad=False)
    names = kernel_names(lambda: kernels.loss(pred, target, return_stats=True))
    assert len(names) == 1, names


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_waits_for_the_device(cuda: Implementation, reduction: str) -> None:
    module = cuda.module(negative_weight=0.1, reduction=reduction, return_stats=True)
    schedule = fcrn_fused.StepNegativeWeight(module, step_size=1)
    pred = torch.randn(SHAPE, device="cuda", requires_grad=True)
    target = torch.rand(SHAPE, device="cuda", requires_grad=True)
    mask = target.detach() > 0.5
    with no_synchronisation():
        for settings in ({}, {"coord_weight": [1.0] * 6, "ignore_value": -1.0}, {"weight": mask}):
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
        torch.autograd.grad(cuda.masked_loss(pred, target, mask), (pred, target))


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


def test_four_streams_that_nobody_waits_for(cuda: Implementation) -> None:
    """Launched from one thread, they overlap on the device; each gives the bits it gives alone."""
    inputs = [make_batch((32, 7, 96, 96), device="cuda", seed=seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in inputs]

    def step(pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, stats = cuda.loss(pred, target, return_stats=True)
        return (loss.detach(), *stats, *torch.autograd.grad(loss, pred))

    wanted = [step(*each) for each in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*each))
        torch.cuda.synchronize()
        for got, want in zip(results, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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
