"""The CPU loops for machines without AVX2 pass the tests of the values as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fcrn_fused import ops

TESTS = Path(__file__).parent
ABOUT_VALUES = (
    "test_accuracy.py",
    "test_definition.py",
    "test_dtypes.py",
    "test_half_gradients.py",
    "test_layouts.py",
    "test_masking.py",
)


def run_on_the_baseline(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_values_without_avx2() -> None:
    if ops.compiled_module() is None:
        pytest.skip(f"nothing is compiled in: {ops.why_not('cpu')}")
    config = run_on_the_baseline("-m", "fcrn_fused")
    assert "CPU instruction set: baseline" in config.stdout, config.stdout + config.stderr
    files = [TESTS / name for name in ABOUT_VALUES]
    run = run_on_the_baseline("-m", "pytest", "-q", "-x", "-k", "fused-cpu", *files)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    assert " passed" in run.stdout
