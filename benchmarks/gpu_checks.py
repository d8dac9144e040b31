"""What has to be seen on a GPU itself, a check a process: `gpu.py` runs them all.

    python benchmarks/gpu_checks.py graph_replay

A process runs one check, so that a kernel that fails takes no other check with it. Its standard
output is JSON, a line an entry: `{"status": "passed" | "failed" | "skipped", "detail": ...}` comes
last; timings and other figures before it, as they are made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loss_speed
import provenance
import workloads
from fcrn_fused import FCRNLoss, StepNegativeWeight, fcrn_loss, reference
from workloads import Case

GRADIENT_ULPS = {torch.float64: 4, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
LOSS_RTOL = 1e-6
DEVICE = torch.device("cuda")
OUR_KERNELS = "fcrn::"  # the namespace all of them are in
MARKER_KERNEL = "spin_kernel"  # of torch.cuda._sleep, launched between two cases

OVER_2_31 = (64, 7, 2200, 2200)
# 1.9 GB a tensor in float32: what a cache holds back of it does not count
DRAM_SIZE = workloads.HUGE_SIZE
DRAM_CASES = (
    # pattern, dtype, layout, pass
    ("clustered:2", "float32", "contiguous", "step"),
    ("scattered:2", "float32", "contiguous", "step"),
    ("none", "float32", "contiguous", "step"),
    ("all", "float32", "contiguous", "step"),
    ("clustered:2", "bfloat16", "contiguous", "step"),
    ("scattered:2", "bfloat16", "contiguous", "step"),
    ("clustered:2", "float16", "contiguous", "step"),
    ("clustered:2", "float32", "channels_last", "step"),
    ("none", "float32", "contiguous", "no_grad"),
    ("clustered:2", "float32", "contiguous", "no_grad"),
)

Entry = dict[str, Any]


class CheckFailedError(Exception):
    """A check that ran and found something wrong."""


class CheckSkippedError(Exception):
    """A check that cannot be run here, with the reason."""


def checked(
    pred: Tensor, target: Tensor, grad_output: float = 1.0, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the fused loss on the device, held against the definition in float64.

    Raises:
        CheckFailedError: the loss is off by more than 1e-6 of itself, or a gradient by more than
            4 units in the last place (2 in the half types).
    """
    leaf = pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = fcrn_loss(leaf, target, backend="fused", **settings)
    assert isinstance(loss, Tensor)
    loss.backward(torch.full_like(loss, grad_output))
    wide = pred.detach().double().requires_grad_()
    settings = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in settings.items()
    }
    true_loss = reference.fcrn_loss(wide, target.double(), **settings)
    assert isinstance(true_loss, Tensor)
    true_loss.backward(torch.full_like(true_loss, grad_output))
    assert leaf.grad is not None
    assert wide.grad is not None
    check_close(loss, true_loss, leaf.grad, wide.grad)
    return loss.detach(), leaf.grad


def check_close(loss: Tensor, true_loss: Tensor, grad: Tensor, true_grad: Tensor) -> None:
    """Raises CheckFailedError where loss or gradient is further from the truth than promised."""
    error = (loss.double() - true_loss).abs().sum() / true_loss.abs().sum().clamp(min=1e-300)
    if not error <= LOSS_RTOL:
        raise CheckFailedError(f"the loss is off by {error.item():.2e} of itself")
    finfo = torch.finfo(grad.dtype)
    _, exponent = torch.frexp(true_grad)
    ulp = torch.ldexp(
        torch.full_like(true_grad, finfo.eps),
        (exponent - 1).clamp(min=round(math.log2(finfo.smallest_normal))),
    )
    distance = ((grad.double() - true_grad).abs() / ulp).max().item()
    if not distance <= GRADIENT_ULPS[grad.dtype]:
        raise CheckFailedError(f"a gradient of {grad.dtype} is off by {distance:.2f} ulp")


def random_batch(
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    positive: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """pred and target, drawn on the CPU and copied, so that every byte is known to be written."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(size, generator=generator)
    target = torch.randn(size, generator=generator)
    target[:, -1] = (torch.rand(target[:, -1].shape, generator=generator) < positive).float()
    device = device or DEVICE
    return pred.to(dtype).to(device), target.to(dtype).to(device)


# ---- checks -------------------------------------------------------------------------------------


def selection() -> Iterator[Entry]:
    """A short selection through every kernel: for the sanitizers."""
    weight = torch.tensor(0.01)
    count = 0
    for size in ((2, 7, 16, 16), (3, 7, 13, 13), (2, 7, 33), (1, 1, 5, 5), (5, 3, 40, 40)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            pred, target = random_batch(size, dtype)
            for reduction in ("mean", "positive", "cell", "none"):
                settings: dict[str, Any] = {"reduction": reduction, "ignore_value": -1.0}
                settings["negative_weight"] = weight.to(DEVICE) if reduction == "mean" else 0.5
                _run(pred, target, settings)
                count += 1
    pred, target = random_batch((2, 7, 24, 24))
    last = torch.channels_last
    for its_pred, its_target in (
        (pred.contiguous(memory_format=last), target.contiguous(memory_format=last)),
        (pred.contiguous(memory_format=last), target),
        (pred.transpose(2, 3), target),
        (_misaligned(pred), _misaligned(target)),
        (pred.half(), target),
        (pred, target[:1].expand_as(pred)),
    ):
        _run(its_pred, its_target, {"coord_weight": torch.linspace(0, 2, 6)})
        count += 1
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    yield {"status": "passed", "detail": f"{count} steps ran"}


def _run(pred: Tensor, target: Tensor, settings: dict[str, Any]) -> None:
    pred = pred.detach().requires_grad_()
    target = target.detach().requires_grad_()
    loss, _ = fcrn_loss(pred, target, backend="fused", return_stats=True, **settings)
    grad_output = torch.full(loss.shape, 2.0, dtype=loss.dtype).to(loss.device)
    loss.backward(grad_output, retain_graph=True)
    loss.backward(grad_output)


def _misaligned(tensor: Tensor) -> Tensor:
    memory = torch.zeros(tensor.numel() + 1).to(tensor)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def accuracy() -> Iterator[Entry]:
    """Loss and gradient against float64: dtypes, reductions, layouts, loss scales."""
    count = 0
    for size in ((4, 7, 16, 16), (3, 7, 13, 13), (8, 7, 128, 128)):
        for dtype in GRADIENT_ULPS:
            for layout in workloads.LAYOUTS.values():
                pred, target = (
                    tensor.contiguous(memory_format=layout) for tensor in random_batch(size, dtype)
                )
                for reduction in ("mean", "sum", "batchmean", "positive", "cell", "none"):
                    for grad_output in (1.0, 16384.0):
                        # in float16 a gradient of "sum" times a loss scale is an overflow
                        scaled = grad_output != 1 and dtype is torch.float16
                        if not (scaled and reduction in ("sum", "none", "batchmean", "positive")):
                            weight = torch.tensor(0.01, device=DEVICE)
                            checked(
                                pred,
                                target,
                                grad_output,
                                negative_weight=weight,
                                reduction=reduction,
                            )
                            count += 1
    yield {"status": "passed", "detail": f"{count} steps within their ulps of float64"}


def determinism() -> Iterator[Entry]:
    """The same bits from run to run."""
    pred, target = random_batch((64, 7, 128, 128))
    first = _bits(pred, target)
    for _ in range(200):
        if not all(torch.equal(a, b) for a, b in zip(first, _bits(pred, target), strict=True)):
            raise CheckFailedError("two runs on the same input differ")
    yield {"status": "passed", "detail": "200 runs of (64, 7, 128, 128), the same bits"}


def _bits(pred: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    leaf = pred.detach().requires_grad_()
    loss, stats = fcrn_loss(leaf, target, backend="fused", return_stats=True, **settings)
    loss.backward()
    assert leaf.grad is not None
    return (loss.detach(), *stats, leaf.grad)


def graph_replay() -> Iterator[Entry]:
    """A captured step, replayed while the weight is annealed: each replay with the new weight."""
    pred, target = random_batch((16, 7, 32, 32))
    pred.requires_grad_()
    module = FCRNLoss(backend="fused").cuda()
    schedule = StepNegativeWeight(module, gamma=2.0, step_size=1)

    def step() -> Tensor:
        pred.grad = None
        loss = module(pred, target)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    assert pred.grad is not None
    for _ in range(8):
        with torch.no_grad():
            pred.normal_()
        graph.replay()
        wide = pred.detach().double().requires_grad_()
        weight = module.negative_weight.double()
        true_loss = reference.fcrn_loss(wide, target.double(), negative_weight=weight)
        true_loss.backward()
        assert wide.grad is not None
        check_close(loss, true_loss, pred.grad, wide.grad)
        schedule.step()
    yield {"status": "passed", "detail": "8 replays, each with a weight and predictions of its own"}


def streams() -> Iterator[Entry]:
    """Four streams at once give what each gives alone, to the bit."""
    batches = [random_batch((32, 7, 96, 96), seed=seed) for seed in range(4)]
    alone = [_bits(pred, target) for pred, target in batches]
    every = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(100):
        together = []
        for stream, (pred, target) in zip(every, batches, strict=True):
            with torch.cuda.stream(stream):
                together.append(_bits(pred, target))
        torch.cuda.synchronize()
        for wanted, got in zip(alone, together, strict=True):
            if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
                raise CheckFailedError("a stream among four gives other bits than alone")
    yield {"status": "passed", "detail": "100 rounds on 4 streams, the same bits as alone"}


def several_gpus() -> Iterator[Entry]:
    """The tensor's device is used, whichever is the current one."""
    count = torch.cuda.device_count()
    if count < 2:
        raise CheckSkippedError("there is one GPU")
    wanted = [tensor.cpu() for tensor in _bits(*random_batch((8, 7, 64, 64), device="cuda:0"))]
    for index in range(1, count):
        with torch.cuda.device(0):
            got = _bits(*random_batch((8, 7, 64, 64), device=f"cuda:{index}"))
            torch.cuda.synchronize(index)
        if any(tensor.device.index != index for tensor in got):
            raise CheckFailedError(f"a result for cuda:{index} is not there")
        checked(*random_batch((8, 7, 64, 64), device=f"cuda:{index}"))
        same_model = torch.cuda.get_device_name(index) == torch.cuda.get_device_name(0)
        if same_model and not all(
            torch.equal(a, b.cpu()) for a, b in zip(wanted, got, strict=True)
        ):
            raise CheckFailedError(f"cuda:{index} gives other bits than cuda:0")
    yield {"status": "passed", "detail": f"{count} GPUs, each used while another was current"}


def huge() -> Iterator[Entry]:
    """More than 2^31 elements, held against the definition image by image."""
    size = OVER_2_31
    elements = math.prod(size)
    wanted = 5 * 2 * elements
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        raise CheckSkippedError(
            f"needs {wanted / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}"
        )
    for layout in ("contiguous", "channels_last"):
        pattern = workloads.parse_pattern("clustered:2")
        case = Case(size, pattern, "bfloat16", layout, torch.get_num_threads())
        inputs = workloads.make_inputs(case, DEVICE)
        loss = fcrn_loss(inputs.pred, inputs.target, reduction="sum", backend="fused")
        assert isinstance(loss, Tensor)
        loss.backward()
        assert inputs.pred.grad is not None
        total = 0.0
        for image in range(size[0]):
            pred = inputs.pred.detach()[image : image + 1].double().requires_grad_()
            target = inputs.target[image : image + 1].double()
            true_loss = reference.fcrn_loss(pred, target, reduction="sum")
            true_loss.backward()
            assert pred.grad is not None
            grad = inputs.pred.grad[image : image + 1]
            check_close(true_loss, true_loss, grad, pred.grad)
            total += true_loss.item()
        if not abs(loss.item() - total) <= LOSS_RTOL * total:
            raise CheckFailedError(
                f"{layout}: the loss is {loss.item()}, that of its images {total}"
            )
        del inputs, loss, grad
        torch.cuda.empty_cache()
    yield {"status": "passed", "detail": f"{elements} elements in bfloat16, both layouts"}


def grad_scaler() -> Iterator[Entry]:
    """float16 under a GradScaler with a scale of 65536: no gradient is flushed or coarsened."""
    pred, target = random_batch((64, 7, 128, 128), torch.float16)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=65536.0)
    parameter = pred.float().requires_grad_()  # a scaler takes float32 parameters only
    half = parameter.half()
    half.retain_grad()
    weight = torch.tensor(0.01, device=DEVICE)
    loss = fcrn_loss(half, target, negative_weight=weight, backend="fused")
    scaler.scale(loss).backward()
    wide = pred.double().requires_grad_()
    true_loss = reference.fcrn_loss(wide, target.double(), negative_weight=weight.double())
    (true_loss * 65536.0).backward()
    assert half.grad is not None
    assert wide.grad is not None
    check_close(loss, true_loss, half.grad, wide.grad)
    smallest = torch.finfo(torch.float16).smallest_normal
    flushed = int(((half.grad == 0) & (wide.grad.abs() >= smallest)).sum())
    if flushed:
        raise CheckFailedError(f"{flushed} gradients that float16 can hold were flushed to 0")
    before = parameter.detach().clone()
    scaler.step(torch.optim.SGD([parameter], lr=1.0))
    scaler.update()
    if torch.equal(parameter, before) or scaler.get_scale() != 65536.0:
        raise CheckFailedError("the scaler found an infinity and skipped the step")
    yield {"status": "passed", "detail": "scale 65536, gradients within 2 ulp, the step was taken"}


def launches() -> Iterator[Entry]:
    """Launches of ours, all launches and synchronisations a step, from torch.profiler."""
    steps = 10
    most = 0
    for size in (workloads.FCRN_SIZES[0], workloads.DENSE_SIZES[1]):
        for dtype, scaled in (("float32", False), ("float32", True), ("float16", True)):
            pattern = workloads.parse_pattern("clustered:2")
            case = Case(size, pattern, dtype, "contiguous", torch.get_num_threads())
            inputs = workloads.make_inputs(case, DEVICE)
            name = "ours-scaled" if scaled else "ours"
            function = loss_speed.loss_function(name, DEVICE, "fused")
            step = loss_speed.make_call(name, function, inputs, "step", case, None)
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            activities = [
                torch.profiler.ProfilerActivity.CPU,
                torch.profiler.ProfilerActivity.CUDA,
            ]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(steps):
                    step()
            counts = count_events([_name_and_kind(event) for event in profile.events()], steps)
            counts = {"size": list(size), "dtype": dtype, "grad_output": scaled} | counts
            yield {"figure": "launches", **counts}
            most = max(most, counts["our_launches"])
            if counts["our_launches"] == 0:
                raise CheckFailedError("the profiler saw no launch of ours")
            # leaving the profiler waits for the device once
            if counts["synchronisations"] > 1 / steps:
                raise CheckFailedError(f"a step synchronises: {counts}")
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    if most > 2:
        raise CheckFailedError(f"a step takes {most:g} launches of ours, 2 are allowed")
    yield {"status": "passed", "detail": f"at most {most:g} launches of ours a step, no wait"}


def _name_and_kind(event: Any) -> tuple[str, bool]:
    on_device = str(event.device_type).endswith("CUDA")
    return event.name, on_device


def count_events(events: Sequence[tuple[str, bool]], steps: int) -> dict[str, Any]:
    """Launches and synchronisations a step, from (name, whether on the device) of each event."""
    kernels = [name for name, on_device in events if on_device]
    waits = [
        name
        for name, on_device in events
        if (not on_device and "Synchronize" in name) or name == "cudaMemcpy"
    ]
    ours = [name for name in kernels if OUR_KERNELS in name]
    return {
        "our_launches": len(ours) / steps,
        "all_launches": len(kernels) / steps,
        "synchronisations": len(waits) / steps,
        "others": sorted({name for name in kernels if OUR_KERNELS not in name}),
    }


def dram() -> Iterator[Entry]:
    """The workload whose DRAM traffic `ncu` reads: a marker kernel before each case."""
    for pattern, dtype, layout, pass_ in DRAM_CASES:
        case = Case(
            DRAM_SIZE, workloads.parse_pattern(pattern), dtype, layout, torch.get_num_threads()
        )
        inputs = workloads.make_inputs(case, DEVICE)
        function = loss_speed.loss_function("ours", DEVICE, "fused")
        step = loss_speed.make_call("ours", function, inputs, pass_, case, None)
        torch.cuda._sleep(1000)
        step()
        torch.cuda.synchronize()
        expected = workloads.expected_bytes_per_cell(case, inputs.positive, pass_, "cuda")
        yield {"figure": "dram", "case": case.as_json(), "pass": pass_, "expected": expected}
        del inputs, step
        torch.cuda.empty_cache()
    yield {"status": "passed", "detail": f"{len(DRAM_CASES)} cases"}


def speed_plans(backend: str = "fused") -> list[loss_speed.Plan]:
    """What `speed` times, the most wanted first; a compiler's modes where they can matter."""
    every = loss_speed.default_cases(DEVICE, torch.get_num_threads())
    plain = [case for case in every if _is_plain(case)]
    others = [case for case in every if case not in plain]
    small = [case for case in plain if case.size in workloads.FCRN_SIZES]
    large = [case for case in plain if case.cells >= 4 * 2**20]
    middle = [case for case in plain if case not in small + large]
    peers = ["ours", "mse_loss", "eager", "compile", "floor"]
    step, no_grad = ["step"], ["no_grad"]
    return [
        loss_speed.Plan(large, [*peers, "compile-max-autotune"], step, 7, 0.05, backend),
        loss_speed.Plan(small, [*peers, "compile-reduce-overhead"], step, 7, 0.05, backend),
        loss_speed.Plan(others, ["ours", "mse_loss", "floor"], step, 5, 0.05, backend),
        loss_speed.Plan(large, ["ours", "mse_loss", "floor"], no_grad, 5, 0.05, backend),
        loss_speed.Plan(middle, peers, step, 5, 0.05, backend),
        loss_speed.Plan(large, ["ours-scaled", "floor"], step, 5, 0.05, backend),
        loss_speed.Plan(others, ["compile"], step, 5, 0.05, backend),
        loss_speed.Plan(small + others, ["ours", "mse_loss", "floor"], no_grad, 5, 0.05, backend),
    ]


def _is_plain(case: Case) -> bool:
    return (str(case.pattern), case.dtype, case.layout) == ("clustered:2", "float32", "contiguous")


def speed() -> Iterator[Entry]:
    """The cases of loss_speed.py, a row as each is finished."""
    rows = 0
    failures = []
    for plan in speed_plans():
        for case in plan.cases:
            for row in loss_speed.measure_case(plan, case, DEVICE):
                yield {"figure": "speed", **row}
                rows += 1
                if row.get("failure") and row["contender"].startswith("ours"):
                    failures.append(f"{row['contender']}: {row['failure']}")
            torch.cuda.empty_cache()
    if failures:
        raise CheckFailedError("; ".join(failures))
    yield {"status": "passed", "detail": f"{rows} rows"}


def machine() -> Iterator[Entry]:
    """The device and the versions."""
    yield {"figure": "machine", **provenance.describe_run(DEVICE)}
    yield {"status": "passed", "detail": torch.cuda.get_device_name()}


class Check(NamedTuple):
    """A check, and what it is called in a report."""

    run: Callable[[], Iterator[Entry]]
    title: str


CHECKS = {
    "machine": Check(machine, "device and versions"),
    "selection": Check(selection, "a short selection through every kernel"),
    "accuracy": Check(accuracy, "loss and gradients against float64"),
    "determinism": Check(determinism, "the same bits from run to run"),
    "graph_replay": Check(graph_replay, "CUDA-graph replay with an annealed weight"),
    "streams": Check(streams, "four streams at once"),
    "several_gpus": Check(several_gpus, "several GPUs"),
    "huge": Check(huge, "more than 2^31 elements"),
    "grad_scaler": Check(grad_scaler, "float16 under GradScaler"),
    "launches": Check(launches, "launches and synchronisations a step"),
    "dram": Check(dram, "workload for DRAM traffic"),
    "speed": Check(speed, "speed beside F.mse_loss, eager, torch.compile and a copy"),
}


def run_check(check: Check) -> Iterator[Entry]:
    """The entries of a check; an exception becomes its last entry."""
    try:
        yield from check.run()
    except CheckSkippedError as reason:
        yield {"status": "skipped", "detail": str(reason)}
    except Exception as error:  # whatever it is, the report has to say it
        what = "" if isinstance(error, CheckFailedError) else f"{type(error).__name__}: "
        yield {"status": "failed", "detail": f"{what}{error}".strip()[:2000]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_checks.py", description=__doc__)
    parser.add_argument("check", choices=list(CHECKS))
    name = parser.parse_args(arguments).check
    if not torch.cuda.is_available():
        parser.error("this PyTorch finds no CUDA device")
    status = "failed"
    for entry in run_check(CHECKS[name]):
        print(json.dumps(entry), flush=True)
        status = entry.get("status", status)
    return 1 if status == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
