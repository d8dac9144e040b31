"""The CPU loops without AVX2: right, and to the bit what the others compute, on arm64 as well."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fcrn_fused import ops

TESTS = Path(__file__).resolve().parent
ABOUT_VALUES = (  # accuracy follows from the same bits, below
    "test_definition.py",
    "test_dtypes.py",
    "test_half_gradients.py",
    "test_layouts.py",
    "test_masked_mse_loss.py",
    "test_masking.py",
)
# Inputs from NumPy: PyTorch's own random numbers differ between instruction sets.
PRINT_BITS = """
import hashlib, numpy, torch
from fcrn_fused import fcrn_loss, masked_mse_loss
random = numpy.random.default_rng(0)
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for shape in ((2, 7, 64, 64), (3, 7, 13, 13), (1, 2, 5), (4, 3, 4097)):
        pred, target = (torch.from_numpy(random.standard_normal(shape)).to(dtype) for _ in "12")
        pred.requires_grad_()
        weight = torch.from_numpy(random.random(shape)).to(dtype)
        for loss in (
            fcrn_loss(pred, target, negative_weight=0.3, backend="fused"),
            fcrn_loss(pred, target, weight=weight, positive=weight[:, :1] > 0.9, backend="fused"),
            masked_mse_loss(pred, target, weight[:, :1] > 0.5, backend="fused"),
        ):
            (grad,) = torch.autograd.grad(3 * loss, pred)
            bits = grad.view(torch.uint8).numpy().tobytes()
            print(dtype, shape, loss.item().hex(), hashlib.sha256(bits).hexdigest())
"""


def run_with(capability: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python on these arguments, with PyTorch's word for the instruction set it may use."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(autouse=True)
def compiled() -> None:
    if ops.why_not("cpu") is not None:
        pytest.skip(f"nothing is compiled in: {ops.why_not('cpu')}")


def test_values_without_avx2() -> None:
    config = run_with("default", "-m", "fcrn_fused")
    assert "CPU instruction set: baseline" in config.stdout, config.stdout + config.stderr
    files = [TESTS / name for name in ABOUT_VALUES]
    run = run_with("default", "-m", "pytest", "-q", "-x", "-k", "fused-cpu", *files)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    assert " passed" in run.stdout


def test_the_same_bits_with_and_without_avx2() -> None:
    if "CPU instruction set: avx2" not in run_with("avx2", "-m", "fcrn_fused").stdout:
        pytest.skip("this processor has no AVX2")
    with_it, without = (run_with(name, "-c", PRINT_BITS) for name in ("avx2", "default"))
    assert with_it.returncode == without.returncode == 0, with_it.stderr + without.stderr
    assert len(with_it.stdout.splitlines()) == 48
    assert with_it.stdout == without.stdout


def test_the_same_bits_on_arm64(tmp_path: Path) -> None:
    """Under emulation: Debian's g++-aarch64-linux-gnu and qemu-user."""
    compilers = {"here": "g++", "arm64": "aarch64-linux-gnu-g++"}
    for tool in (*compilers.values(), "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    if platform.machine() == "aarch64":
        pytest.skip("this is one")
    printed = {}
    for name, compiler in compilers.items():
        flags = ["-std=c++20", "-O3", "-static", "-ffp-contract=off", "-fno-math-errno"]
        flags += ["-fno-trapping-math", f"-I{TESTS.parent / 'csrc'}"]
        program = tmp_path / name
        source = TESTS / "arm64" / "run_chunks.cpp"
        subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
        emulator = ["qemu-aarch64"] if name == "arm64" else []
        run = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True)
        printed[name] = run.stdout
    assert len(printed["here"].splitlines()) == 9 * 84
    assert printed["here"] == printed["arm64"]
