"""Whether operators are recorded, so that what runs must be right for other inputs as well."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether operators are recorded: what runs must then be one that can be differentiated."""
    return (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        # make_fx, fake tensors and users' own modes; there is no public name for it
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
