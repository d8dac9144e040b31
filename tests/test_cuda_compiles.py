"""What nvcc makes of the CUDA kernels: no spill, no stack, 16-byte moves. It needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# All kernels, launched as csrc/cuda/fcrn_loss_cuda.cu does it, but without PyTorch.
SOURCE = """
#include "cuda/fcrn_loss_kernels.cuh"
void launch(const fcrn::LossPass& pass) {
  fcrn::cuda::run_pass(pass, 1, [&](auto kernel, unsigned blocks) {
    kernel<<<blocks, fcrn::cuda::kThreads>>>(pass, fcrn::cuda::Workspace{});
  });
}
"""
CACHE = ROOT / "build" / "cuda_compiles"
FLAGS = ("-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v")  # as setup.py has them
KERNELS = ("planar_kernel", "interleaved_kernel", "strided_kernel")
THREADS = 256  # kThreads of the kernels


class Architecture(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications")."""

    name: str
    warps: int
    blocks: int


ARCHITECTURES = (
    Architecture("sm_75", 32, 16),
    Architecture("sm_80", 64, 32),
    Architecture("sm_90", 64, 32),
    Architecture("sm_100", 64, 32),
    Architecture("sm_120", 48, 24),
)
_REGISTERS_OF_PARTITION = 16384  # a multiprocessor has four partitions, each with its own registers
_REGISTERS_AT_ONCE = 256  # a warp is given registers in multiples of this


class Kernel(NamedTuple):
    name: str  # mangled
    registers: int
    stack: int  # bytes
    spilled: int  # bytes, stores and loads

    def occupancy(self, architecture: Architecture) -> float:
        """The share of a multiprocessor's warps that can be resident at once."""
        of_warp = -(-self.registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
        warps = min(4 * (_REGISTERS_OF_PARTITION // of_warp), architecture.warps)
        of_block = THREADS // 32
        return min(warps // of_block, architecture.blocks) * of_block / architecture.warps


class Compiled(NamedTuple):
    cubin: Path
    kernels: list[Kernel]


def _cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in a toolkit, or from its package on PyPI."""
    found = shutil.which(name)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        folders += Path(location).glob("*/bin")
    return found or next((str(f / name) for f in folders if (f / name).exists()), None)


NVCC = _cuda_tool("nvcc")
CUOBJDUMP = _cuda_tool("cuobjdump")
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc was not found on PATH or under CUDA_HOME: install the CUDA toolkit"
)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(architecture: str) -> Compiled:
    assert NVCC is not None
    version = _output(NVCC, "--version")
    digest = hashlib.sha256(" ".join([version, *FLAGS, architecture, SOURCE]).encode())
    for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]):
        digest.update(path.name.encode() + path.read_bytes())
    cubin = CACHE / f"{architecture}-{digest.hexdigest()[:20]}.cubin"
    source, log = cubin.with_suffix(".cu"), cubin.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source.write_text(SOURCE)
        command = [NVCC, *FLAGS, f"-I{CSRC}", f"-arch={architecture}", "-cubin"]
        command += [str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        log.write_text(result.stdout + result.stderr)
    return Compiled(cubin, _kernels(log.read_text()))


def _kernels(log: str) -> list[Kernel]:
    """The kernels in what ptxas -v says."""
    found = re.finditer(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        log,
        re.DOTALL,
    )
    return [
        Kernel(m["name"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in found
    ]


@pytest.fixture(scope="module")
def compiled() -> Callable[[str], Compiled]:
    """The kernels for an architecture; all are compiled at once, side by side."""
    assert NVCC is not None
    known = _output(NVCC, "--list-gpu-code").split()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        all_compiled: dict[str, Future[Compiled]] = {
            name: pool.submit(_compile, name) for name, *_ in ARCHITECTURES if name in known
        }

    def of(name: str) -> Compiled:
        if name not in all_compiled:
            pytest.skip(f"{NVCC} does not know {name}")
        return all_compiled[name].result()

    return of


@functools.cache
def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    return _output(tool, name).strip().replace("(anonymous namespace)::", "").partition("(")[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_no_spill_and_no_stack_frame(
    architecture: Architecture, compiled: Callable[[str], Compiled]
) -> None:
    kernels = compiled(architecture.name).kernels
    for kind in KERNELS:
        assert any(kind in kernel.name for kernel in kernels), f"ptxas does not speak of {kind}"
    for kernel in kernels:  # shown by pytest -rP
        share = kernel.occupancy(architecture)
        print(
            f"{architecture.name}: {kernel.registers:3d} registers, occupancy {share:4.0%}, ",
            end="",
        )
        print(_demangled(kernel.name))
    spilled = [_demangled(kernel.name) for kernel in kernels if kernel.stack or kernel.spilled]
    assert not spilled, "\n".join(
        ["these kernels spill registers or have a stack frame:", *spilled]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_enough_warps_to_hide_memory(
    architecture: Architecture, compiled: Callable[[str], Compiled]
) -> None:
    for kernel in compiled(architecture.name).kernels:
        share = kernel.occupancy(architecture)
        assert share >= 0.25, (
            f"{_demangled(kernel.name)}: {kernel.registers} registers, {share:.0%}"
        )


# ---- machine code --------------------------------------------------------------------------------

needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None,
    reason="cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)


@pytest.fixture(scope="module")
def machine_code(compiled: Callable[[str], Compiled]) -> Callable[[str], dict[str, list[str]]]:
    """For an architecture, the instructions of each kernel, by its mangled name."""

    @functools.cache
    def of(architecture: str) -> dict[str, list[str]]:
        assert CUOBJDUMP is not None
        text = _output(CUOBJDUMP, "-sass", str(compiled(architecture).cubin))
        instruction = re.compile(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
        )
        return {
            function.split(None, 1)[0]: instruction.findall(function)
            for function in text.split("Function : ")[1:]
        }

    return of


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_vector_kernels_move_16_bytes_at_a_time(
    architecture: Architecture, machine_code: Callable[[str], dict[str, list[str]]]
) -> None:
    seen = set()
    for name, instructions in machine_code(architecture.name).items():
        kind = next((each for each in KERNELS[:2] if each in name), None)
        if kind is None:
            continue
        flags = re.findall("Lb([01])E", name)  # template arguments: kForward, and planar's kGiven
        is_forward = flags[0] == "1"
        seen.add((kind, *flags))
        loads = [each for each in instructions if re.match(r"LDG?\.", each)]
        stores = [each for each in instructions if re.match(r"STG?\.", each)]
        wide_loads = [each for each in loads if ".128" in each]
        wide_stores = [each for each in stores if ".128" in each]
        assert len(wide_loads) >= 2, (
            f"{_demangled(name)}: pred and target are not read by 16 bytes: {loads}"
        )
        assert wide_stores, f"{_demangled(name)}: the gradient is not written by 16 bytes: {stores}"
        if not is_forward:  # a backward pass writes nothing but the gradient
            assert stores == wide_stores, f"{_demangled(name)}: narrow stores: {stores}"
    assert len(seen) == 6, seen


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_no_local_memory_and_no_floating_point_atomics(
    architecture: Architecture, machine_code: Callable[[str], dict[str, list[str]]]
) -> None:
    for name, instructions in machine_code(architecture.name).items():
        local = [each for each in instructions if re.match(r"(LDL|STL)\b", each)]
        assert not local, f"{_demangled(name)}: {local}"
        atomics = [each for each in instructions if re.match(r"(ATOM|RED)G?\b", each)]
        floating = [each for each in atomics if re.search(r"\.F(16|32|64)|\.ADD\.F", each)]
        assert not floating, f"{_demangled(name)}: {floating}"
