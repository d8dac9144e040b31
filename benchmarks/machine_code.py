"""What nvcc makes of the CUDA kernels, read from their machine code; it needs no GPU.

    python benchmarks/machine_code.py            # prints the tables
    python benchmarks/machine_code.py --write    # puts them into docs/performance.md

`tests/test_cuda_compiles.py` holds the same numbers to their budgets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "machine_code"
PAGE = ROOT / "docs" / "performance.md"
# All kernels, launched as csrc/cuda/fcrn_loss_cuda.cu does it, but without PyTorch.
SOURCE = """
#include "cuda/fcrn_loss_kernels.cuh"
void launch(const fcrn::LossPass& pass) {
  fcrn::cuda::run_pass(pass, [&](auto kernel, int64_t) {
    kernel<<<1, fcrn::cuda::kThreads>>>(pass, fcrn::cuda::Workspace{});
  });
}
"""
FLAGS = ("-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v")  # as setup.py has them
THREADS = 256  # kThreads of the kernels
POSE_MAPS = 6  # FCRN's


class Architecture(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications")."""

    name: str
    warps: int
    blocks: int

    def resident_blocks(self, registers: int) -> int:
        """So many blocks of a kernel run at once."""
        of_warp = -(-registers * 32 // 256) * 256  # a warp is given multiples of 256 registers
        warps = 4 * (16384 // of_warp)  # four partitions, each with registers of its own
        return min(warps // (THREADS // 32), self.warps // (THREADS // 32), self.blocks)


ARCHITECTURES = (
    Architecture("sm_75", 32, 16),
    Architecture("sm_80", 64, 32),
    Architecture("sm_86", 48, 16),
    Architecture("sm_90", 64, 32),
    Architecture("sm_100", 64, 32),
    Architecture("sm_120", 48, 24),
)


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in a toolkit, or from its package on PyPI."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        folders += Path(location).glob("*/bin")
    found = (str(folder / name) for folder in folders if (folder / name).exists())
    return shutil.which(name) or next(found, None)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- machine code -------------------------------------------------------------------------------


class Instruction(NamedTuple):
    predicate: str  # "" or such as "@!P0"
    opcode: str  # such as "LDG.E.128.CONSTANT"
    operands: str
    address: int

    @property
    def targets(self) -> list[int]:
        """Where a branch may lead, but to the next instruction; some leave a loop by a CALL."""
        is_branch = self.opcode.startswith(("BRA", "BRX", "CALL.REL"))
        return [int(each, 16) for each in re.findall("<(.*?)>", self.operands) if is_branch]

    @property
    def falls_through(self) -> bool:
        if not re.match(r"(BRA|BRX|EXIT|RET|JMP|BREAK)\b", self.opcode):
            return True
        # Beside the predicate before it, a branch may depend on its first operand ("BRA P1, ...",
        # "BRA.U UP0, ...") or on the warp ("BRA.DIV").
        depends = re.match(r"!?U?P\d,", self.operands) or ".DIV" in self.opcode
        return bool(self.predicate or depends)


def is_load(each: Instruction) -> bool:
    return re.match(r"LDG?\.", each.opcode) is not None


def is_store(each: Instruction) -> bool:
    return re.match(r"STG?\.", each.opcode) is not None


def is_wide_load(each: Instruction) -> bool:
    return is_load(each) and ".128" in each.opcode


def is_wide_store(each: Instruction) -> bool:
    return is_store(each) and ".128" in each.opcode


def is_double_arithmetic(each: Instruction) -> bool:
    return re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", each.opcode) is not None


def is_double_conversion(each: Instruction) -> bool:
    return re.match(r"(F2F|I2F|F2I)\b.*64", each.opcode) is not None


Which = Callable[[Instruction], bool]


class Flow:
    """The basic blocks of a kernel, by address, and the loop that walks over the tensors."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        starts = {code[0].address, *(target for each in code for target in each.targets)}
        starts |= {
            after.address
            for each, after in pairwise(code)
            if each.targets or not each.falls_through
        }
        self.blocks: dict[int, list[Instruction]] = {}
        for each in code:
            if each.address in starts:
                block = self.blocks[each.address] = []
            block.append(each)
        self.successors = {
            address: {*block[-1].targets} | ({after} if block[-1].falls_through else set())
            for (address, block), after in zip(
                self.blocks.items(), [*[*self.blocks][1:], -1], strict=True
            )
        }
        self.predecessors: dict[int, set[int]] = {address: set() for address in self.blocks}
        for address, following in self.successors.items():
            for each_start in following & self.blocks.keys():
                self.predecessors[each_start].add(address)
        loops = self._loops()
        moving = (
            loop for loop in loops if self.count(loop, is_load) and self.count(loop, is_store)
        )
        self.main = max(moving, key=self.count)
        self.header = min(self.main)
        self.inner = [loop for loop in loops if loop < self.main]

    def _reach(self, start: int, step: dict[int, set[int]], within: set[int]) -> set[int]:
        seen: set[int] = set()
        todo = [start]
        while todo:
            block = todo.pop()
            if block in within and block not in seen:
                seen.add(block)
                todo += step[block]
        return seen

    def _loops(self) -> list[set[int]]:
        """The natural loops: what lies between a branch to a block that dominates it, and that."""
        found: dict[int, set[int]] = {}
        start = min(self.blocks)
        reached = self._reach(start, self.successors, {*self.blocks})
        for header in reached:
            around = self._reach(start, self.successors, reached - {header})
            ends = self.predecessors[header] & reached - around
            for end in ends:  # reached by way of the header alone
                body = self._reach(end, self.predecessors, reached - {header})
                found.setdefault(header, {header}).update(body)
        return list(found.values())

    def count(self, blocks: Iterable[int], which: Which = lambda _: True) -> int:
        return sum(which(each) for block in blocks for each in self.blocks[block])

    def _around(self, within: set[int]) -> set[int]:
        """The blocks on a way once around the main loop that stays in `within`."""
        ends = [block for block in within if self.header in self.successors[block]]
        ahead = self._reach(self.header, self.successors, within)
        return set().union(
            *(ahead & self._reach(end, self.predecessors, within) for end in ends if end in ahead)
        )

    def without_pose(self) -> set[int]:
        """The blocks for vectors without a positive cell: those that read no pose in a loop."""
        in_loops = set().union(*self.inner)
        pose = {block for block in in_loops if self.count([block], is_wide_load)}
        return self._around(self.main - pose)

    def with_pose(self) -> set[int]:
        """The blocks for vectors with a positive cell."""
        always = {block for block in self.main if not self._around(self.main - {block})}
        return always | (self.main - self.without_pose())

    def issued(self, blocks: set[int], which: Which = lambda _: True) -> int:
        """Instructions along blocks; those of a loop over the pose maps once for each of FCRN's."""
        total = 0
        for block in blocks:
            inside = [loop for loop in self.inner if block in loop]
            maps = self.count(inside[0], is_wide_store) if inside else 0
            total += self.count([block], which) * (POSE_MAPS // maps if maps else 1)
        return total

    def loads_ahead(self) -> int:
        """Loads of 16 bytes where a cell is positive, before the first store of as many there."""
        loads = 0
        for block in sorted(self.main - self.without_pose()):
            for each in self.blocks[block]:
                if is_wide_store(each):
                    return loads
                loads += is_wide_load(each)
        return loads


# ---- kernels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    registers: int
    stack: int  # bytes
    spilled: int  # bytes, stores and loads
    code: tuple[Instruction, ...]

    @property
    def kind(self) -> str:
        return (
            "planar"
            if "planar" in self.name
            else "interleaved"
            if "inter" in self.name
            else "strided"
        )

    @property
    def dtypes(self) -> tuple[str, str] | None:
        """Of pred and target; None: any."""
        one = {"f": "float32", "NS_8BFloat16E": "bfloat16", "NS_4HalfE": "float16"}
        found = re.search(r"kernelIf(f|NS_\w+?E)(f|S\d_)Lb", self.name)
        return found and (one[found[1]], one.get(found[2], one[found[1]]))

    @property
    def is_forward(self) -> bool:
        return "Lb1E" in self.name[: self.name.index("E", self.name.index("Lb")) + 1]

    @property
    def is_general(self) -> bool:
        """Of the planar kernels: for what the plain one does not do."""
        return "ELb1EEE" in self.name

    @property
    def title(self) -> str:
        words = [
            self.kind,
            "general" * self.is_general,
            "forward" if self.is_forward else "backward",
        ]
        return ", ".join(filter(None, [*words, *dict.fromkeys(self.dtypes or ["any dtypes"])]))

    @functools.cached_property
    def flow(self) -> Flow:
        return Flow(self.code)


def _compile(architecture: str) -> tuple[Path, str]:
    """The cubin, and what ptxas -v says; both are kept for the same sources and nvcc."""
    nvcc = cuda_tool("nvcc")
    assert nvcc is not None
    version = output(nvcc, "--version")
    digest = hashlib.sha256(" ".join([version, *FLAGS, architecture, SOURCE]).encode())
    for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]):
        digest.update(path.name.encode() + path.read_bytes())
    cubin = CACHE / f"{architecture}-{digest.hexdigest()[:20]}.cubin"
    source, log = cubin.with_suffix(".cu"), cubin.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source.write_text(SOURCE)
        command = [nvcc, *FLAGS, f"-I{CSRC}", f"-arch={architecture}", "-cubin"]
        command += [str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        log.write_text(result.stdout + result.stderr)
    return cubin, log.read_text()


@functools.cache
def kernels(architecture: str) -> list[Kernel]:
    """The kernels for an architecture; without nvdisasm they have no code."""
    cubin, log = _compile(architecture)
    found = re.finditer(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        log,
        re.DOTALL,
    )
    code = _code(cubin)
    return [
        Kernel(
            m["name"],
            int(m["registers"]),
            int(m["stack"]),
            int(m["stores"]) + int(m["loads"]),
            code.get(m["name"], ()),
        )
        for m in found
    ]


def _code(cubin: Path) -> dict[str, tuple[Instruction, ...]]:
    """The machine code of each kernel, by its mangled name."""
    nvdisasm = cuda_tool("nvdisasm")
    sections = output(nvdisasm, "-c", str(cubin)).split("\n.text.")[1:] if nvdisasm else []
    return {name: _instructions(text) for name, _, text in (s.partition(":\n") for s in sections)}


def _instructions(text: str) -> tuple[Instruction, ...]:
    """A label in an operand becomes the address, in <>."""
    labelled = re.compile(r"^(\.L\w+):(?=\s+(?:\.L\w+:\s+)*/\*([0-9a-f]+)\*/)", re.MULTILINE)
    address_of = dict(labelled.findall(text))
    text = re.sub(
        r"`\((\.L\w+)\)|\.L\w+(?!\w*:)", lambda m: f"<{address_of.get(m[1] or m[0])}>", text
    )
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*);", re.MULTILINE)
    return tuple(
        Instruction(predicate, opcode, operands, int(address, 16))
        for address, predicate, opcode, operands in line.findall(text)
    )


def compile_all() -> list[Architecture]:
    """Compiles for all architectures that nvcc knows, side by side, and returns them."""
    known = output(cuda_tool("nvcc") or "nvcc", "--list-gpu-code").split()
    architectures = [each for each in ARCHITECTURES if each.name in known]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda each: _compile(each.name), architectures))
    return architectures


# ---- tables -------------------------------------------------------------------------------------


class GPU(NamedTuple):
    """By the data sheets. A clock, a multiprocessor issues 4 instructions of a warp."""

    name: str
    architecture: str  # whose code it runs, or one like it
    bandwidth: float  # GB/s
    multiprocessors: int
    clock: float  # GHz, boost
    doubles: int  # additions of doubles a clock, of a multiprocessor
    conversions: int  # to and from doubles


GPUS = (
    GPU("T4", "sm_75", 320, 40, 1.59, 2, 2),
    GPU("RTX 3060", "sm_86", 360, 28, 1.78, 2, 2),
    GPU("L4", "sm_86", 300, 58, 2.04, 2, 2),
    GPU("RTX 4090", "sm_86", 1008, 128, 2.52, 2, 2),
    GPU("A100 80 GB", "sm_80", 2039, 108, 1.41, 32, 16),
    GPU("H100 SXM", "sm_90", 3350, 132, 1.98, 64, 16),
    GPU("H200", "sm_90", 4800, 132, 1.98, 64, 16),
    GPU("B200", "sm_100", 8000, 148, 1.97, 64, 16),
)


def shown(architecture: str) -> list[Kernel]:
    """The kernels of the tables: forward, float32 and one of the halves."""
    return sorted(
        (
            kernel
            for kernel in kernels(architecture)
            if kernel.is_forward and kernel.dtypes in (("float32",) * 2, ("bfloat16",) * 2)
        ),
        key=lambda kernel: (kernel.is_general, kernel.title),
    )


def bytes_of(kernel: Kernel, *, positive: bool) -> int:
    """What a vector of FCRN's seven maps moves."""
    element = 4 if kernel.dtypes == ("float32", "float32") else 2
    if kernel.kind == "interleaved":
        return 3 * 16
    return 16 // element * element * (21 if positive else 9)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table_of_code() -> str:
    architectures = compile_all()
    names = [each.name for each in architectures]
    rows = [_row("kernel", *names), _row("---", *["---"] * len(names))]
    for title in [kernel.title for kernel in shown(names[0])]:
        cells = []
        for architecture in architectures:
            kernel = next(k for k in shown(architecture.name) if k.title == title)
            code = kernel.flow
            ways = [code.without_pose(), code.with_pose()] if code.inner else [code.main]
            issued = ", ".join(str(code.issued(way)) for way in ways)
            blocks = architecture.resident_blocks(kernel.registers)
            cells.append(f"{issued}; {kernel.registers}, {blocks}")
        rows.append(_row(title.replace(", forward", ""), *cells))
    return "\n".join(rows)


def _share(gpu: GPU, kernel: Kernel, *, positive: bool) -> str:
    """How long the instructions of a vector take, in parts of the time that its bytes take."""
    code = kernel.flow
    blocks = code.with_pose() if positive else code.without_pose()
    memory = bytes_of(kernel, positive=positive) / gpu.bandwidth
    clocks = gpu.multiprocessors * gpu.clock
    issue = code.issued(blocks) / (4 * 32) / clocks
    doubles = code.issued(blocks, is_double_arithmetic) / gpu.doubles / clocks
    doubles += code.issued(blocks, is_double_conversion) / gpu.conversions / clocks
    return f"{issue / memory:.0%}, {doubles / memory:.0%}"


def table_of_gpus() -> str:
    first = [kernel for kernel in shown(GPUS[0].architecture) if not kernel.is_general]
    columns = [
        (kernel.title, positive)
        for kernel in first
        for positive in ((False, True) if kernel.kind == "planar" else (True,))
    ]
    titles = [
        title.replace(", forward", "")
        + ("" if "inter" in title else ", all positive" if positive else ", none positive")
        for title, positive in columns
    ]
    rows = [_row("GPU", *titles), _row("---", *["---"] * len(titles))]
    for gpu in GPUS:
        by_title = {kernel.title: kernel for kernel in shown(gpu.architecture)}
        rows.append(_row(gpu.name, *[_share(gpu, by_title[t], positive=p) for t, p in columns]))
    return "\n".join(rows)


TABLES = {"machine code": table_of_code, "limits on paper": table_of_gpus}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    write = parser.parse_args().write
    for name, table in TABLES.items():
        text = table()
        print(f"{name}:\n\n{text}\n")
        if write:
            block = re.compile(f"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
            page, found = block.subn(rf"\g<1>{text}\n\g<2>", PAGE.read_text())
            assert found == 1, f"{PAGE} has {found} places for the table {name!r}"
            PAGE.write_text(page)


if __name__ == "__main__":
    main()
