"""`show_config()` and `python -m fcrn_fused`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from implementations import IMPLEMENTATIONS

import fcrn_fused
from fcrn_fused import ops


def test_it_names_versions_and_devices() -> None:
    config = fcrn_fused.show_config()
    assert isinstance(config, str)
    assert fcrn_fused.__version__ in config
    assert torch.__version__ in config
    lines = config.splitlines()
    for device in ("cpu", "cuda"):
        (line,) = [line for line in lines if line.startswith(f"{device}:")]
        reason = ops.why_not(device)
        assert ("fused" in line) == (reason is None or "fused" in (reason or ""))
        if reason is not None:
            assert "reference" in line
            assert reason in line


def test_it_says_what_is_compiled_in() -> None:
    if ops.why_not("cpu") is not None:
        pytest.skip(f"nothing is compiled in: {ops.why_not('cpu')}")
    config = fcrn_fused.show_config().lower()
    for word in ("cuda", "architectures", "pytorch built against", "pytorch running"):
        assert word in config


def test_cuda_kernels_that_were_built_are_loaded_without_a_gpu() -> None:
    """A symbol that the linker did not find shows here."""
    if ops.BUILD_INFO.get("cuda") is None or not torch.backends.cuda.is_built():
        pytest.skip("no CUDA kernels, or no CUDA build of PyTorch")
    assert "fcrn_fused._cuda" in sys.modules
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fcrn_fused::forward_into", "CUDA")


def test_it_agrees_with_what_runs() -> None:
    lines = fcrn_fused.show_config().splitlines()
    for implementation in IMPLEMENTATIONS:
        if implementation.is_fused and implementation.why_not() is None:
            (line,) = [line for line in lines if line.startswith(f"{implementation.device}:")]
            assert line.split(":")[1].strip().startswith("fused")


def test_the_command_prints_it() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fcrn_fused"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == fcrn_fused.show_config().strip()
