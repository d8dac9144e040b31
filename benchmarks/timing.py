"""How long a call takes and how much memory it needs at its peak."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch.utils.benchmark import Timer, timer

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log is no part of a table

_SLOW = 0.2  # seconds: a call that needs no warming up

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


# Of mallopt(3), and the largest number that it takes for either.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT, _LARGEST_KEPT = 2**31 - 1, 32 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, in blocks of up to 32 MB; True if it does.

    Else it is chance whether a tensor of some MB gets memory that the process has already or new
    memory, whose first touch costs more than the writing. Larger ones are always new.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another allocator
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    )


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


def wall_clock(
    calls: Mapping[Key, Call],
    *,
    rounds: int,
    round_seconds: float,
    threads: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Seconds a call on the host's clock, one number a round, from `torch.utils.benchmark`.

    Rounds are interleaved: every call is timed once (as often as fits in `round_seconds`) before
    any is timed again, forwards and backwards in turn, so that a machine that grows slower or
    a neighbour that leaves the cache full touches all alike. On a GPU the clock stops when the
    device has finished. Two calls before each round warm up, but for calls of more than 0.2 s.
    """
    rounds_of = {
        key: _round_timer(call, round_seconds=round_seconds, threads=threads)
        for key, call in calls.items()
    }
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(rounds):
        keys = list(rounds_of)
        for key in keys if round_ % 2 == 0 else reversed(keys):
            seconds[key].append(rounds_of[key]())
            progress()
    return seconds


def _round_timer(call: Call, *, round_seconds: float, threads: int) -> Callable[[], float]:
    """A function that times one round of a call: mean seconds, as often as fits in the round."""

    def once() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            start = timer()
            call()
            return float(timer() - start)
        finally:
            torch.set_num_threads(before)

    if once() > _SLOW:
        return once
    many = Timer("call()", globals={"call": call}, num_threads=threads)
    estimate = many.timeit(1).mean
    if estimate < round_seconds / 10:
        estimate = many.timeit(max(1, int(round_seconds / 10 / estimate))).mean
    often = max(1, math.ceil(round_seconds / estimate))
    return lambda: float(many.timeit(often).mean)


def graph_replays(
    calls: Mapping[Key, Sequence[Call]],
    *,
    rounds: int,
    round_seconds: float,
    progress: Callable[[], object] = lambda: None,
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Seconds a call on a CUDA device, by replaying a graph; and why a call could not be captured.

    The calls of one key do the same on different inputs: together in one graph, so that the inputs
    of a small case do not stay in the cache. Rounds are interleaved as in `wall_clock`.
    """
    graphs: dict[Key, torch.cuda.CUDAGraph] = {}
    failures: dict[Key, str] = {}
    for key, same in calls.items():
        try:
            graphs[key] = capture(same)
        except RuntimeError as error:  # out of memory, or something that cannot be captured
            failures[key] = str(error).split("\n")[0]
            torch.cuda.synchronize()
    often = {
        key: max(1, math.ceil(round_seconds / max(1e-7, _replay(graph, 3))))
        for key, graph in graphs.items()
    }
    seconds: dict[Key, list[float]] = {key: [] for key in graphs}
    for round_ in range(rounds):
        keys = list(graphs)
        for key in keys if round_ % 2 == 0 else reversed(keys):
            seconds[key].append(_replay(graphs[key], often[key]) / len(calls[key]))
            progress()
    return seconds, failures


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Capture calls, one after another, in a CUDA graph, after three of each to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Seconds of one replay on the device's clock, the mean of `times` after one to warm up."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes above what was allocated before, at the peak of one call, from PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
