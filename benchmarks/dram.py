"""DRAM bytes a cell that the kernels read and write, counted by ncu, beside the bytes expected.

    python benchmarks/dram.py [--output FILE.json]

ncu runs this script again with --workload, which calls the loss once for each case, after a marker
kernel. What is still in the cache when a kernel ends is not counted as written.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import inputs
import measure
from inputs import Case
from loss_speed import HUGE, MASKED, align, call_of, losses_for, variants
from machine_code import cuda_tool

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
OURS, MARKER = "fcrn::", "spin_kernel"  # the namespace of all our kernels; torch.cuda._sleep's
LARGE_MASK = MASKED[0]._replace(shape=(64, 7, 512, 512), weight_shape=(64, 1, 512, 512))
TASKS = [
    *((case, "step") for case in (HUGE, *variants(HUGE), LARGE_MASK)),
    *((HUGE, pass_) for pass_ in ("no_grad", "scaled")),
]


def workload(tasks: Sequence[tuple[Case, str]], device: torch.device) -> None:
    """A marker and a call for each case; a line on standard output says what to expect."""
    for case, pass_ in tasks:
        batch = inputs.make_inputs(case, device)
        call = call_of(losses_for(case, pass_, batch)["ours"], batch, pass_)
        if device.type == "cuda":
            torch.cuda._sleep(1000)
        call()
        print(f"expected {inputs.expected_bytes(case, batch.chosen, pass_, 'cuda')}", flush=True)
        del batch, call
        torch.cuda.empty_cache()


def read_ncu(lines: Iterable[str]) -> list[list[dict[str, float]]]:
    """The metrics of our kernels, a list for each marker before them, from ncu's CSV."""
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    groups: list[list[dict[str, float]]] = []
    for kernel in kernels.values():
        if MARKER in kernel["name"]:
            groups.append([])
        elif groups and OURS in kernel["name"]:
            groups[-1].append(kernel)
    return groups


def make_rows(output: str, tasks: Sequence[tuple[Case, str]]) -> list[dict[str, Any]]:
    """What was counted for each case; fewer rows where the run ended early."""
    lines = output.splitlines()
    expected = [float(line.split()[1]) for line in lines if line.startswith("expected ")]
    rows = []
    for (case, pass_), group, wanted in zip(tasks, read_ncu(lines), expected, strict=False):
        read, written, nanoseconds = (sum(each[name] for each in group) for name in METRICS)
        rows.append(
            {"case": case.label, "pass": pass_, "units": case.units, "launches": len(group)}
            | {"read": read, "written": written, "expected": wanted, "seconds": nanoseconds / 1e9}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Bytes for each cell (of a masked loss: element)."""
    lines = [["input", "pass", "read", "written", "both", "expected"]]
    for row in rows:
        moved = (row["read"], row["written"], row["read"] + row["written"], row["expected"])
        lines.append([row["case"], row["pass"], *(f"{each / row['units']:.1f}" for each in moved)])
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dram.py", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/dram.json")
    parser.add_argument("--workload", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.workload:
        workload(TASKS, torch.device("cuda"))
        return 0
    ncu = cuda_tool("ncu")
    if ncu is None:
        parser.error("ncu was not found on PATH or under CUDA_HOME")
    command = [ncu, "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS), "--kernel-name-base", "demangled"]
    command += [
        "--kernel-name",
        f"regex:.*(fcrn|{MARKER}).*",
        sys.executable,
        __file__,
        "--workload",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = make_rows(run.stdout, TASKS)
    print(align(table(rows), 2))
    if len(rows) < len(TASKS):
        print("\n".join(f"{run.stdout}\n{run.stderr}".splitlines()[-15:]), file=sys.stderr)
        print(f"{len(rows)} of {len(TASKS)} cases were counted", file=sys.stderr)
    record = {"benchmark": "dram", **measure.describe_run(torch.device("cuda")), "rows": rows}
    measure.write_json(record, options.output or measure.RESULTS / "dram.json")
    return int(len(rows) < len(TASKS))


if __name__ == "__main__":
    sys.exit(main())
