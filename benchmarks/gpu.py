"""Everything that has to be seen on a GPU, in one command and under ten minutes.

    python benchmarks/gpu.py                     # or: make gpu
    python benchmarks/gpu.py --only speed dram   # a part of it
    python benchmarks/gpu.py --dry-run           # no GPU: what would be run, and the tables

Builds the kernels for the GPU at hand, in place; runs the checks of gpu_checks.py, each in a
process of its own; times the cases of loss_speed.py; reads the DRAM traffic with ncu; runs
compute-sanitizer over a short selection, and the whole test suite. A step that fails stops no
other. What a missing tool would have done is reported as skipped. One JSON goes to
benchmarks/results/, from which report.py makes docs/gpu.md and the README's table; what failed is
printed last.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import provenance
import report
from bars import judge
from gpu_checks import CHECKS, MARKER_KERNEL, OUR_KERNELS
from provenance import ROOT

CHECKS_SCRIPT = Path(__file__).with_name("gpu_checks.py")
TIME_LIMIT = 580.0  # seconds
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DRAM_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
_LEAST = 2.0  # seconds: a step for which less is left is not begun
_KEPT_FOR_TESTS = 150.0  # seconds: what the timings leave to the steps after them


class Outcome(NamedTuple):
    """How a process ended."""

    returncode: int | None  # None: it ran out of time
    output: str  # standard output
    log: str  # standard error, after the output where it is the log of a tool


class Result(NamedTuple):
    """What a step found: passed, failed or skipped, in a few words, and its figures."""

    status: str
    detail: str
    figures: tuple[dict[str, Any], ...] = ()


class Step(NamedTuple):
    """A process to run and how to read its outcome; or, with a reason, one that cannot be run."""

    name: str
    title: str
    limit: float  # seconds
    command: tuple[str, ...]
    read: Callable[[Outcome], Result]
    environment: tuple[tuple[str, str], ...] = ()
    why_skipped: str | None = None


def stages() -> list[list[Step]]:
    """The steps in their order; those of one stage run at the same time."""
    alone = [_check_step(name, 60) for name in ("launches",)]
    side_by_side = ("accuracy", "determinism", "graph_replay", "streams")
    side_by_side += ("several_gpus", "huge", "grad_scaler")
    return [
        [_build_step()],
        [_check_step("machine", 60)],
        [_check_step(name, 90) for name in side_by_side],
        alone,
        [_check_step("speed", 230)],
        [_dram_step()],
        [_tests_step(), *(_sanitizer_step(tool) for tool in SANITIZER_TOOLS)],
    ]


def _build_step() -> Step:
    return Step(
        "build",
        "kernels built for the GPU at hand",
        150,
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        _read_build,
        (("FCRN_FUSED_BUILD", "cuda"),),
    )


def _check_step(name: str, limit: float) -> Step:
    command = (sys.executable, str(CHECKS_SCRIPT), name)
    return Step(name, CHECKS[name].title, limit, command, read_entries)


def _tests_step() -> Step:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--require", "fused-cuda"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))]
    why = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    return Step("tests", "the test suite", 240, tuple(command), read_pytest, why_skipped=why)


def _sanitizer_step(tool: str) -> Step:
    program = find_tool("compute-sanitizer")
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, str(CHECKS_SCRIPT), "selection"]
    return Step(
        tool,
        f"compute-sanitizer {tool}",
        200,
        tuple(command),
        read_sanitizer,
        # a block of memory for each tensor, so that one cannot be overrun into the next unseen
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        None if program else "compute-sanitizer was not found on PATH or under CUDA_HOME",
    )


def _dram_step() -> Step:
    program = find_tool("ncu")
    command = [program or "ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(DRAM_METRICS), "--kernel-name-base", "demangled"]
    command += ["--kernel-name", f"regex:{OUR_KERNELS}|{MARKER_KERNEL}"]
    command += [sys.executable, str(CHECKS_SCRIPT), "dram"]
    return Step(
        "dram",
        "DRAM bytes a cell, read by ncu",
        120,
        tuple(command),
        read_dram,
        why_skipped=None if program else "ncu was not found on PATH or under CUDA_HOME",
    )


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit, from PATH, CUDA_HOME or the usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


# ---- running ------------------------------------------------------------------------------------


def run_process(step: Step, limit: float) -> Outcome:
    """Run a step's command in the checkout; output that came before a time-out is kept.

    A command has a process group of its own, so that what it starts can be ended with it.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **dict(step.environment), "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(127, "", str(error))
        _running.add(process)
        try:
            returncode: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            returncode = None
            _end(process)
        finally:
            _running.discard(process)
        output.seek(0)
        log.seek(0)
        return Outcome(returncode, output.read(), log.read())


_running: set[subprocess.Popen[bytes]] = set()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_step(step: Step, limit: float) -> dict[str, Any]:
    """Run one step within a limit of seconds; its entry in the record."""
    started = time.monotonic()
    if step.why_skipped:
        result = Result("skipped", step.why_skipped)
    elif limit < _LEAST:
        result = Result("skipped", "no time was left for it")
    else:
        outcome = run_process(step, limit)
        try:
            result = step.read(outcome)
        except Exception as error:  # output that nobody has seen yet must not end the whole run
            result = Result("failed", f"its output was not understood: {error!r}")
        if outcome.returncode is None:
            detail = f"stopped after {limit:.0f} s; {result.detail}"
            result = result._replace(status="failed", detail=detail)
        if result.status == "failed":
            tail = "\n".join(f"{outcome.output}\n{outcome.log}".strip().splitlines()[-15:])
            print(f"\n--- {step.name} failed, end of its output:\n{tail}\n---", file=sys.stderr)
    return {
        "name": step.name,
        "title": step.title,
        "status": result.status,
        "detail": without_paths(result.detail),
        "seconds": round(time.monotonic() - started, 1),
        "figures": list(result.figures),
    }


def run_stages(
    to_run: Sequence[Sequence[Step]], time_limit: float, done: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """Run the stages one after another; `done` is told of every step."""
    deadline = time.monotonic() + time_limit
    entries = []
    for number, stage in enumerate(to_run):
        left = deadline - time.monotonic()
        if any(step.name == "speed" for step in stage) and number + 1 < len(to_run):
            left = max(60.0, left - _KEPT_FOR_TESTS)
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(stage))) as pool:
            futures = [pool.submit(run_step, step, min(step.limit, left)) for step in stage]
            try:
                for future in concurrent.futures.as_completed(futures):
                    done(future.result())
            except KeyboardInterrupt:
                for process in list(_running):
                    _end(process)
                raise
            entries += [future.result() for future in futures]
    return entries


def without_paths(text: str) -> str:
    """A text for the record: no path of this machine, at most 500 characters."""
    text = text.replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w.:])/(?:[\w.+-]+/)+", "", text)[:500]


# ---- reading ------------------------------------------------------------------------------------


def read_entries(outcome: Outcome) -> Result:
    """The outcome of a check of gpu_checks.py: its last line says how it went."""
    entries = json_lines(outcome.output)
    figures = tuple(entry for entry in entries if "figure" in entry)
    verdict = next((entry for entry in entries if "status" in entry), None)
    if verdict is None:
        last = (outcome.log.strip().splitlines() or ["no output"])[-1]
        return Result("failed", f"ended with {outcome.returncode}: {last}", figures)
    return Result(verdict["status"], verdict["detail"], figures)


def json_lines(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects, among others."""
    entries = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a process that was ended
                continue
    return entries


def _read_build(outcome: Outcome) -> Result:
    if outcome.returncode == 0:
        return Result("passed", "CPU and CUDA kernels")
    last = (f"{outcome.output}\n{outcome.log}".strip().splitlines() or ["no output"])[-1]
    return Result("failed", last)


def read_pytest(outcome: Outcome) -> Result:
    """Counts of a pytest run; passed only if some passed and none failed."""
    summaries = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+", outcome.output, re.M)
    if not summaries:
        last = (f"{outcome.output}\n{outcome.log}".strip().splitlines() or ["no output"])[-1]
        return Result("failed", f"pytest gave no summary: {last}")
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome.output, re.M)
    passed = outcome.returncode == 0 and " passed" in f" {summaries[-1]}"
    detail = summaries[-1] + (f": {', '.join(failures[:5])}" if failures else "")
    return Result("passed" if passed else "failed", detail)


def read_sanitizer(outcome: Outcome) -> Result:
    """The summary of compute-sanitizer; errors in PyTorch's own kernels are told apart."""
    text = f"{outcome.output}\n{outcome.log}"
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", text)
    if "Device not supported" in text or "not supported on this" in text:
        return Result("skipped", "compute-sanitizer does not support this device or driver")
    if not found:
        return read_entries(outcome)._replace(status="failed")
    workload = next((entry for entry in json_lines(outcome.output) if "status" in entry), None)
    errors = int(found[-1])
    if workload is None or workload["status"] != "passed":
        detail = workload["detail"] if workload else f"it ended with {outcome.returncode}"
        return Result("failed", f"{errors} errors, and the selection did not end well: {detail}")
    if errors == 0:
        return Result("passed", f"0 errors, {workload['detail']}")
    if OUR_KERNELS not in text:
        return Result("passed", f"{errors} errors, all of them in kernels of PyTorch")
    return Result("failed", f"{errors} errors")


def read_dram(outcome: Outcome) -> Result:
    """Bytes a cell that each case moved, from ncu's CSV; a marker kernel begins each case."""
    text = f"{outcome.output}\n{outcome.log}"
    if "ERR_NVGPUCTRPERM" in text:
        return Result("skipped", "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    if "LibraryNotLoaded" in text or "Failed to initialize the profiler" in text:
        return Result("skipped", "ncu cannot read the counters of this machine")
    workload = read_entries(outcome)
    cases_run = [entry for entry in workload.figures if entry["figure"] == "dram"]
    measured = split_by_marker(ncu_kernels(outcome.output))
    if workload.status != "passed" or len(measured) != len(cases_run) or not measured:
        return Result(
            "failed",
            f"{len(measured)} cases measured of {len(cases_run)} run: {workload.detail}",
        )
    figures = []
    for entry, kernels in zip(cases_run, measured, strict=True):
        batch, _, height, width = entry["case"]["size"]
        cells = batch * height * width
        read, written, nanoseconds = (
            sum(kernel[metric] for kernel in kernels) for metric in DRAM_METRICS
        )
        figures.append(
            {
                **entry,
                "read_per_cell": read / cells,
                "written_per_cell": written / cells,
                "seconds": nanoseconds / 1e9,
                "launches": len(kernels),
            }
        )
    return Result("passed", f"{len(figures)} cases", tuple(figures))


def ncu_kernels(text: str) -> list[dict[str, Any]]:
    """Kernels in the order of their launch, with the metrics of each, from ncu's long CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def split_by_marker(kernels: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Our kernels, a list for each marker kernel that went before them."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if MARKER_KERNEL in kernel["kernel"]:
            groups.append([])
        elif groups and OUR_KERNELS in kernel["kernel"]:
            groups[-1].append(kernel)
    return groups


# ---- the record ---------------------------------------------------------------------------------


def make_record(entries: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The record of a run, as it is written: every figure in it comes from a step's output."""
    figures = [figure for entry in entries for figure in entry["figures"]]
    machine = next((figure for figure in figures if figure["figure"] == "machine"), None)
    rows = [_without_kind(figure) for figure in figures if figure["figure"] == "speed"]
    run = {name: (machine or {}).get(name) for name in ("date", "git_commit", "device", "versions")}
    return {
        "benchmark": "gpu",
        **run,
        "seconds": round(seconds, 1),
        "steps": [
            {name: value for name, value in entry.items() if name != "figures"} for entry in entries
        ],
        "launches": [_without_kind(each) for each in figures if each["figure"] == "launches"],
        "dram": [_without_kind(each) for each in figures if each["figure"] == "dram"],
        "bars": [bar.as_json() for bar in judge(rows, "cuda")],
        "rows": rows,
    }


def _without_kind(figure: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figure.items() if name != "figure"}


def record_path(record: dict[str, Any]) -> Path:
    """Where the record of a GPU belongs, by the GPU's name."""
    name = (record["device"] or {}).get("name", "unknown")
    return provenance.RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def format_record(record: dict[str, Any] | None) -> str:
    """The tables of a record, or of none, for the terminal: those of the documentation."""
    blocks = (report.gpu_machine, report.gpu_steps, report.gpu_speed)
    blocks += (report.gpu_dram, report.gpu_launches, report.gpu_bars)
    return "\n\n".join(block([record] if record else []) for block in blocks)


def failures(record: dict[str, Any]) -> str:
    """What failed, what was skipped and which bars were missed: the last lines of a run."""
    lines = []
    for status in ("skipped", "failed"):
        for step in record["steps"]:
            if step["status"] == status:
                lines.append(f"{status}: {step['title']}: {step['detail']}")
    for bar in record["bars"]:
        if not bar["met"]:
            sign = ">=" if bar["at_least"] else "<="
            lines.append(f"missed: {bar['promise']}: {bar['measured']:.2f}, {sign} {bar['wanted']}")
    failed = sum(step["status"] == "failed" for step in record["steps"])
    lines.append(f"{failed} of {len(record['steps'])} steps failed")
    return "\n".join(lines)


def dry_run(record: dict[str, Any] | None, chosen: Sequence[Sequence[Step]]) -> str:
    """What would be run, and the tables of a recorded result or of none."""
    lines = []
    for number, stage in enumerate(chosen, start=1):
        for step in stage:
            how = step.why_skipped or without_paths(" ".join(step.command))
            lines.append(f"{number}. {step.name} (at most {step.limit:.0f} s): {how}")
    return "\n".join([*lines, "", format_record(record)])


def main(arguments: Sequence[str] | None = None) -> int:
    every = [step.name for stage in stages() for step in stage]
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=every, metavar="STEP", help=", ".join(every))
    add("--skip", nargs="+", choices=every, default=[], metavar="STEP")
    add("--time-limit", type=float, default=TIME_LIMIT, help="seconds for all (default: 580)")
    add("--output", type=Path, help="default: benchmarks/results/gpu_<name of the GPU>.json")
    add("--dry-run", action="store_true", help="run nothing; with --record, show its tables")
    add("--record", type=Path, metavar="OLD.json", help="a recorded result, for --dry-run")
    options = parser.parse_args(arguments)
    if not options.time_limit > 0:
        parser.error(f"--time-limit must be positive, got {options.time_limit}")
    if options.record and not options.dry_run:
        parser.error("--record is for --dry-run")
    wanted = [name for name in options.only or every if name not in options.skip]
    chosen = [[step for step in stage if step.name in wanted] for stage in stages()]
    chosen = [stage for stage in chosen if stage]
    if not chosen:
        parser.error("no step is left to run")
    if options.dry_run:
        try:
            record = provenance.read_json(options.record, "gpu") if options.record else None
        except ValueError as error:
            parser.error(f"--record {error}")
        print(dry_run(record, chosen))
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu.py: there is no CUDA device that this PyTorch "
            f"({torch.__version__}) can use, so nothing was run and nothing was written.",
            file=sys.stderr,
        )
        return 1

    def done(entry: dict[str, Any]) -> None:
        print(
            f"{entry['status']:8} {entry['name']:14} {entry['seconds']:6.1f} s  {entry['detail']}"
        )
        sys.stdout.flush()

    started = time.monotonic()
    record = make_record(run_stages(chosen, options.time_limit, done), time.monotonic() - started)
    path = options.output or record_path(record)
    provenance.write_json(record, path)
    print("\n" + format_record(record))
    print(f"\nwritten: {path}\n\n" + failures(record))
    return 1 if any(step["status"] == "failed" for step in record["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
