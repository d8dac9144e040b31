"""How fast the losses are, beside what one would use instead, and beside the floor.

    python benchmarks/loss_speed.py                          # the figures of docs/benchmarks.md
    python benchmarks/loss_speed.py --device cuda --time-limit 180
    python benchmarks/loss_speed.py --shapes 64x7x256x256 --patterns none scattered:10 all
    python benchmarks/loss_speed.py --compare benchmarks/results/loss_speed_cpu.json

A call is forward and backward ("step"), the same with a grad_output other than 1 ("scaled"), or
forward under `torch.no_grad()` ("no_grad"). `pred` is a leaf whose gradient is dropped before every
step, as an optimiser's `zero_grad` does. float16 steps have a grad_output of 16384, as under a
GradScaler. Beside `fcrn_loss`, or `masked_mse_loss` where there is a weight, are timed:

    mse_loss          F.mse_loss without a weight, which computes less
    mse_loss(weight)  F.mse_loss(weight=), where the loss is masked
    eager             the same loss as one writes it by hand
    compile           torch.compile of that; on large inputs of a GPU also compile-max-autotune
    fill, copy        no losses but bounds, which move as many bytes as ours has to move: zeros
                      written to a new gradient, and the rest read; and a copy. The faster of the
                      two is the floor.

On a GPU, "device" is the time of a replayed CUDA graph of the call, over inputs that are rotated
where they would stay in the cache, and "host" the host's clock with the device waited for, which is
what small inputs take. On a CPU the large inputs are measured a second time with
THP_MEM_ALLOC_ENABLE=1, by which PyTorch takes transparent huge pages for every tensor.
Figures are written after each case: a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import measure
from fcrn_fused import fcrn_loss, masked_mse_loss, ops
from inputs import DTYPES, LAYOUTS, NEGATIVE_WEIGHT, Case, Inputs, expected_bytes, make_inputs

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]

PASSES = ("step", "scaled", "no_grad")
BOUNDS = ("fill", "copy")
CONTENDERS = ("ours", "mse_loss", "mse_loss(weight)", "eager", "compile", "compile-max-autotune")
SMALL = [Case((16, 7, 16, 16)), Case((16, 7, 32, 32))]  # FCRN's own
MIDDLE = [Case((16, 7, 128, 128)), Case((64, 7, 128, 128))]
LARGE, HUGE = Case((64, 7, 256, 256)), Case((64, 7, 1024, 1024))
MASKED = [
    Case((64, 7, 128, 128), "clustered:20", weight_shape=(64, 1, 128, 128)),
    Case((64, 7, 128, 128), "all", weight_shape=(64, 7, 128, 128)),
    Case((32, 512, 64), "first:60", weight_shape=(32, 512, 1)),  # padded sequences
    Case((64, 17, 64, 48), "first:47", weight_shape=(64, 17, 1, 1)),  # visible joints
]
BOUND_BY_BYTES = 2**18  # cells: smaller inputs are bound by the host, and have no device time
MANY_CELLS = 2**22  # from here on device time alone
_LOSS_SCALE = 16384.0


def variants(plain: Case) -> list[Case]:
    """A case with other patterns, dtypes and layouts, one at a time."""
    patterns = [plain._replace(pattern=pattern) for pattern in ("scattered:2", "none", "all")]
    halves = [plain._replace(dtype=dtype) for dtype in ("bfloat16", "float16")]
    return [*patterns, *halves, plain._replace(layout="channels_last")]


def default_tasks(device_type: str, huge_pages: bool) -> list[tuple[Case, str]]:
    """Cases and passes, the most wanted first."""
    if huge_pages:
        plain = [MIDDLE[1], LARGE]
        return [(case, "step") for case in [*plain, *variants(MIDDLE[1]), *MASKED[:2]]]
    if device_type == "cpu":
        steps = [*SMALL, *MIDDLE, LARGE, *variants(MIDDLE[1]), *MASKED]
        return [(case, "step") for case in steps] + [(MIDDLE[1], "scaled"), (MIDDLE[1], "no_grad")]
    steps = [HUGE, LARGE, *SMALL, *variants(HUGE), *MASKED, *MIDDLE]
    others = itertools.product((HUGE, LARGE), ("no_grad", "scaled"))
    return [(case, "step") for case in steps] + [*others, (SMALL[0], "no_grad")]


# ---- contenders ---------------------------------------------------------------------------------


def fcrn_by_hand(pred: Tensor, target: Tensor, negative_weight: Tensor) -> Tensor:
    """The loss as it is usually written."""
    positive = (target[:, -1:] > 0).to(pred.dtype)
    error = (pred - target) ** 2
    pose = (positive * error[:, :-1]).sum(dtype=torch.float32)
    weight = positive + negative_weight * (1 - positive)
    confidence = (weight * error[:, -1:]).sum(dtype=torch.float32)
    return (pose + confidence) / pred.numel()


def masked_by_hand(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (weight * (pred - target) ** 2).sum() / weight.expand_as(pred).sum()


def losses_for(case: Case, pass_: str, inputs: Inputs) -> dict[str, Loss]:
    """The contenders of a case, of pred and target."""
    device = inputs.pred.device
    if inputs.weight is None:
        weight = torch.tensor(NEGATIVE_WEIGHT, device=device)  # as FCRNLoss keeps it

        def ours(pred: Tensor, target: Tensor) -> Tensor:
            return fcrn_loss(pred, target, negative_weight=weight)

        def eager(pred: Tensor, target: Tensor) -> Tensor:
            return fcrn_by_hand(pred, target, weight)

    else:
        mask, factor = inputs.weight, inputs.weight.to(inputs.pred.dtype)

        def ours(pred: Tensor, target: Tensor) -> Tensor:
            return masked_mse_loss(pred, target, mask)

        def eager(pred: Tensor, target: Tensor) -> Tensor:
            return masked_by_hand(pred, target, factor)

    losses: dict[str, Loss] = {"ours": ours}
    if pass_ == "scaled":
        return losses
    losses["mse_loss"] = F.mse_loss
    if inputs.weight is not None:
        expanded = factor.expand(case.shape)
        losses["mse_loss(weight)"] = lambda pred, target: F.mse_loss(pred, target, weight=expanded)
    if pass_ == "step":
        losses["eager"] = eager
        losses["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
        if device.type == "cuda" and case.is_plain and case.units >= MANY_CELLS:
            mode = "max-autotune-no-cudagraphs"
            losses["compile-max-autotune"] = torch.compile(
                eager, fullgraph=True, dynamic=False, mode=mode
            )
    return losses


def call_of(loss: Loss, inputs: Inputs, pass_: str) -> measure.Call:
    """One call of a contender, ready to be timed."""
    pred, target = inputs.pred, inputs.target
    if pass_ == "no_grad":

        def no_grad() -> None:
            with torch.no_grad():
                loss(pred, target)

        return no_grad

    grad_outputs: dict[torch.dtype, Tensor] = {}
    if pass_ == "scaled" or pred.dtype == torch.float16:
        for dtype in DTYPES.values():
            grad_outputs[dtype] = torch.tensor(_LOSS_SCALE, dtype=dtype, device=pred.device)

    def step() -> None:
        pred.grad = None
        value = loss(pred, target)
        value.backward(grad_outputs.get(value.dtype))  # type: ignore[no-untyped-call]

    return step


def bounds_for(inputs: Inputs, pass_: str, wanted: float) -> dict[str, measure.Call]:
    """Calls that move the bytes that ours has to move, and compute nothing."""
    pred = inputs.pred.detach()
    written = 0 if pass_ == "no_grad" else pred.numel() * pred.element_size()
    read, copied = (
        torch.ones(max(1, int(size / 8)), dtype=torch.int64, device=pred.device)
        for size in (wanted - written, wanted / 2)
    )

    def fill() -> None:
        if written:
            torch.empty_like(pred).zero_()
        read.sum()

    return {"fill": fill, "copy": copied.clone}


# ---- measuring ----------------------------------------------------------------------------------


def measure_case(
    case: Case, pass_: str, device: torch.device, rounds: int, round_seconds: float
) -> list[Row]:
    """A row for each contender and clock; one with a "failure" for a contender that cannot run."""
    torch._dynamo.reset()
    inputs = make_inputs(case, device)
    wanted = expected_bytes(case, inputs.chosen, pass_, device.type)
    losses = losses_for(case, pass_, inputs)
    rotated = _rotation(inputs)
    calls = {
        name: [call_of(loss, each, pass_) for each in rotated] for name, loss in losses.items()
    }
    bounds = [bounds_for(each, pass_, wanted) for each in rotated]
    calls |= {name: [each[name] for each in bounds] for name in BOUNDS}
    what = {**case._asdict(), "case": case.label, "pass": pass_, "units": case.units}
    failures: list[Row] = []

    def without_failing(run: Callable[[str], Any], clock: str) -> dict[str, Any]:
        done = {}
        for name in list(calls):
            try:
                done[name] = run(name)
            except Exception as error:  # a compiler may raise anything; the others are still timed
                lines = str(error).splitlines() or [""]
                why = f"{type(error).__name__}: {lines[0][:200]}"
                failures.append({**what, "contender": name, "clock": clock, "failure": why})
                del error
        return done

    peaks = without_failing(lambda name: _first_calls(calls[name][0], inputs, device), "first call")
    calls = {name: calls[name] for name in peaks}
    timers: dict[str, dict[str, measure.Timer]] = {}
    if device.type == "cpu" or case.units < MANY_CELLS:
        timers["host"] = {name: measure.host_timer(same[0], device) for name, same in calls.items()}
    if device.type == "cuda" and case.units >= BOUND_BY_BYTES:
        timers["device"] = without_failing(lambda name: measure.graph_timer(calls[name]), "device")
    rows: list[Row] = []
    for clock, of_clock in timers.items():
        for name, seconds in measure.interleaved(of_clock, rounds, round_seconds).items():
            median, low, high = measure.quartiles(seconds)
            rows.append(
                {**what, "contender": name, "clock": clock, "median_s": median, "low_s": low}
                | {"high_s": high, "rounds_s": [float(f"{each:.4g}") for each in seconds]}
                | {"bytes": wanted, "peak_bytes": peaks[name]}
                | {"gradient_bytes": inputs.pred.numel() * inputs.pred.element_size()}
            )
    return rows + failures


def _first_calls(call: measure.Call, inputs: Inputs, device: torch.device) -> int:
    """Call until everything is compiled; the peak of memory of a call after that."""
    for _ in range(2):
        call()
    inputs.pred.grad = None
    peak = measure.allocations(call, device).peak
    inputs.pred.grad = None
    return peak


def _rotation(inputs: Inputs) -> list[Inputs]:
    """On a GPU copies of the inputs, three times the cache in all, at most 64; else the inputs."""
    if inputs.pred.device.type != "cuda":
        return [inputs]
    cache = torch.cuda.get_device_properties(inputs.pred.device).L2_cache_size
    size = 3 * inputs.pred.numel() * inputs.pred.element_size()
    copies = min(64, math.ceil(3 * cache / size)) - 1
    return [inputs] + [
        inputs._replace(
            pred=inputs.pred.detach().clone().requires_grad_(), target=inputs.target.clone()
        )
        for _ in range(copies)
    ]


# ---- rows ---------------------------------------------------------------------------------------


def by_case(rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """`(ours, all by contender)` of each case, pass and clock that was timed."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "median_s" in row:
            key = (row["case"], row["pass"], row["clock"], row.get("huge_pages"))
            groups.setdefault(key, {})[row["contender"]] = row
    for group in groups.values():
        if "ours" in group:
            yield group["ours"], group


def floor_seconds(group: dict[str, Row]) -> float | None:
    """The time of the faster bound."""
    return min((group[name]["median_s"] for name in BOUNDS if name in group), default=None)


def table(rows: Sequence[Row], *, seconds: bool = True) -> list[list[str]]:
    """Head and lines: the time of ours, how many times as long the others take, the floor."""
    groups = list(by_case(rows))
    peers = [name for name in CONTENDERS[1:] if any(name in group for _, group in groups)]
    clocks = len({ours["clock"] for ours, _ in groups}) > 1
    head = ["input, positive cells or weight", "pass", *["clock"] * clocks, *["ours"] * seconds]
    lines = [[*head, *peers, "floor / ours", "bytes"]]
    for ours, group in groups:
        line = [ours["case"] + (", huge pages" if ours.get("huge_pages") else ""), ours["pass"]]
        line += [ours["clock"]] * clocks + [format_seconds(ours["median_s"])] * seconds
        for name in peers:
            times = group[name]["median_s"] / ours["median_s"] if name in group else None
            line.append(f"{times:.2f}x" if times else "-")
        floor = floor_seconds(group) if ours["units"] >= BOUND_BY_BYTES else None
        line.append(f"{floor / ours['median_s']:.0%}" if floor else "-")
        lines.append([*line, f"{ours['bytes'] / ours['units']:.1f}"])
    return lines


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that suits them and three digits: `38.4 us`, `1.23 ms`."""
    unit, scale = next(
        (each for each in (("s", 1.0), ("ms", 1e-3)) if seconds >= each[1]), ("us", 1e-6)
    )
    return f"{seconds / scale:.3g} {unit}"


def align(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table with its columns under each other, the first `left` of them to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, bool]:
    """Times of now over those of then, a line a row; whether ours got slower.

    Slower is by more than 10 % with quartiles that do not overlap. The peers are compared too:
    where all got slower, so did the machine.
    """
    names = ("case", "contender", "pass", "clock", "huge_pages")
    before = {tuple(row.get(n) for n in names): row for row in old["rows"] if "median_s" in row}
    lines, ours_is_slower = [["case", "contender", "pass", "clock", "then", "now", "times"]], False
    for now in (row for row in new["rows"] if "median_s" in row):
        key = tuple(now.get(name) for name in names)
        if then := before.get(key):
            times = now["median_s"] / then["median_s"]
            slower = times > 1.1 and now["low_s"] > then["high_s"]
            ours_is_slower |= slower and now["contender"] == "ours"
            both = [format_seconds(row["median_s"]) for row in (then, now)]
            lines.append([*key[:4], *both, f"{times:.2f}" + " slower" * slower])
    devices = [measure.device_name(record["device"]) for record in (old, new)]
    note = "" if devices[0] == devices[1] else f"\nother devices: {devices[0]}, now {devices[1]}"
    return align(lines, 4) + note, ours_is_slower


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time over cells of the plain cases, both logarithmic; the floor if it is one in all."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    of_cells: dict[int, tuple[Row, dict[str, Row]]] = {}
    for ours, group in sorted(by_case(rows), key=lambda each: each[0]["clock"]):  # device, host
        is_plain = ours["case"] == Case(tuple(ours["shape"])).label
        if is_plain and ours["pass"] == "step" and not ours.get("huge_pages"):
            of_cells.setdefault(ours["units"], (ours, group))
    plain = [of_cells[units] for units in sorted(of_cells)]
    if not plain:
        return
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in CONTENDERS:
        points = [
            (ours["units"], group[name]["median_s"]) for ours, group in plain if name in group
        ]
        if points:
            width = 2.5 if name == "ours" else 1.5
            axes.plot(*zip(*points, strict=True), "o-", label=name, linewidth=width)
    floors = [floor_seconds(group) for _, group in plain]
    if all(
        each and each <= ours["median_s"] for each, (ours, _) in zip(floors, plain, strict=True)
    ):
        axes.plot([ours["units"] for ours, _ in plain], floors, ":", color="black", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="cells (B x H x W)")
    axes.set_ylabel("forward and backward, seconds")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- the command --------------------------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, ...]:
    """`64x7x128x128` as (64, 7, 128, 128)."""
    parts = text.split("x")
    if len(parts) < 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"a shape is like 64x7x128x128, got {text!r}")
    return tuple(map(int, parts))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loss_speed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shapes", nargs="+", type=parse_shape, metavar="BxCxHxW")
    add("--patterns", nargs="+", default=["clustered:2"], help="of positive cells; see inputs.py")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=["contiguous"])
    add("--passes", nargs="+", choices=PASSES, default=["step"])
    add("--rounds", type=int, default=9)
    add("--round-seconds", type=float, default=0.05, help="of one contender (at least one call)")
    add("--time-limit", type=float, default=math.inf, help="seconds; no case is begun after that")
    add("--compare", type=Path, metavar="OLD.json", help="exit with 1 if ours got slower since")
    add("--output", type=Path, help="default: benchmarks/results/loss_speed_<device>.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if options.rounds < 1 or not options.round_seconds > 0:
        parser.error("--rounds must be at least 1 and --round-seconds positive")
    if options.compare:
        try:
            options.compare = measure.read_json(options.compare, "loss_speed")
        except ValueError as error:
            parser.error(f"--compare {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device, started = torch.device(options.device), time.monotonic()
    huge_pages = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    tasks = default_tasks(device.type, huge_pages)
    if options.shapes:
        chosen = itertools.product(
            options.shapes, options.patterns, options.dtypes, options.layouts
        )
        tasks = list(itertools.product((Case(*each) for each in chosen), options.passes))
    path = options.output or measure.RESULTS / f"loss_speed_{device.type}.json"
    problem = ops.why_not(device.type)
    record: dict[str, Any] = {
        "benchmark": "loss_speed",
        **measure.describe_run(device),
        "backend": "reference" if problem else "fused",
        "settings": {"rounds": options.rounds, "round_seconds": options.round_seconds},
        "rows": [],
    }
    name = measure.device_name(record["device"])
    print(f"{name}, PyTorch {torch.__version__}, load {record['load_before']}", flush=True)
    if problem:
        print(f"ours is not the compiled loss here: {problem}", flush=True)

    def finish(rows: list[Row], number: int, total: int) -> None:
        record["rows"] += rows
        record["seconds"] = round(time.monotonic() - started, 1)
        measure.write_json(record, path)
        for line in table(rows)[1:]:
            print(f"{number}/{total}  " + "  ".join(line), flush=True)
        for row in rows:
            if "failure" in row:
                print(f"  {row['contender']}, {row['clock']}: {row['failure']}", flush=True)

    for number, (case, pass_) in enumerate(tasks, start=1):
        if time.monotonic() - started > options.time_limit:
            print(f"the time is over: {len(tasks) - number + 1} cases are left out", flush=True)
            break
        try:
            rows = measure_case(case, pass_, device, options.rounds, options.round_seconds)
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
            rows = [{"case": case.label, "pass": pass_, "contender": "ours", "clock": "none"}]
            rows[0]["failure"] = why
        for row in rows if huge_pages else ():
            row["huge_pages"] = True
        finish(rows, number, len(tasks))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cpu" and not options.shapes and not huge_pages:
        record["rows"] += _with_huge_pages(options)
        finish([], 0, 0)
    rows = record["rows"]
    print(f"\n{align(table(rows))}\n\nwritten: {path.name}")
    plot(rows, f"{name}, float32, 2 % clustered positives", path.with_suffix(".png"))
    ours_failed = any("failure" in row and row["contender"] == "ours" for row in rows)
    if options.compare:
        text, ours_is_slower = compare(options.compare, record)
        print(f"\n{text}")
        return int(ours_is_slower or ours_failed)
    return int(ours_failed)


def _with_huge_pages(options: argparse.Namespace) -> list[Row]:
    """The rows of a process whose tensors PyTorch puts in transparent huge pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "huge_pages.json")
        command = [sys.executable, __file__, "--output", str(path), "--rounds", str(options.rounds)]
        command += ["--round-seconds", str(options.round_seconds)]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command, env=environment, check=True)
        rows: list[Row] = measure.read_json(path, "loss_speed")["rows"]
        return rows


if __name__ == "__main__":
    sys.exit(main())
