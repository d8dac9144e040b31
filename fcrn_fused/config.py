"""`show_config`: how the package was built and which backend each device uses."""

from __future__ import annotations

import importlib

import torch

from . import ops
from .version import __version__


def show_config() -> str:
    """A report of how the package was built and which backend each device uses.

    One line each for the versions of the package, of PyTorch (running and built against) and of
    CUDA, the compiler, the CPU instruction set and the CUDA architectures. Then, for "cpu" and
    "cuda", the backend that `fcrn_loss(..., backend="auto")` chooses; if it is not the fused one,
    the reason.
    """
    lines = [f"fcrn_fused {__version__}", f"PyTorch running: {torch.__version__}"]
    if ops.why_not("cpu") is None:
        module = importlib.import_module("fcrn_fused._C")
        lines += [
            f"PyTorch built against: {ops.BUILD_INFO['pytorch']}",
            f"compiler: {module.compiler}",
            f"CPU instruction set: {module.instruction_set()}",
            f"CUDA built with: {ops.BUILD_INFO['cuda'] or 'none'}",
            f"CUDA architectures: {ops.BUILD_INFO['architectures'] or 'none'}",
        ]
    for device_type in ("cpu", "cuda"):
        reason = ops.why_not(device_type)
        backend = "fused" if reason is None else f"reference, because {reason}"
        lines.append(f"{device_type}: {backend}")
    return "\n".join(lines)
