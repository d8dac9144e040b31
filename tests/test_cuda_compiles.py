"""What nvcc makes of the CUDA kernels, held to budgets. It needs no GPU.

The numbers are those of benchmarks/machine_code.py, which makes a table of them.
"""

from __future__ import annotations

import re

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import (
    ARCHITECTURES,
    Architecture,
    Kernel,
    is_double_arithmetic,
    is_double_conversion,
    is_load,
    is_store,
    is_wide_load,
    is_wide_store,
)

pytestmark = pytest.mark.skipif(
    machine_code.cuda_tool("nvcc") is None,
    reason="nvcc was not found on PATH or under CUDA_HOME: install the CUDA toolkit",
)
needs_nvdisasm = pytest.mark.skipif(
    machine_code.cuda_tool("nvdisasm") is None,
    reason="nvdisasm was not found: pip install nvidia-cuda-nvdisasm",
)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)

# Instructions of a vector in a warp without a positive cell, with a little room: of float32, of
# which a vector holds 4, and of pairs with a half, of which it holds 8.
PLAIN = (310, 460)
INTERLEAVED = (200, 380)
TURING_HALVES = 1.25  # times as many: it has no instruction to round to bfloat16


@pytest.fixture(scope="module", autouse=True)
def compiled() -> set[str]:
    return {each.name for each in machine_code.compile_all()}


@pytest.fixture
def kernels(architecture: Architecture, compiled: set[str]) -> list[Kernel]:
    if architecture.name not in compiled:
        pytest.skip(f"nvcc does not know {architecture.name}")
    return machine_code.kernels(architecture.name)


def vectors(kernels: list[Kernel]) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.kind != "strided"]
    assert len(found) == 30, found  # 5 pairs of dtypes, by 3 kernels, in 2 directions
    return found


@each_architecture
def test_no_spill_and_no_stack_frame(kernels: list[Kernel]) -> None:
    assert {kernel.kind for kernel in kernels} == {"planar", "interleaved", "strided"}
    for kernel in kernels:
        assert not kernel.stack, kernel.title
        assert not kernel.spilled, kernel.title


@each_architecture
def test_enough_warps_to_hide_memory(architecture: Architecture, kernels: list[Kernel]) -> None:
    for kernel in kernels:
        blocks = architecture.resident_blocks(kernel.registers)
        is_mixed = kernel.dtypes is not None and len({*kernel.dtypes}) > 1
        is_new = architecture.name in ("sm_100", "sm_120")
        least = 4
        if kernel.kind == "planar" and kernel.is_general:
            least = 2 if is_mixed or is_new else 3
        elif kernel.kind == "planar" and is_mixed and is_new:
            least = 3
        assert blocks >= least, (kernel.title, kernel.registers)


@needs_nvdisasm
@each_architecture
def test_no_local_memory_and_no_floating_point_atomics(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        opcodes = [each.opcode for each in kernel.code]
        assert len(opcodes) > 100
        assert not [each for each in opcodes if re.match(r"(LDL|STL)\b", each)], kernel.title
        atomics = [each for each in opcodes if re.match(r"(ATOM|RED)G?\b", each)]
        floating = [each for each in atomics if re.search(r"\.F(16|32|64)|\.ADD\.F", each)]
        assert not floating, kernel.title


@needs_nvdisasm
@each_architecture
def test_vectors_are_moved_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in vectors(kernels):
        loop = kernel.flow.main
        assert kernel.flow.count(loop, is_wide_load) >= 2, kernel.title
        stores = kernel.flow.count(loop, is_store)
        assert stores == kernel.flow.count(loop, is_wide_store) > 0, kernel.title
        if kernel.kind == "planar" and not kernel.is_general:
            loads = kernel.flow.count(loop, is_load)
            assert loads == kernel.flow.count(loop, is_wide_load), kernel.title


@needs_nvdisasm
@each_architecture
def test_a_mask_of_a_vector_is_read_in_one_load(kernels: list[Kernel]) -> None:
    for kernel in vectors(kernels):
        if kernel.is_general:  # 4 bytes or 8; what is read element by element is not .CONSTANT
            load = "LDG.E.CONSTANT" if kernel.dtypes == ("float32",) * 2 else "LDG.E.64.CONSTANT"
            assert any(each.opcode.startswith(load) for each in kernel.code), kernel.title


@needs_nvdisasm
@each_architecture
def test_poses_are_asked_for_before_the_first_is_waited_for(kernels: list[Kernel]) -> None:
    """Those of two maps or, of a half type, of whose vectors a lane holds one, of one map."""
    for kernel in vectors(kernels):
        if kernel.kind == "planar":
            least = 4 if kernel.dtypes == ("float32", "float32") else 2
            assert kernel.flow.loads_ahead() >= least, kernel.title


@needs_nvdisasm
@each_architecture
def test_double_arithmetic_is_that_of_the_sums(kernels: list[Kernel]) -> None:
    for kernel in vectors(kernels):
        flow = kernel.flow
        blocks = next(iter(flow.ways().values()))
        most = 0 if not kernel.is_forward else 3 if kernel.kind == "interleaved" else 2
        for which in (is_double_arithmetic, is_double_conversion):
            assert flow.count(blocks, which) <= most * kernel.unrolled, kernel.title


@needs_nvdisasm
@each_architecture
def test_instructions_of_a_vector(architecture: Architecture, kernels: list[Kernel]) -> None:
    for kernel in vectors(kernels):
        if kernel.is_general:  # most of it is for weights of other dtypes and layouts
            continue
        issued = kernel.flow.issued(next(iter(kernel.flow.ways().values()))) / kernel.unrolled
        budget = PLAIN if kernel.kind == "planar" else INTERLEAVED
        has_half = kernel.dtypes != ("float32", "float32")
        most = budget[has_half]
        if has_half and architecture.name == "sm_75":
            most *= TURING_HALVES
        assert 80 < issued <= most, (kernel.title, issued)
