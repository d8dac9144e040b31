"""The bars that the loss is held against, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from workloads import DENSE_SIZES, FCRN_SIZES, HUGE_SIZE, Case

_MI = 2**20
_HALVES = ("bfloat16", "float16")


class Bar(NamedTuple):
    """A promise, the least (or the most) that meets it, and what was measured."""

    promise: str
    wanted: float
    at_least: bool
    measured: float

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


class Timings:
    """The rows of a run, to be asked for by case, contender, pass and clock."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = {
            (Case.from_json(row["case"]), row["contender"], row["pass"], row["clock"]): row
            for row in rows
            if row.get("median_s") is not None
        }

    def cases(self) -> list[Case]:
        """The cases that were run, each once, in the order of the rows."""
        return list(dict.fromkeys(case for case, *_ in self._rows))

    def row(
        self, case: Case, contender: str, pass_: str = "step", clock: str = "wall"
    ) -> dict[str, Any] | None:
        return self._rows.get((case, contender, pass_, clock))

    def seconds(
        self, case: Case, contender: str, pass_: str = "step", clock: str = "wall"
    ) -> float | None:
        """Median seconds a call, or None where it was not measured."""
        row = self.row(case, contender, pass_, clock)
        return None if row is None else row["median_s"]

    def ratio(
        self, case: Case, peer: str, pass_: str = "step", clock: str = "wall"
    ) -> float | None:
        """How many times as long as ours a peer takes."""
        ours, theirs = (self.seconds(case, name, pass_, clock) for name in ("ours", peer))
        return theirs / ours if ours and theirs else None

    def floor_share(self, case: Case, pass_: str = "step", clock: str = "wall") -> float | None:
        """The floor's time for the bytes that ours has to move, over the time of ours."""
        ours, floor = (self.row(case, name, pass_, clock) for name in ("ours", "floor"))
        if not ours or not floor or not ours["bytes_per_cell"] or not floor["bytes_per_cell"]:
            return None
        a_byte = floor["median_s"] / floor["bytes_per_cell"]
        return a_byte * ours["bytes_per_cell"] / ours["median_s"]


def judge(rows: Iterable[dict[str, Any]], device_type: str) -> list[Bar]:
    """Every bar for which the run has the figures, in the order of the cases."""
    timings = Timings(rows)
    threads = max((case.threads for case in timings.cases()), default=1)
    bars: list[Bar] = []
    for case in timings.cases():
        if case.threads == threads:
            judged = _on_cpu(timings, case) if device_type == "cpu" else _on_gpu(timings, case)
            bars += judged
            bars += _memory(timings, case)
    if device_type == "cpu":
        bars += _linear(timings, threads)
        bars += _predicted_by_bytes(timings, threads)
        bars += _thread_scaling(timings, threads)
    return bars


def label(case: Case) -> str:
    """A case in a few words; what is ordinary (float32, contiguous) is left out."""
    shares = {"none": "no positive cell", "all": "every cell positive"}
    positive = f"{case.pattern.percent:g} % {case.pattern.kind}"
    words = [f"({', '.join(map(str, case.size))})", shares.get(str(case.pattern), positive)]
    layout = case.layout.replace("_", "-")
    words += [word for word in (case.dtype, layout) if word not in ("float32", "contiguous")]
    return ", ".join(words)


def _is_plain(case: Case) -> bool:
    return case.dtype == "float32" and case.layout == "contiguous" and _is_clustered_2(case)


def _is_clustered_2(case: Case) -> bool:
    return str(case.pattern) == "clustered:2"


def _at_least(promise: str, wanted: float, measured: float | None) -> Iterator[Bar]:
    if measured is not None:
        yield Bar(promise, wanted, True, measured)


def _against(
    timings: Timings, case: Case, wanted: dict[str, float], clock: str = "wall"
) -> Iterator[Bar]:
    for peer, times in wanted.items():
        measured = timings.ratio(case, peer, clock=clock)
        on = ", device time" if clock == "device" else ""
        yield from _at_least(f"{label(case)}: times as fast as {peer}{on}", times, measured)


def _on_cpu(timings: Timings, case: Case) -> Iterator[Bar]:
    if _is_plain(case) and case.size in FCRN_SIZES:
        yield from _against(timings, case, {"eager": 5, "compile": 3, "mse_loss": 1})
    if _is_plain(case) and case.size in DENSE_SIZES:
        mse_loss = 2.3 if case.size == DENSE_SIZES[-1] else 3
        yield from _against(timings, case, {"eager": 7, "compile": 3, "mse_loss": mse_loss})
    if case.dtype == "float32" and case.layout == "contiguous" and case.cells >= _MI:
        share = timings.floor_share(case)
        yield from _at_least(f"{label(case)}: share of the floor", 0.7, share)
    if case.layout == "channels_last" and case.size in DENSE_SIZES:
        yield from _against(timings, case, {"compile": 2})
    if case.dtype in _HALVES and case.size in DENSE_SIZES:
        single = timings.seconds(case._replace(dtype="float32"), "ours")
        half = timings.seconds(case, "ours")
        if single and half:
            yield Bar(f"{label(case)}: time over that of float32", 1.0, False, half / single)


def _on_gpu(timings: Timings, case: Case) -> Iterator[Bar]:
    if _is_plain(case) and case.size in FCRN_SIZES:
        yield from _against(timings, case, {"eager": 6, "compile": 2})
        times = timings.ratio(case, "mse_loss")
        if times:
            yield Bar(f"{label(case)}: time over that of mse_loss", 1.2, False, 1 / times)
    if _is_plain(case) and case.cells >= 4 * _MI:
        compiled = 3.5 if case.size == HUGE_SIZE else 3
        wanted = {"eager": 20, "mse_loss": 5, "compile": compiled}
        if timings.seconds(case, "compile-max-autotune", clock="device"):
            wanted["compile-max-autotune"] = compiled
        yield from _against(timings, case, wanted, clock="device")
    if case.size == HUGE_SIZE:
        for pass_ in ("step", "no_grad"):
            share = timings.floor_share(case, pass_, clock="device")
            yield from _at_least(f"{label(case)}: share of the floor, {pass_}", 0.9, share)


def _memory(timings: Timings, case: Case) -> Iterator[Bar]:
    """The gradient and nothing else that grows with the input; under no_grad, nothing at all."""
    for pass_, most in (("step", 1.01), ("no_grad", 0.01)):
        row = timings.row(case, "ours", pass_)
        if row and row.get("peak_bytes") is not None and row["gradient_bytes"] >= _MI:
            over = row["peak_bytes"] / row["gradient_bytes"]
            yield Bar(f"{label(case)}: peak memory over a gradient's, {pass_}", most, False, over)


def _linear(timings: Timings, threads: int) -> Iterator[Bar]:
    """Time of a cell in the largest grid over that in the next smaller one.

    Only among grids of 4 Mi cells and more, whose gradients are all fresh memory: below, the cache
    and the fixed cost of a call make cells cheaper and dearer.
    """
    seconds = {
        case.cells: measured / case.cells
        for case in timings.cases()
        if _is_plain(case) and case.threads == threads and case.cells >= 4 * _MI
        if (measured := timings.seconds(case, "ours"))
    }
    if len(seconds) >= 2:
        smaller, largest = sorted(seconds)[-2:]
        promise = f"time of a cell among {largest} over that among {smaller}"
        yield Bar(promise, 1.25, False, seconds[largest] / seconds[smaller])


def _predicted_by_bytes(timings: Timings, threads: int) -> Iterator[Bar]:
    """Time of every pattern over what its bytes predict from the pattern without positives."""
    for case in timings.cases():
        bare = case._replace(pattern=case.pattern._replace(kind="scattered", percent=0.0))
        row, none = timings.row(case, "ours"), timings.row(bare, "ours")
        fits = case.cells >= _MI and case.threads == threads and case.layout == "contiguous"
        if row and none and case != bare and fits:
            predicted = none["median_s"] * row["bytes_per_cell"] / none["bytes_per_cell"]
            over = row["median_s"] / predicted
            yield Bar(f"{label(case)}: time over that predicted by bytes", 1.25, False, over)


def _thread_scaling(timings: Timings, threads: int) -> Iterator[Bar]:
    for case in timings.cases():
        one = timings.seconds(case._replace(threads=1), "ours")
        all_ = timings.seconds(case, "ours")
        if one and all_ and case.threads == threads == 2 and case.cells >= _MI:
            yield Bar(f"{label(case)}: 2 threads over 1", 1.7, True, one / all_)
