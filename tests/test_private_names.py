"""The private names of PyTorch that the package uses: a release that drops one fails here."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch

import fcrn_fused

NAMES = (
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._len_torch_dispatch_stack",
    "torch._check",
    "torch.autograd.forward_ad._current_level",
    "torch.jit.is_tracing",  # not private, not documented
)
ALIASES = {"fwAD": "torch.autograd.forward_ad", "functorch": "torch._C._functorch"}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name: str) -> None:
    functools.reduce(getattr, name.split(".")[1:], torch)


def test_dynamo_reads_the_mark_of_a_constant() -> None:
    """`_dynamo_marked_constant`, which the package sets by itself, is what PyTorch sets."""

    def function() -> None: ...

    before = set(vars(function))
    torch.compiler.assume_constant_result(function)
    assert set(vars(function)) - before == {"_dynamo_marked_constant"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written, "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return ALIASES.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (value := dotted(node.value)):
        return f"{value}.{node.attr}"
    return ""


def test_the_list_is_complete() -> None:
    used = set()
    for file in Path(fcrn_fused.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = dotted(node)
            parts = name.split(".")
            if parts[0] == "torch" and any(part.startswith("_") for part in parts):
                used.add(name)
    whole = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}
    whole = {name for name in whole if not name.startswith("torch.__version__")}
    assert whole == {name for name in NAMES if "._" in name}
