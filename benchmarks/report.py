"""Writes the figures of README.md and docs/ from the JSON in benchmarks/results/.

    python benchmarks/report.py            # rewrite the blocks of figures
    python benchmarks/report.py --check    # fail where a block is not what the JSON says

A block stands between two comments and is made anew as a whole:

    <!-- figures: cpu-speed -->
    <!-- end figures -->

Times are given for GPUs only; for the CPU, ratios of times taken in one run. Nothing is estimated:
what has no JSON is said not to have been measured.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import provenance
from bars import Timings, label
from provenance import ROOT
from workloads import Case

Record = dict[str, Any]

_BLOCK = re.compile(
    r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end figures -->)", re.DOTALL
)
_NOT_MEASURED_ON_GPU = (
    "Nothing has been measured on a GPU yet. `make gpu` measures it and fills this in."
)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns to the left, the others to the right."""
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source_line(record: Record, result: str) -> str:
    """Where figures come from: device, versions, date, commit and the file they are kept in."""
    device, versions = record["device"], record["versions"]
    words = [provenance.device_name(device), f"PyTorch {versions['torch']}"]
    if device["type"] == "cuda":
        words.append(f"driver {device['driver']}")
    words += [record["date"], f"commit {record['git_commit'] or 'unknown'}"]
    return f"{', '.join(words)}; raw figures in `benchmarks/results/{result}`."


# ---- CPU ----------------------------------------------------------------------------------------


def cpu_speed(records: Sequence[Record]) -> str:
    """How many times as long the others take, forward and backward, on the CPU."""
    if not records:
        return "Not measured yet: `make bench`."
    record = records[0]
    timings = Timings(record["rows"])
    threads = max((case.threads for case in timings.cases()), default=1)
    rows = []
    for case in timings.cases():
        if case.threads == threads and timings.seconds(case, "ours") is not None:
            peers = ("mse_loss", "compile", "eager")
            share = timings.floor_share(case)
            row = timings.row(case, "ours")
            assert row is not None
            rows.append(
                [label(case)]
                + [_times(timings.ratio(case, peer)) for peer in peers]
                + ["-" if share is None else f"{share:.0%}", f"{row['bytes_per_cell']:.1f}"]
            )
    head = ["input, positive cells", "`F.mse_loss`", "`torch.compile`", "eager PyTorch"]
    table = markdown_table([*head, "share of the floor", "bytes a cell"], rows)
    shares = [timings.floor_share(case) or 0 for case in timings.cases()]
    above = (
        " More than 100 %\nis chance: large blocks are new memory or not, and new pages cost more "
        "than\nwhat is written there."
        if max(shares, default=0) > 1
        else ""
    )
    return (
        "Forward and backward on the CPU: how many times as long the others take in the same\n"
        "run. `F.mse_loss` has no weight here; the others compute the same loss. The floor\n"
        "is PyTorch's own `zero_()` of a fresh gradient and a read of the two confidence maps,\n"
        f"scaled to the bytes that the input's pattern needs.{above}\n\n{table}\n\n"
        + source_line(record, "loss_speed_cpu.json")
    )


def cpu_masked(records: Sequence[Record]) -> str:
    """`masked_mse_loss` beside what is written by hand."""
    if not records:
        return "Not measured yet: `python benchmarks/masked_speed.py`."
    peers = ("mse_loss-weight", "compile", "eager", "mse_loss")
    of: dict[str, dict[str, Record]] = {}
    for row in records[0]["rows"]:
        of.setdefault(row["case"], {})[row["contender"]] = row
    rows = []
    for case, each in of.items():
        ours = each["ours"]
        times = [_times(each[peer]["median_s"] / ours["median_s"]) for peer in peers]
        shape = ", ".join(map(str, ours["shape"]))
        rows.append([f"({shape}), {case}", *times, f"{ours['expected_bytes']:.1f}"])
    head = ["input, weight", "`F.mse_loss(weight=)`", "`torch.compile`", "eager PyTorch"]
    table = markdown_table([*head, "`F.mse_loss`, no weight", "bytes an element"], rows)
    return (
        "`masked_mse_loss`, forward and backward on the CPU, against the loss written by hand:\n\n"
        + f"{table}\n\n"
        + source_line(records[0], "masked_speed_cpu.json")
    )


def cpu_bars(records: Sequence[Record]) -> str:
    """The bars on the CPU, met or missed."""
    if not records:
        return "Not measured yet: `make bench`."
    return f"{_bars(records[0]['bars'])}\n\n" + source_line(records[0], "loss_speed_cpu.json")


def cpu_train_step(records: Sequence[Record]) -> str:
    """The loss's share of a training step on the CPU."""
    if not records:
        return "Not measured yet: `python benchmarks/train_step.py`."
    record = records[0]
    settings: dict[tuple[str, int, int], dict[str, Record]] = {}
    for row in record["rows"]:
        key = (row["network"], row["side"], row["grid"])
        settings.setdefault(key, {})[row["loss"]] = row
    rows = []
    for (network, side, grid), by_loss in settings.items():
        shares = [f"{by_loss[name]['share']:.2%}" for name in ("eager", "compile", "ours")]
        memory = (by_loss[name]["peak_bytes"] / 1e6 for name in ("eager", "ours"))
        rows.append([network, f"{side} x {side}", f"{grid} x {grid}", *shares])
        rows[-1].append(" / ".join(f"{megabytes:.1f}" for megabytes in memory))
    head = ["network", "pictures", "grid", "eager loss", "compiled", "ours"]
    table = markdown_table([*head, "peak MB of the step, eager / ours"], rows)
    sentences = "\n".join(f"- {sentence}" for sentence in record["conclusions"])
    return (
        "Time of the loss, forward and backward, over that of the whole training step on the CPU.\n"
        "`narrow-S` is the example's FCRN with stride S, `dense` three small convolutions at\n"
        f"full resolution.\n\n{table}\n\n{sentences}\n\n"
        + source_line(record, "train_step_cpu.json")
    )


# ---- GPU ----------------------------------------------------------------------------------------


def gpu_machine(records: Sequence[Record]) -> str:
    """What was run where."""
    rows = []
    for record in records:
        device, versions = record["device"], record["versions"]
        if device:
            rows.append(
                [
                    device["name"],
                    device["compute_capability"],
                    str(device["driver"]),
                    str(versions["cuda"]),
                    str(versions["torch"]),
                    record["date"],
                    str(record["git_commit"]),
                    f"{record['seconds']:.0f}",
                ]
            )
    head = ["GPU", "capability", "driver", "CUDA", "PyTorch", "date", "commit", "seconds"]
    return markdown_table(head, rows) if rows else _NOT_MEASURED_ON_GPU


def gpu_steps(records: Sequence[Record]) -> str:
    """Which checks passed, failed or were skipped, and with what result."""
    blocks = []
    for record in records:
        rows = [[step["title"], step["status"], step["detail"]] for step in record["steps"]]
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        blocks.append(markdown_table([f"{_gpu(record)}: check", "", "result"], rows, left=3))
    return "\n\n".join(blocks) or "No check has been run on a GPU yet."


def gpu_speed(records: Sequence[Record]) -> str:
    """Device time of a step, and how many times as long the others take."""
    blocks = []
    for record in records:
        timings = Timings(record["rows"])
        rows = []
        peers = ("mse_loss", "compile", "compile-max-autotune", "eager")
        for case in timings.cases():
            for pass_ in ("step", "no_grad"):
                for clock in ("device", "wall"):
                    row = timings.row(case, "ours", pass_, clock)
                    if row is None or (clock == "wall" and case.cells >= 2**18):
                        continue
                    share = timings.floor_share(case, pass_, clock)
                    rows.append(
                        [label(case), pass_, clock, f"{row['median_s'] * 1e6:.1f}"]
                        + [_times(timings.ratio(case, peer, pass_, clock)) for peer in peers]
                        + ["-" if share is None else f"{share:.0%}", f"{row['bytes_per_cell']:.1f}"]
                    )
        head = ["input, positive cells", "pass", "clock", "µs", "`F.mse_loss`", "`torch.compile`"]
        head += ["max-autotune", "eager PyTorch", "share of the copy", "bytes a cell"]
        if rows:
            source = source_line(record, _gpu_file(record))
            blocks.append(f"{markdown_table(head, rows, left=3)}\n\n{source}")
    return "\n\n".join(blocks) or _NOT_MEASURED_ON_GPU


def gpu_dram(records: Sequence[Record]) -> str:
    """DRAM traffic that ncu counted, beside the bytes expected."""
    blocks = []
    for record in records:
        rows = [
            [
                label(Case.from_json(entry["case"])),
                entry["pass"],
                f"{entry['read_per_cell']:.1f}",
                f"{entry['written_per_cell']:.1f}",
                f"{entry['read_per_cell'] + entry['written_per_cell']:.1f}",
                f"{entry['expected']:.1f}",
            ]
            for entry in record["dram"]
        ]
        head = [f"{_gpu(record)}: input, positive cells", "pass", "read", "written", "both"]
        if rows:
            blocks.append(markdown_table([*head, "expected"], rows, left=2))
    text = "\n\n".join(blocks)
    return f"DRAM bytes a cell:\n\n{text}" if text else "DRAM traffic has not been read yet."


def gpu_launches(records: Sequence[Record]) -> str:
    """Launches and synchronisations a step."""
    blocks = []
    for record in records:
        rows = [
            [
                f"({', '.join(map(str, entry['size']))}) {entry['dtype']}",
                "16384" if entry["grad_output"] else "1",
                f"{entry['our_launches']:g}",
                f"{entry['all_launches']:g}",
                f"{entry['synchronisations']:g}",
            ]
            for entry in record["launches"]
        ]
        head = [f"{_gpu(record)}: input", "grad_output", "launches of ours", "all launches"]
        if rows:
            blocks.append(markdown_table([*head, "waits in all"], rows))
    return "\n\n".join(blocks) or "Launches have not been counted yet."


def gpu_bars(records: Sequence[Record]) -> str:
    """The bars on GPUs, met or missed."""
    blocks = [f"{_gpu(each)}:\n\n{_bars(each['bars'])}" for each in records if each["bars"]]
    return "\n\n".join(blocks) or "No bar has been measured on a GPU yet."


def _bars(bars: Sequence[Record]) -> str:
    rows = [
        [
            bar["promise"],
            f"{'>=' if bar['at_least'] else '<='} {bar['wanted']:g}",
            f"{bar['measured']:.2f}",
            "met" if bar["met"] else "**missed**",
        ]
        for bar in bars
    ]
    return markdown_table(["bar", "wanted", "measured", ""], rows)


def _gpu(record: Record) -> str:
    return record["device"]["name"] if record["device"] else "unknown GPU"


def _gpu_file(record: Record) -> str:
    return record.get("file", "gpu_*.json")


# ---- machine code -------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Of a GPU, by its data sheet. A multiprocessor issues 4 instructions of a warp each clock."""

    architecture: str  # whose code it runs, or one like it
    bandwidth: float  # GB/s
    multiprocessors: int
    clock: float  # GHz, boost
    double_arithmetic: int  # additions of a multiprocessor each clock
    double_conversions: int


GPUS = {
    "T4": Limits("sm_75", 320, 40, 1.59, 2, 2),
    "RTX 3060": Limits("sm_86", 360, 28, 1.78, 2, 2),
    "L4": Limits("sm_86", 300, 58, 2.04, 2, 2),
    "RTX 4090": Limits("sm_86", 1008, 128, 2.52, 2, 2),
    "A100 80 GB": Limits("sm_80", 2039, 108, 1.41, 32, 16),
    "H100 SXM": Limits("sm_90", 3350, 132, 1.98, 64, 16),
    "H200": Limits("sm_90", 4800, 132, 1.98, 64, 16),
    "B200": Limits("sm_100", 8000, 148, 1.97, 64, 16),
}
# A vector of FCRN's seven maps is 16 bytes of each: read are two confidences or all maps of pred
# and target, written are all of the gradient; channels-last, as many elements.
_VECTOR_BYTES = {"none positive": 16 * 9, "all positive": 16 * 21, "any": 16 * 3}
_NOT_COUNTED = "No machine code has been counted yet: `python benchmarks/machine_code.py` does it."


def _kernels(records: Sequence[Record], *, general: bool) -> dict[str, dict[str, Record]]:
    """The forward kernels of float32 and bfloat16, by name and architecture."""
    found: dict[str, dict[str, Record]] = {}
    for row in records[-1]["rows"]:
        words = row["kernel"].split(", ")
        if "forward" not in words or "float16" in words or words[-2:] == ["bfloat16", "float32"]:
            continue
        if general or "general" not in words:
            name = row["kernel"].replace(", forward", "")
            found.setdefault(name, {})[row["architecture"]] = row
    return dict(sorted(found.items(), key=lambda item: ("general" in item[0], item[0])))


def machine_code(records: Sequence[Record]) -> str:
    if not records:
        return _NOT_COUNTED
    rows = []
    kernels = _kernels(records, general=True)
    for name, by_architecture in kernels.items():
        cells = []
        for row in by_architecture.values():
            issued = ", ".join(str(way["instructions"]) for way in row["ways"].values())
            cells.append(f"{issued}; {row['registers']}, {row['blocks']}")
        rows.append([name, *cells])
    architectures = next(iter(kernels.values()))
    return (
        f"{markdown_table(['kernel', *architectures], rows)}\n\nnvcc {records[-1]['nvcc']}, "
        f"commit {records[-1]['git_commit']}; counts in `benchmarks/results/machine_code.json`."
    )


def limits_on_paper(records: Sequence[Record]) -> str:
    if not records:
        return _NOT_COUNTED
    columns = [
        (f"{name}, {way}".removesuffix(", any"), way, rows)
        for name, rows in _kernels(records, general=False).items()
        for way in next(iter(rows.values()))["ways"]
    ]
    table = []
    for gpu, limits in GPUS.items():
        clocks = limits.multiprocessors * limits.clock
        cells = []
        for _, way, rows in columns:
            count = rows[limits.architecture]["ways"][way]
            memory = _VECTOR_BYTES[way] / limits.bandwidth
            issue = count["instructions"] / (4 * 32) / clocks
            doubles = sum(
                count[kind] / getattr(limits, kind) / clocks
                for kind in ("double_arithmetic", "double_conversions")
            )
            cells.append(f"{issue / memory:.0%}, {doubles / memory:.0%}")
        table.append([gpu, *cells])
    return markdown_table(["GPU", *(name for name, *_ in columns)], table)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


# ---- blocks -------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[Callable[[Sequence[Record]], str], str, str]] = {
    # name: the function, the benchmark and the files its records are in
    "cpu-speed": (cpu_speed, "loss_speed", "loss_speed_cpu.json"),
    "cpu-masked": (cpu_masked, "masked_speed", "masked_speed_cpu.json"),
    "cpu-bars": (cpu_bars, "loss_speed", "loss_speed_cpu.json"),
    "cpu-train-step": (cpu_train_step, "train_step", "train_step_cpu.json"),
    "gpu-machine": (gpu_machine, "gpu", "gpu_*.json"),
    "gpu-steps": (gpu_steps, "gpu", "gpu_*.json"),
    "gpu-speed": (gpu_speed, "gpu", "gpu_*.json"),
    "gpu-dram": (gpu_dram, "gpu", "gpu_*.json"),
    "gpu-launches": (gpu_launches, "gpu", "gpu_*.json"),
    "gpu-bars": (gpu_bars, "gpu", "gpu_*.json"),
    "machine-code": (machine_code, "machine_code", "machine_code.json"),
    "limits-on-paper": (limits_on_paper, "machine_code", "machine_code.json"),
}


def make_blocks(results: Path = provenance.RESULTS) -> dict[str, str]:
    """Every block, from the JSON files of a folder."""
    blocks = {}
    for name, (make, benchmark, pattern) in BLOCKS.items():
        records = [
            {**provenance.read_json(path, benchmark), "file": path.name}
            for path in sorted(results.glob(pattern))
        ]
        blocks[name] = make(records)
    return blocks


def fill(text: str, blocks: dict[str, str]) -> str:
    """A page with the bodies of its blocks replaced.

    Raises:
        ValueError: a block of an unknown name, or one that is not closed.
    """
    opened, closed = text.count("<!-- figures:"), text.count("<!-- end figures -->")
    if opened != closed or opened != len(_BLOCK.findall(text)):
        raise ValueError(f"{opened} blocks of figures are opened and {closed} closed")

    def filled(match: re.Match[str]) -> str:
        if match["name"] not in blocks:
            known = ", ".join(blocks)
            raise ValueError(f"there are no figures {match['name']!r}, but: {known}")
        return f"{match[1]}{blocks[match['name']]}\n{match[4]}"

    return _BLOCK.sub(filled, text)


def names_in(text: str) -> list[str]:
    """Names of the blocks on a page."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def pages() -> list[Path]:
    """README.md and the pages of docs/, as far as they exist."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in every if path.exists()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/*.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail on differences")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        blocks = make_blocks(options.results)
    except ValueError as error:
        parser.error(str(error))
    different = 0
    for page in options.pages or pages():
        try:
            old = page.read_text()
            new = fill(old, blocks)
        except (OSError, ValueError) as error:
            parser.error(f"{page}: {error}")
        if old == new:
            continue
        different += 1
        if options.check:
            lines = difflib.unified_diff(
                old.splitlines(),
                new.splitlines(),
                str(page),
                "what the JSON says",
                lineterm="",
                n=1,
            )
            print("\n".join(lines))
        else:
            page.write_text(new)
            print(f"rewritten: {page}")
    if different and options.check:
        print("run `python benchmarks/report.py` to rewrite the figures", file=sys.stderr)
    return 1 if different and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
