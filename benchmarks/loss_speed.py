"""How fast the loss is, beside what one would use instead, and beside the floor.

    python benchmarks/loss_speed.py                  # the cases of the README, some minutes
    python benchmarks/loss_speed.py --quick          # under a minute
    python benchmarks/loss_speed.py --sizes 64x7x256x256 --patterns none scattered:10 all
    python benchmarks/loss_speed.py --study scaling  # from 10^4 to 10^8 cells
    python benchmarks/loss_speed.py --study positives       # from 0 to 100 %
    python benchmarks/loss_speed.py --compare benchmarks/results/loss_speed_cpu.json

Times forward ("forward"), forward with backward ("step") and forward under `torch.no_grad()`
("no_grad"). `pred` is a leaf and its gradient is dropped before every step, as an optimiser's
`zero_grad` does, so each step pays for the memory of its gradient. float16 steps are taken with a
grad_output of 16384, as under a GradScaler. The contenders:

    ours        fcrn_fused.fcrn_loss
    ours-scaled the same with a grad_output that is not 1 (a loss that is one term of a sum)
    mse_loss    F.mse_loss without a weight, which computes less
    eager       fcrn_fused.reference.fcrn_loss, the definition in plain PyTorch
    compile     torch.compile of it; on a GPU also compile-max-autotune (without CUDA graphs) and
                compile-reduce-overhead (with them)
    floor       CPU: torch.empty_like(pred).zero_() and a read of the two confidence maps;
                GPU: a device-to-device copy that moves the bytes which ours has to move

On the CPU the allocator is told to keep what is freed, in blocks of up to 32 MB: peers with more
temporaries than ours gain by that. "wall" is the host's clock, with the device waited for; "device"
(GPU only) is one replay of a CUDA graph of the step, over inputs that are rotated where they would
fit in the cache. Raw figures and a plot go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import provenance
import timing
import workloads
from bars import Bar, Timings, judge, label
from fcrn_fused import fcrn_loss, ops, reference
from workloads import Case, Inputs, Pattern

LossFunction = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[str, int], object]

PASSES = ("forward", "step", "no_grad")
COMPILE_MODES = {
    "compile": "default",
    "compile-max-autotune": "max-autotune-no-cudagraphs",
    "compile-reduce-overhead": "reduce-overhead",
}
CONTENDERS = ("ours", "ours-scaled", "mse_loss", "eager", *COMPILE_MODES, "floor")
STUDIES = {
    # sizes and patterns, in float32 and contiguous, of ours and the floor
    "scaling": (
        "16x7x24x24 16x7x80x80 16x7x256x256 64x7x272x272 64x7x400x400 64x7x1248x1248",
        "clustered:2",
    ),
    "positives": (
        "64x7x128x128",
        "none clustered:2 clustered:10 clustered:50 "
        "scattered:0.5 scattered:2 scattered:10 scattered:50 all",
    ),
}
_LOSS_SCALE = 16384.0
_MAX_ROTATED = 64  # sets of inputs


class Plan(NamedTuple):
    """What is run, and how long."""

    cases: list[Case]
    contenders: list[str]
    passes: list[str]
    rounds: int
    round_seconds: float
    backend: str


def default_cases(device: torch.device, threads: int) -> list[Case]:
    """All sizes with 2 % clustered positives in float32; other patterns, dtypes and layouts, one
    at a time, at a dense size."""
    sizes = workloads.FCRN_SIZES + workloads.DENSE_SIZES
    dense = workloads.DENSE_SIZES[1]
    if device.type == "cuda":
        sizes, dense = (*sizes, workloads.HUGE_SIZE), workloads.HUGE_SIZE
    clustered = workloads.parse_pattern("clustered:2")
    others = [workloads.parse_pattern(text) for text in ("scattered:2", "none", "all")]
    plain = Case(dense, clustered, "float32", "contiguous", threads)
    chosen = [plain._replace(size=size) for size in sizes]
    chosen += [plain._replace(pattern=pattern) for pattern in others]
    chosen += [plain._replace(dtype=dtype) for dtype in ("bfloat16", "float16")]
    chosen += [plain._replace(layout="channels_last")]
    if device.type == "cpu" and threads > 1:
        chosen += [plain._replace(threads=1)]
    return chosen


def measure(
    plan: Plan, device: torch.device, progress: Progress = lambda what, n: None
) -> list[dict[str, Any]]:
    """Time every case of a plan; one row for each contender, pass and clock.

    `progress` is told what is being done and how many of `count_steps` steps have been done.
    """
    rows = []
    for case in plan.cases:
        rows += measure_case(plan, case, device, progress)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def count_steps(plan: Plan, device: torch.device) -> int:
    """Number of rounds that `measure` will run, for a progress bar."""
    per_case = sum(
        len(_contenders(plan, case, pass_)) for case in plan.cases for pass_ in plan.passes
    )
    return per_case * plan.rounds * (2 if device.type == "cuda" else 1)


def measure_case(
    plan: Plan, case: Case, device: torch.device, progress: Progress = lambda what, n: None
) -> list[dict[str, Any]]:
    """Time every contender on one case; see `measure`."""
    torch._dynamo.reset()
    torch.set_num_threads(case.threads)
    inputs = workloads.make_inputs(case, device)
    rotated = _rotation(inputs, device)
    rows = []
    for pass_ in plan.passes:
        rows += _measure_pass(plan, case, pass_, rotated, device, progress)
        inputs.pred.grad = None
    return rows


def _measure_pass(
    plan: Plan,
    case: Case,
    pass_: str,
    rotated: Sequence[Inputs],
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    inputs = rotated[0]
    names = _contenders(plan, case, pass_)
    functions = {name: loss_function(name, device, plan.backend) for name in names}
    bytes_per_cell = {name: _bytes_per_cell(name, pass_, case, inputs, device) for name in names}

    def call_of(name: str, its_inputs: Inputs) -> timing.Call:
        return make_call(name, functions[name], its_inputs, pass_, case, bytes_per_cell[name])

    what = f"{label(case)} {pass_}"
    calls = {name: call_of(name, inputs) for name in names}
    often = 5 if device.type == "cuda" else 2  # torch.compile captures its CUDA graphs late
    failures = _first_calls(calls, often, lambda name: progress(f"{what}, {name}", 0))
    calls = {name: call for name, call in calls.items() if name not in failures}
    clocks = {
        "wall": timing.wall_clock(
            calls,
            rounds=plan.rounds,
            round_seconds=plan.round_seconds,
            threads=case.threads,
            progress=lambda: progress(what, 1),
        )
    }
    if device.type == "cuda":
        clocks["device"], not_captured = timing.graph_replays(
            {
                name: [call_of(name, its_inputs) for its_inputs in rotated]
                for name in calls
                if name != "compile-reduce-overhead"  # has a graph of its own
            },
            rounds=plan.rounds,
            round_seconds=plan.round_seconds,
            progress=lambda: progress(f"{what}, device time", 1),
        )
        failures |= {f"{name} (graph)": why for name, why in not_captured.items()}

    peaks = {}
    for name, call in calls.items():
        inputs.pred.grad = None
        peaks[name] = timing.peak_bytes(call, device)
    rows: list[dict[str, Any]] = []
    for clock, seconds in clocks.items():
        for name, rounds in seconds.items():
            median, low, high = timing.quartiles(rounds)
            rows.append(
                {
                    "case": case.as_json(),
                    "contender": name,
                    "pass": pass_,
                    "clock": clock,
                    "median_s": median,
                    "low_s": low,
                    "high_s": high,
                    "rounds_s": rounds,
                    "bytes_per_cell": bytes_per_cell[name],
                    "peak_bytes": peaks[name],
                    "gradient_bytes": inputs.pred.numel() * inputs.pred.element_size(),
                }
            )
    return rows + [
        {"case": case.as_json(), "contender": name, "pass": pass_, "clock": "none"}
        | {"median_s": None, "failure": why}
        for name, why in failures.items()
    ]


def _contenders(plan: Plan, case: Case, pass_: str) -> list[str]:
    """The contenders of a case: a single thread is compared with more threads of ours, no more."""
    single = case.threads == 1 < max(other.threads for other in plan.cases)
    return [
        name
        for name in plan.contenders
        if not (single and name not in ("ours", "mse_loss", "floor"))
        and not (name == "ours-scaled" and pass_ != "step")
    ]


def loss_function(name: str, device: torch.device, backend: str = "auto") -> LossFunction | None:
    """The loss of a contender, of pred and target; None for the floor, which is none."""
    # a 0-dim tensor, as FCRNLoss keeps it: a number that changes would make torch.compile recompile
    weight = torch.tensor(workloads.NEGATIVE_WEIGHT, device=device)

    def ours(pred: Tensor, target: Tensor) -> Tensor:
        return fcrn_loss(pred, target, negative_weight=weight, backend=backend)

    def eager(pred: Tensor, target: Tensor) -> Tensor:
        return reference.fcrn_loss(pred, target, negative_weight=weight)

    if name in COMPILE_MODES:
        mode = COMPILE_MODES[name]
        return torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)
    return {"ours": ours, "ours-scaled": ours, "mse_loss": F.mse_loss, "eager": eager}.get(name)


def make_call(
    name: str,
    function: LossFunction | None,
    inputs: Inputs,
    pass_: str,
    case: Case,
    bytes_per_cell: float | None,
) -> timing.Call:
    """One call of a contender on the inputs, ready to be timed."""
    pred, target = inputs.pred, inputs.target
    if function is None:
        assert bytes_per_cell is not None
        return _floor(inputs, pass_, case, bytes_per_cell)
    if pass_ == "no_grad":

        def no_grad() -> None:
            with torch.no_grad():
                function(pred, target)

        return no_grad
    if pass_ == "forward":
        return lambda: function(pred, target)

    grad_outputs: dict[torch.dtype, Tensor] = {}
    if name == "ours-scaled" or case.dtype == "float16":
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            grad_outputs[dtype] = torch.tensor(_LOSS_SCALE, dtype=dtype, device=pred.device)

    def step() -> None:
        pred.grad = None
        loss = function(pred, target)
        loss.backward(grad_outputs.get(loss.dtype))  # type: ignore[no-untyped-call]

    return step


def _floor(inputs: Inputs, pass_: str, case: Case, bytes_per_cell: float) -> timing.Call:
    pred, target = inputs.pred.detach(), inputs.target
    if pred.device.type == "cuda":
        half = torch.empty(
            max(1, int(bytes_per_cell * case.cells / 2)), dtype=torch.uint8, device=pred.device
        )
        copy = torch.empty_like(half)
        return lambda: copy.copy_(half)
    everything = case.layout == "channels_last"
    reads = [_for_reading(tensor if everything else tensor[:, -1]) for tensor in (pred, target)]
    writes = _writes_gradient(pass_, case)

    def floor() -> None:
        if writes:
            torch.empty_like(pred).zero_()
        for read in reads:
            read.sum()

    return floor


def _for_reading(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, whose sum PyTorch takes as fast as memory delivers them."""
    if tensor.is_contiguous(memory_format=torch.channels_last) and tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    if tensor.shape[-1] * tensor.element_size() % 8 or tensor.data_ptr() % 8:
        return tensor
    return tensor.view(torch.int64)


def _writes_gradient(pass_: str, case: Case) -> bool:
    return pass_ == "step" or (pass_ == "forward" and case.dtype != "float16")


def _bytes_per_cell(
    name: str, pass_: str, case: Case, inputs: Inputs, device: torch.device
) -> float | None:
    """Bytes a cell that a contender has to move, where they can be told from its definition."""
    element, maps = inputs.pred.element_size(), case.size[1]
    if name == "floor" and device.type == "cpu":
        gradient = maps * element if _writes_gradient(pass_, case) else 0
        read = 2 * maps if case.layout == "channels_last" else 2
        return float(read * element + gradient)
    if name in ("ours", "floor"):
        return workloads.expected_bytes_per_cell(case, inputs.positive, pass_, device.type)
    if name == "ours-scaled":
        return workloads.expected_bytes_per_cell(case, inputs.positive, "scaled", device.type)
    # maps of C elements read and written: mse_loss keeps the squares, a perfect compiler does not
    passes_over_all = {
        "mse_loss": {"no_grad": 4, "forward": 4, "step": 8},
        "compile": {"no_grad": 2, "forward": 2, "step": 5},
    }
    counted = passes_over_all.get("compile" if name in COMPILE_MODES else name, {})
    return float(counted[pass_] * maps * element) if pass_ in counted else None


def _rotation(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs, three times the cache in all (at most 64), or the inputs alone."""
    if device.type != "cuda":
        return [inputs]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = 3 * inputs.pred.numel() * inputs.pred.element_size()
    count = min(_MAX_ROTATED, math.ceil(3 * cache / size))
    return [inputs] + [
        Inputs(
            inputs.pred.detach().clone().requires_grad_(), inputs.target.clone(), inputs.positive
        )
        for _ in range(count - 1)
    ]


def _first_calls(
    calls: dict[str, timing.Call], often: int, announce: Callable[[str], object]
) -> dict[str, str]:
    """Call everything, which compiles what is compiled; what failed, with the reason."""
    failures = {}
    for name, call in calls.items():
        announce(name)
        try:
            for _ in range(often):
                call()
        except Exception as error:  # a compiler may raise anything; the others are still timed
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return failures


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table for the terminal: a line for each case, pass and clock."""
    timings = Timings(rows)
    seen = {row["contender"] for row in rows}
    peers = [name for name in CONTENDERS if name in seen and name not in ("ours", "floor")]
    head = ["case", "pass", "clock", "ours", "quartiles"] + [f"x {peer}" for peer in peers]
    head += ["of floor", "B/cell", "GB/s", "peak MB"]
    lines = [head]
    keys = dict.fromkeys((Case.from_json(row["case"]), row["pass"], row["clock"]) for row in rows)
    for case, pass_, clock in keys:
        row = timings.row(case, "ours", pass_, clock)
        if row is None:
            continue
        threads = "" if case.threads == max(c.threads for c in timings.cases()) else " 1 thread"
        share = timings.floor_share(case, pass_, clock)
        rate = row["bytes_per_cell"] * case.cells / row["median_s"] / 1e9
        lines.append(
            [label(case) + threads, pass_, clock, format_seconds(row["median_s"])]
            + [f"{format_seconds(row['low_s'])}-{format_seconds(row['high_s'])}"]
            + [_ratio(timings.ratio(case, peer, pass_, clock)) for peer in peers]
            + ["-" if share is None else f"{share:.0%}"]
            + [f"{row['bytes_per_cell']:.1f}", f"{rate:.1f}", f"{row['peak_bytes'] / 1e6:.1f}"]
        )
    return align(lines)


def format_bars(bars: Sequence[Bar]) -> str:
    """The bars with what was measured, met or missed."""
    lines = [["bar", "wanted", "measured", ""]]
    for bar in bars:
        wanted = f"{'>=' if bar.at_least else '<='} {bar.wanted:g}"
        lines.append([bar.promise, wanted, f"{bar.measured:.2f}", "met" if bar.met else "MISSED"])
    return align(lines)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that suits them and three digits: `38.4 us`, `1.23 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns under each other, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def slower(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], by: float = 0.1
) -> tuple[list[str], int]:
    """What got slower by more than `by` with quartiles that do not overlap; how many were compared.

    Ours is compared by its time, and so are the peers: where everything got slower, so did the
    machine.
    """

    def keyed(rows: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        return {
            (Case.from_json(row["case"]), row["contender"], row["pass"], row["clock"]): row
            for row in rows
            if row["median_s"] is not None
        }

    before, after = keyed(old), keyed(new)
    common = [key for key in after if key in before]
    lines = [["case", "contender", "pass", "clock", "before", "now", "times"]]
    for key in common:
        was, now = before[key], after[key]
        times = now["median_s"] / was["median_s"]
        if times > 1 + by and now["low_s"] > was["high_s"]:
            case, contender, pass_, clock = key
            seconds = [format_seconds(row["median_s"]) for row in (was, now)]
            lines.append([label(case), contender, pass_, clock, *seconds, f"{times:.2f}"])
    return ([align(lines)] if len(lines) > 1 else []), len(common)


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Cells against time, both logarithmic, of the sizes with 2 % clustered positives; the floor
    is drawn in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings = Timings(rows)
    clock = "device" if any(row["clock"] == "device" for row in rows) else "wall"
    threads = max(case.threads for case in timings.cases())
    plain = [
        case
        for case in timings.cases()
        if (str(case.pattern), case.dtype, case.layout, case.threads)
        == ("clustered:2", "float32", "contiguous", threads)
    ]
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in CONTENDERS:
        points = [
            (case.cells, row)
            for case in sorted(plain, key=lambda case: case.cells)
            if (row := timings.row(case, name, "step", clock)) is not None
        ]
        if not points:
            continue
        floor = name == "floor"
        axes.errorbar(
            [cells for cells, _ in points],
            [row["median_s"] * 1e3 for _, row in points],
            yerr=[
                [(row["median_s"] - row["low_s"]) * 1e3 for _, row in points],
                [(row["high_s"] - row["median_s"]) * 1e3 for _, row in points],
            ],
            label=name,
            color="black" if floor else None,
            linestyle=":" if floor else "-",
            marker=None if floor else "o",
            linewidth=2.5 if name == "ours" else 1.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="cells (B x H x W)")
    axes.set_ylabel(f"forward and backward, ms ({clock} clock)")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def serving_backend(device: torch.device, backend: str) -> str:
    """Who computes "ours" on a device: "fused" or "reference"."""
    fused = ops.why_not(device.type) is None
    return "fused" if backend != "reference" and fused else "reference"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; a bad argument ends the program with its reason."""
    parser = argparse.ArgumentParser(
        prog="loss_speed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    add("--sizes", nargs="+", type=_checked(workloads.parse_size), metavar="BxCxHxW")
    add(
        "--patterns",
        nargs="+",
        type=_checked(workloads.parse_pattern),
        metavar="PATTERN",
        help="none, all, clustered:PERCENT or scattered:PERCENT",
    )
    add("--dtypes", nargs="+", choices=list(workloads.DTYPES))
    add("--layouts", nargs="+", choices=list(workloads.LAYOUTS))
    add("--threads", nargs="+", type=_checked(_positive_int), help="CPU threads (PyTorch's)")
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: all that suit the device")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    add("--rounds", type=_checked(_positive_int), default=9, help="default: 9")
    add(
        "--round-seconds",
        type=_checked(_positive_float),
        default=0.05,
        help="time of one contender in one round (default: 0.05; at least one call)",
    )
    add("--backend", choices=("auto", "fused", "reference"), default="auto", help="for ours")
    add("--study", choices=list(STUDIES), help="ours and the floor over many sizes or patterns")
    add("--quick", action="store_true", help="two sizes, step only, fewer rounds")
    add("--compare", type=Path, metavar="OLD.json", help="print what got slower since that run")
    add("--output", type=Path, help="default: benchmarks/results/loss_speed_<device>.json")
    add("--no-output", action="store_true", help="write neither JSON nor plot")
    options = parser.parse_args(arguments)

    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device}")
    if options.device.type == "cuda":
        found = torch.cuda.device_count()
        if (options.device.index or 0) >= found:
            parser.error(f"--device {options.device}: this PyTorch finds {found} CUDA devices")
    if options.backend == "fused" and (why := ops.why_not(options.device.type)):
        parser.error(f"--backend fused: {why}")
    modes = [name for name in options.contenders or () if name in list(COMPILE_MODES)[1:]]
    if modes and options.device.type == "cpu":
        parser.error(f"--contenders {' '.join(modes)}: only with --device cuda")
    if options.output and options.output.suffix != ".json":
        parser.error(f"--output must end in .json, got {options.output}")
    if options.compare:
        try:
            options.compare = provenance.read_json(options.compare, "loss_speed")
        except ValueError as error:
            parser.error(f"--compare {error}")
    return options


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser's ValueError as the message that argparse prints."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"must be a positive number, got {text!r}")
    return number


def make_plan(options: argparse.Namespace) -> Plan:
    """The cases and contenders that the command line asks for."""
    on_cpu = options.device.type == "cpu"
    threads = options.threads or [torch.get_num_threads()]
    if options.study:
        sizes, patterns = STUDIES[options.study]
        options.sizes = options.sizes or [workloads.parse_size(size) for size in sizes.split()]
        options.patterns = options.patterns or [
            workloads.parse_pattern(text) for text in patterns.split()
        ]
        options.contenders = options.contenders or ["ours", "floor"]
    chosen = (options.sizes, options.patterns, options.dtypes, options.layouts, options.threads)
    if options.quick:
        sizes = options.sizes or [workloads.FCRN_SIZES[0], workloads.DENSE_SIZES[0]]
    else:
        sizes = options.sizes or list(workloads.FCRN_SIZES + workloads.DENSE_SIZES)
    if any(chosen) or options.quick:
        patterns: list[Pattern] = options.patterns or [workloads.parse_pattern("clustered:2")]
        dtypes, layouts = options.dtypes or ["float32"], options.layouts or ["contiguous"]
        to_run = workloads.product(sizes, patterns, dtypes, layouts, threads)
    else:
        to_run = default_cases(options.device, threads[0])
    contenders = options.contenders or [
        name
        for name in CONTENDERS
        if name != "ours-scaled" and not (on_cpu and name in list(COMPILE_MODES)[1:])
    ]
    return Plan(
        to_run,
        contenders,
        ["step"] if options.quick or options.study else options.passes,
        min(options.rounds, 5) if options.quick else options.rounds,
        min(options.round_seconds, 0.03) if options.quick else options.round_seconds,
        options.backend,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from tqdm import tqdm

    plan = make_plan(options)
    keeps_memory = options.device.type == "cpu" and timing.keep_freed_memory()
    backend = serving_backend(options.device, options.backend)
    started = time.monotonic()
    run = provenance.describe_run(options.device)
    if warning := provenance.busy_warning():
        print(warning)
    print(f"{provenance.device_name(run['device'])}, PyTorch {torch.__version__}, ours: {backend}")
    if backend == "reference":
        reason = ops.why_not(options.device.type) or "--backend reference"
        print(f"ours is not the compiled loss here: {reason}")
    with tqdm(
        total=count_steps(plan, options.device), unit="round", leave=False, disable=None
    ) as bar:

        def progress(what: str, rounds: int) -> None:
            bar.set_description(what, refresh=rounds == 0)
            bar.update(rounds)

        rows = measure(plan, options.device, progress)
    bars = judge(rows, options.device.type) if backend == "fused" else []
    record = {
        "benchmark": "loss_speed",
        **run,
        "backend": backend,
        "settings": {
            "rounds": plan.rounds,
            "round_seconds": plan.round_seconds,
            "freed_memory_kept": keeps_memory,
        },
        "seconds": round(time.monotonic() - started, 1),
        "bars": [bar.as_json() for bar in bars],
        "rows": rows,
    }
    print(format_table(rows))
    for row in rows:
        if row.get("failure"):
            where = f"{label(Case.from_json(row['case']))} {row['pass']}"
            print(f"not measured: {row['contender']}, {where}: {row['failure']}")
    if bars:
        print("\n" + format_bars(bars))
    if not options.no_output:
        stem = f"loss_speed_{options.device.type}"
        stem += f"_{options.study}" if options.study else "_quick" if options.quick else ""
        path = options.output or provenance.RESULTS / f"{stem}.json"
        provenance.write_json(record, path)
        title = f"{provenance.device_name(run['device'])}, float32, 2 % clustered positives"
        plot(rows, title, path.with_suffix(".png"))
        print(f"\nwritten: {path} and {path.with_suffix('.png').name}")
    if options.compare:
        print("\n" + compare(options.compare, record))
    return 0


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What got slower from one record to another, in words."""
    lines = []
    if old["device"] != new["device"]:
        names = [provenance.device_name(record["device"]) for record in (old, new)]
        lines.append(f"other devices, times do not compare: {names[0]} then, {names[1]} now")
    table, compared = slower(old["rows"], new["rows"])
    what = f"slower than {old['date']} ({old['git_commit']}) by more than 10 %, quartiles apart"
    if table:
        lines += [f"{what}:", *table]
    else:
        lines.append(f"nothing of {compared} figures in common is {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
