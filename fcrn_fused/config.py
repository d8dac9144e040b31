"""`show_config`: what is compiled in, and what serves each type of device."""

from __future__ import annotations

import importlib

import torch

from . import ops
from .version import __version__


def show_config() -> str:
    """What was built in, the PyTorch it was built against and runs with, and who serves what.

    One line a fact: versions first, then for "cpu" and "cuda" the backend that
    `fcrn_loss(..., backend="auto")` chooses and, if it is not the fused one, why.
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
