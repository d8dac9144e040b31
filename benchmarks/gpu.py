"""Everything that only a GPU shows, in one command and under ten minutes.

    python benchmarks/gpu.py                    # or: make gpu
    python benchmarks/gpu.py --only speed dram  # some of the steps
    python benchmarks/gpu.py --dry-run          # what would be run, without a GPU

Builds the kernels; times the losses (loss_speed.py) and counts DRAM bytes (dram.py) while nothing
else runs; then runs the tests that need a GPU and, at the same time, compute-sanitizer's four tools
over those marked "sanitizer". A step that fails stops no other, one whose tool is missing is
skipped. benchmarks/results/gpu_<name of the GPU>.json says what ran on what; the output of each
step goes to build/gpu/. Without a git repository GIT_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import measure
from machine_code import cuda_tool
from measure import ROOT

TIME_LIMIT = 540.0  # seconds
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
LOGS = ROOT / "build" / "gpu"
OURS = "fcrn::"  # the namespace of all our kernels
# Seconds that are kept for the steps after these.
_RESERVED = {"build": 240.0, "speed": 150.0, "dram": 125.0}
_FOR_SIGINT = 15.0  # seconds: pytest, interrupted, still says what failed


class Step(NamedTuple):
    """A process to run; `why_not` says what is missing for it, if something is."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    environment: tuple[tuple[str, str], ...] = ()
    why_not: str | None = None


def stages(python: str = sys.executable) -> list[list[Step]]:
    """The steps in their order; those of one stage run at the same time."""
    build = (python, "setup.py", "build_ext", "--inplace")
    speed = (python, "-u", "benchmarks/loss_speed.py", "--device", "cuda")
    speed += ("--time-limit", "140", "--rounds", "7", "--output", str(LOGS / "speed.json"))
    dram = (python, "-u", "benchmarks/dram.py", "--output", str(LOGS / "dram.json"))
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--require", "fused-cuda")
    no_pytest = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    large = (*pytest, "-m", "cuda and memory", "tests")
    tests = (*pytest, "-m", "cuda and not memory", "--tb=short", "--durations=15", "tests")
    if importlib.util.find_spec("xdist"):
        processes = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
        tests += ("-n", str(processes))
    sanitizer = cuda_tool("compute-sanitizer")
    no_sanitizer = no_pytest or (None if sanitizer else "compute-sanitizer was not found")
    checked = (*pytest, "-m", "sanitizer and cuda", "-k", "not reference", "tests/test_cuda.py")
    if importlib.util.find_spec("hypothesis"):
        checked += ("tests/test_weight_and_positive.py",)
    threads = (("OMP_NUM_THREADS", "2"),)  # a dozen processes share the host
    # a block of memory for each tensor, so that one cannot be overrun into the next unseen
    uncached = (*threads, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))

    def sanitize(tool: str) -> Step:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        return Step(tool, (*command, *checked), 300, uncached, no_sanitizer)

    return [
        [Step("build", build, 200, (("FCRN_FUSED_BUILD", "cuda"),))],
        [Step("speed", speed, 190)],
        [Step("dram", dram, 120, (), None if cuda_tool("ncu") else "ncu was not found")],
        [
            Step("tests", tests, 300, threads, no_pytest),
            Step("large", large, 300, threads, no_pytest),
            *map(sanitize, SANITIZERS),
        ],
    ]


def run(step: Step, limit: float) -> dict[str, Any]:
    """Run a step within a limit of seconds, its output in a file; its entry in the record."""
    started = time.monotonic()
    status, detail = "skipped", step.why_not or "no time was left for it"
    if step.why_not is None and limit > 2:
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"{step.name}.log"
        print(f"running  {step.name}, at most {limit:.0f} s", flush=True)
        environment = {**os.environ, **dict(step.environment)}
        with log.open("w") as file:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts can be ended with it
            )
            over_time = not _wait(process, limit)
            if over_time:
                os.killpg(process.pid, signal.SIGINT)
                if not _wait(process, _FOR_SIGINT):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        status, detail = verdict(step.name, process.returncode, log.read_text(errors="replace"))
        if over_time:
            status, detail = "failed", f"stopped after {limit:.0f} s; {detail}"
    seconds = round(time.monotonic() - started, 1)
    print(f"{status:8} {step.name:10} {seconds:6.1f} s  {detail}", flush=True)
    return {"name": step.name, "status": status, "seconds": seconds, "detail": detail}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def verdict(name: str, returncode: int, log: str) -> tuple[str, str]:
    """Status and one line of detail, without the paths of this machine."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    status, detail = "failed" if returncode else "passed", lines[-1]
    if summary := re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error)[^=]*? in [\d.]+s)", log, re.M):
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.M)
        detail = "; ".join([summary[-1], *failures[:5]])
    if name in SANITIZERS:
        counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)
        errors = int(counts[-1]) if counts else 0
        where = "" if not errors or OURS in log else ", all of them in kernels of PyTorch"
        detail = f"{errors} errors{where}; {detail}"
        if "not supported on this" in log or "Device not supported" in log:
            status = "skipped"
        else:
            passed = bool(counts) and (not errors or bool(where)) and returncode in (0, 86)
            all_ran = bool(summary) and "passed" in summary[-1] and "failed" not in summary[-1]
            status = "passed" if passed and all_ran else "failed"
    if name == "dram" and "ERR_NVGPUCTRPERM" in log:
        status, detail = "skipped", "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"
    return status, re.sub(r"(?<![\w.:])/(?:[\w.+-]+/)+", "", detail)[:500]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The figures that a step has written, as far as it came."""
    path = LOGS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for stage in stages() for step in stage]
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    add("--time-limit", type=float, default=TIME_LIMIT, help="seconds in all (default: 540)")
    add("--output", type=Path, help="default: benchmarks/results/gpu_<name>.json")
    add("--dry-run", action="store_true", help="print the steps and end")
    options = parser.parse_args(arguments)
    chosen = [[step for step in stage if step.name in options.only] for stage in stages()]
    if options.dry_run:
        for number, stage in enumerate(chosen, start=1):
            for step in stage:
                how = step.why_not or " ".join(map(str, step.command)).replace(f"{ROOT}/", "")
                print(f"{number}. {step.name}, at most {step.limit:.0f} s: {how}")
        return 0
    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device; nothing was run", file=sys.stderr)
        return 1

    started = time.monotonic()
    record = {"benchmark": "gpu", **measure.describe_run(torch.device("cuda")), "steps": []}
    name = re.sub(r"[^a-z0-9]+", "_", record["device"]["name"].lower())
    path = options.output or measure.RESULTS / f"gpu_{name}.json"
    shutil.rmtree(LOGS, ignore_errors=True)
    for stage in filter(None, chosen):
        left = options.time_limit - (time.monotonic() - started) - _FOR_SIGINT
        left -= _RESERVED.get(stage[0].name, 0) if "tests" in options.only else 0
        with concurrent.futures.ThreadPoolExecutor(len(stage)) as pool:
            entries = list(
                pool.map(lambda step, left=left: run(step, min(step.limit, left)), stage)
            )
        record["steps"] += entries
        record["seconds"] = round(time.monotonic() - started, 1)
        record["rows"], record["dram"] = rows_of("speed"), rows_of("dram")
        measure.write_json(record, path)
    if (plot := LOGS / "speed.png").exists():
        shutil.copy(plot, path.with_suffix(".png"))
    failed = [step["name"] for step in record["steps"] if step["status"] == "failed"]
    for name in failed:
        tail = "\n".join((LOGS / f"{name}.log").read_text(errors="replace").splitlines()[-40:])
        print(f"\n--- end of build/gpu/{name}.log:\n{tail}")
    print(f"\n{record['seconds']:.0f} s, failed: {', '.join(failed) or 'nothing'}")
    print(f"written: {path.name}; `python benchmarks/report.py` makes the tables of it")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
