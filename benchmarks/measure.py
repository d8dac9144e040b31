"""How long a call takes, the memory it needs at its peak, and where and when that was measured."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # for fcrn_fused where it is built in place, and for examples/
    sys.path.append(str(ROOT))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

Call = Callable[[], object]
Timer = Callable[[int], float]  # seconds that so many calls take


class Quartiles(NamedTuple):
    """Seconds a call: median and quartiles over rounds."""

    median: float
    low: float
    high: float


def quartiles(seconds: Sequence[float]) -> Quartiles:
    """Median and quartiles of the rounds (of a single round, that round)."""
    if len(seconds) == 1:
        return Quartiles(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Quartiles(median, low, high)


def interleaved(
    timers: Mapping[str, Timer], rounds: int, round_seconds: float
) -> dict[str, list[float]]:
    """Seconds a call, one number a round.

    Every call is timed once, as often as fits in `round_seconds`, before any is timed again,
    forwards and backwards in turn: a machine that grows slower or a neighbour that leaves the cache
    full affects all alike.
    """
    often = {name: _fitting(timer, round_seconds) for name, timer in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            for name in timers if round_ % 2 == 0 else reversed(timers):
                if often[name] > 1:
                    timers[name](2)  # warms up
                seconds[name].append(timers[name](often[name]) / often[name])
    finally:
        gc.enable()
    return seconds


def _fitting(timer: Timer, seconds: float) -> int:
    """How many calls take about `seconds`."""
    times = 1
    while (taken := timer(times)) < seconds / 10 and times < 10**6:
        times = max(2 * times, min(100 * times, math.ceil(times * seconds / 10 / max(taken, 1e-9))))
    return max(1, round(seconds * times / taken))


def host_timer(call: Call, device: torch.device) -> Timer:
    """On the host's clock, which stops when the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run(times: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return time.perf_counter() - start

    return run


def graph_timer(calls: Sequence[Call]) -> Timer:
    """On the device's clock, replaying a CUDA graph of all the calls; the time of one of them.

    The calls do the same on different inputs, so that those of a small case are not all in the
    cache. Capture raises RuntimeError for what cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls[:1], *calls[:1]]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run(times: int) -> float:
        replays = math.ceil(times / len(calls))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 * times / (replays * len(calls))

    return run


class Allocations(NamedTuple):
    """Bytes from PyTorch's allocator: held at the peak, above those before, and in all."""

    peak: int
    total: int


def allocations(call: Call, device: torch.device) -> Allocations:
    """What one call takes; its result is held until the end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_stats(device)
        del result
        return Allocations(
            after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"],
            after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"],
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = total = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
        total += max(0, change)
    return Allocations(peak, total)


# ---- where a figure comes from ------------------------------------------------------------------


def describe_run(device: torch.device) -> dict[str, Any]:
    """Device, versions, date (UTC) and commit of a run; no host names and no paths."""
    import fcrn_fused

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "git_commit": git_commit(),
        "load_before": round(os.getloadavg()[0], 2),
        "device": describe_device(device),
        "versions": {
            "fcrn_fused": fcrn_fused.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _installed("triton"),
            "python": platform.python_version(),
        },
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """The model of the CPU or GPU and what its speed depends on."""
    cores = len(os.sched_getaffinity(0))
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": _cpu_model(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        }
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": (_output(*query) or "unknown").split("\n")[0],
        "host_cpu": _cpu_model(),
        "host_cores": cores,
    }


def device_name(device: dict[str, Any]) -> str:
    """A device in a few words: `NVIDIA H200` or `CPU (AMD EPYC), 2 threads`."""
    threads = f"CPU ({device['name']}), {device.get('threads')} threads"
    return threads if device["type"] == "cpu" else str(device["name"])


def git_commit() -> str | None:
    """Short hash of the checkout, with -dirty where the code differs; else GIT_COMMIT, if set."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("GIT_COMMIT")
    status = ("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    changed = _output(*status, "--", ":/", ":(exclude,top)benchmarks/results")
    return commit + ("-dirty" if changed else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line for line in lines if line.startswith("model name")), "")
    return model.partition(":")[2].strip() or platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record so that it can be read in a diff: a line for each row of a list."""
    lines = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # a process that is ended leaves no half of a file
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(path)


def read_json(path: Path, benchmark: str) -> dict[str, Any]:
    """Read a record that `benchmark` wrote.

    Raises:
        ValueError: no such file, not JSON, or not of this benchmark; the message says which.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("benchmark") != benchmark:
        raise ValueError(f"{path}: is not a result of {benchmark}.py")
    return record
