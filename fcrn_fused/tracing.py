"""Whether PyTorch is recording operators, to run them again with other inputs."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether operators are recorded; only differentiable ones may be called then."""
    return (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        # make_fx, fake tensors and users' own dispatch modes; PyTorch has no public name for this
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` is recording."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
