"""Writes the figures of README.md and docs/ from the JSON in benchmarks/results/.

    python benchmarks/report.py            # rewrite the blocks of figures
    python benchmarks/report.py --check    # fail where a block is not what the JSON says

A block stands between two comments and is made anew as a whole. One whose JSON is missing stays.

    <!-- figures: cpu-speed -->
    <!-- end figures -->

Times are given for GPUs only; for the CPU, ratios of times taken in one run.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dram
import loss_speed
import measure
from loss_speed import align
from measure import ROOT

Record = dict[str, Any]

_BLOCK = re.compile(
    r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end figures -->)", re.DOTALL
)


def source_line(record: Record) -> str:
    """Where figures come from: device, versions, date, commit and the file they are kept in."""
    device, versions = record["device"], record["versions"]
    words = [measure.device_name(device), f"PyTorch {versions['torch']}"]
    if device["type"] == "cuda":
        words.append(f"driver {device['driver']}")
    words += [record["date"], f"commit {record['git_commit'] or 'unknown'}"]
    return f"{', '.join(words)}; raw figures in `benchmarks/results/{record['file']}`."


# ---- speed --------------------------------------------------------------------------------------

_COLUMNS = {
    "mse_loss": "`F.mse_loss`",
    "mse_loss(weight)": "`F.mse_loss(weight=)`",
    "compile": "`torch.compile`",
    "compile-max-autotune": "max-autotune",
    "bytes": "bytes a cell",
}


def speed(record: Record, *, masked: bool) -> str:
    """How many times as long the others take."""
    rows = [row for row in record["rows"] if bool(row.get("weight_shape")) == masked]
    head, *lines = loss_speed.table(rows, seconds=record["device"]["type"] == "cuda")
    if masked:
        shown = [i for i, name in enumerate(head) if name != "floor / ours"]
        head, *lines = [[line[i] for i in shown] for line in [head, *lines]]
    names = {**_COLUMNS, "bytes": "bytes an element"} if masked else _COLUMNS
    return align([[names.get(name, name) for name in head], *lines])


def cpu_speed(record: Record) -> str:
    return (
        "How many times as long the others take, forward and backward. `F.mse_loss` has no weight\n"
        'here; the others compute the same loss. With "huge pages", `THP_MEM_ALLOC_ENABLE=1` was\n'
        f"set for all.\n\n{speed(record, masked=False)}\n\n{source_line(record)}"
    )


def cpu_masked(record: Record) -> str:
    return (
        "The same for `masked_mse_loss`. `F.mse_loss` has no weight and computes less.\n\n"
        f"{speed(record, masked=True)}\n\n{source_line(record)}"
    )


def cpu_train_step(record: Record) -> str:
    """The loss's share of a training step on the CPU."""
    settings: dict[tuple[str, int, int], dict[str, Record]] = {}
    for row in record["rows"]:
        settings.setdefault((row["network"], row["side"], row["grid"]), {})[row["loss"]] = row
    lines = [["network", "pictures", "grid", "eager loss", "compiled", "ours"]]
    lines[0].append("peak MB of the step, eager / ours")
    for (network, side, grid), by_loss in settings.items():
        shares = [f"{by_loss[name]['share']:.2%}" for name in ("eager", "compile", "ours")]
        peaks = " / ".join(f"{by_loss[name]['peak_bytes'] / 1e6:.1f}" for name in ("eager", "ours"))
        lines.append([network, f"{side} x {side}", f"{grid} x {grid}", *shares, peaks])
    return (
        "Time of the loss, forward and backward, over that of the whole training step on the CPU.\n"
        "`narrow-S` is the example's FCRN with stride S, `dense` three small convolutions at full\n"
        f"resolution.\n\n{align(lines)}\n\n{source_line(record)}"
    )


def gpu_speed(record: Record) -> str:
    tables = [speed(record, masked=masked) for masked in (False, True)]
    return "\n\n".join([*tables, source_line(record)])


def gpu_dram(record: Record) -> str:
    return f"{align(dram.table(record['dram']), 2)}\n\n{source_line(record)}"


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


def _kernels(record: Record) -> dict[str, dict[str, Record]]:
    """The forward kernels of float32 and bfloat16, by name and architecture."""
    found: dict[str, dict[str, Record]] = {}
    for row in record["rows"]:
        words = row["kernel"].split(", ")
        if "forward" in words and "float16" not in words and words[-2:] != ["bfloat16", "float32"]:
            name = row["kernel"].replace(", forward", "")
            found.setdefault(name, {})[row["architecture"]] = row
    return dict(sorted(found.items()))


def machine_code(record: Record) -> str:
    kernels = _kernels(record)
    lines = [["kernel", *next(iter(kernels.values()))]]
    for name, by_architecture in kernels.items():
        lines.append([name])
        for row in by_architecture.values():
            issued = ", ".join(str(way["instructions"]) for way in row["ways"].values())
            lines[-1].append(f"{issued}; {row['registers']}, {row['blocks']}")
    return (
        f"{align(lines)}\n\nnvcc {record['nvcc']}, commit {record['git_commit']}; "
        f"counts in `benchmarks/results/{record['file']}`."
    )


def limits_on_paper(record: Record) -> str:
    columns = [
        (f"{name}, {way}".removesuffix(", any"), way, rows)
        for name, rows in _kernels(record).items()
        for way in next(iter(rows.values()))["ways"]
    ]
    lines = [["GPU", *(name for name, *_ in columns)]]
    for gpu, limits in GPUS.items():
        lines.append([gpu])
        clocks = limits.multiprocessors * limits.clock
        for _, way, rows in columns:
            count = rows[limits.architecture]["ways"][way]
            memory = _VECTOR_BYTES[way] / limits.bandwidth
            issue = count["instructions"] / (4 * 32) / clocks
            doubles = sum(
                count[kind] / getattr(limits, kind) / clocks
                for kind in ("double_arithmetic", "double_conversions")
            )
            lines[-1].append(f"{issue / memory:.0%}, {doubles / memory:.0%}")
    return align(lines)


# ---- blocks -------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[Callable[[Record], str], str, str]] = {
    # name: the function, the benchmark and the files its records are in
    "cpu-speed": (cpu_speed, "loss_speed", "loss_speed_cpu.json"),
    "cpu-masked": (cpu_masked, "loss_speed", "loss_speed_cpu.json"),
    "cpu-train-step": (cpu_train_step, "train_step", "train_step_cpu.json"),
    "gpu-speed": (gpu_speed, "gpu", "gpu_*.json"),
    "gpu-dram": (gpu_dram, "gpu", "gpu_*.json"),
    "machine-code": (machine_code, "machine_code", "machine_code.json"),
    "limits-on-paper": (limits_on_paper, "machine_code", "machine_code.json"),
}


def make_blocks(results: Path = measure.RESULTS) -> dict[str, str]:
    """Every block that has figures, from the JSON files of a folder."""
    blocks = {}
    for name, (make, benchmark, pattern) in BLOCKS.items():
        records = [
            {**measure.read_json(path, benchmark), "file": path.name}
            for path in sorted(results.glob(pattern))
        ]
        if records:
            blocks[name] = "\n\n".join(map(make, records))
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
        if match["name"] not in BLOCKS:
            raise ValueError(f"there are no figures {match['name']!r}, but: {', '.join(BLOCKS)}")
        body = blocks.get(match["name"])
        return match[0] if body is None else f"{match[1]}{body}\n{match[4]}"

    return _BLOCK.sub(filled, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/*.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail on differences")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    different = 0
    try:
        blocks = make_blocks(options.results)
    except ValueError as error:
        parser.error(str(error))
    for page in options.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        try:
            old = page.read_text()
            new = fill(old, blocks)
        except (OSError, ValueError) as error:
            parser.error(f"{page}: {error}")
        if old == new:
            continue
        different += 1
        if options.check:
            names = (str(page), "what the JSON says")
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), *names, lineterm="", n=1
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
