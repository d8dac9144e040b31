"""Where a figure comes from: device, versions, date and commit, and the file that keeps it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# For examples/, and for fcrn_fused where it is built in place; an installed one goes before it.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def describe_run(device: torch.device) -> dict[str, Any]:
    """Device, versions, date (UTC) and commit of a run; no host names and no paths."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "git_commit": git_commit(),
        "load_before": round(os.getloadavg()[0], 2),
        "device": describe_device(device),
        "versions": versions(),
    }


def busy_warning(cores: int | None = None) -> str | None:
    """A sentence where the machine has more to do than this run, so that figures will waver."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    cores = cores or len(os.sched_getaffinity(0))
    if load < 0.5 * cores:
        return None
    return f"the machine is busy (load {load:.1f} on {cores} cores): figures will waver"


def describe_device(device: torch.device) -> dict[str, Any]:
    """The model of the CPU or GPU and what its speed depends on."""
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": gpu_driver(),
        "host_cpu": cpu_model(),
        "host_cores": len(os.sched_getaffinity(0)),
    }


def device_name(device: dict[str, Any]) -> str:
    """A device in a few words, for captions: `NVIDIA H200` or `CPU (AMD EPYC), 2 threads`."""
    if device["type"] == "cpu":
        return f"CPU ({device['name']}), {device['threads']} threads"
    return str(device["name"])


def cpu_model() -> str:
    """The processor's name as it gives it itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_driver() -> str | None:
    """Version of NVIDIA's driver, or None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on."""
    import fcrn_fused

    return {
        "fcrn_fused": fcrn_fused.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "python": platform.python_version(),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Short hash of the checkout this file lies in, with -dirty where the code differs from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    all_but_figures = (":/", ":(exclude,top)benchmarks/results")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *all_but_figures)
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record so that it can be read in a diff: a line for each of its small parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


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
