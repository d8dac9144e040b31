"""What nvcc makes of the CUDA kernels, read from their machine code; it needs no GPU.

Writes the counts to benchmarks/results/machine_code.json, of which report.py makes the tables in
docs/performance.md. `tests/test_cuda_compiles.py` holds the same numbers to their budgets.
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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "machine_code"
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
    folders = [Path(home, each) for home in homes if home for each in ("bin", "compute-sanitizer")]
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


Which = Callable[[Instruction], bool]


def matching(pattern: str) -> Which:
    return lambda each: re.match(pattern, each.opcode) is not None


is_load, is_store = matching(r"LDG?\."), matching(r"STG?\.")
is_wide_load, is_wide_store = matching(r"LDG?\..*128"), matching(r"STG?\..*128")
is_double_arithmetic = matching(r"D(ADD|MUL|FMA|SETP|MNMX)\b")
is_double_conversion = matching(r"(F2F|I2F|F2I)\b.*64")


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
        """The blocks for vectors in a warp without a positive cell: no list, no pose in a loop."""
        in_loops = set().union(*self.inner)
        pose = {block for block in in_loops if self.count([block], is_wide_load)}
        pose |= {block for block in self.main if self.count([block], matching(r"STS\b"))}
        return self._around(self.main - pose)

    def with_pose(self) -> set[int]:
        """The blocks for vectors with a positive cell."""
        always = {block for block in self.main if not self._around(self.main - {block})}
        return always | (self.main - self.without_pose())

    def ways(self) -> dict[str, set[int]]:
        """The blocks that a vector goes through, by what it holds."""
        if not self.inner:  # no loop over the maps: channels-last
            return {"any": self.main}
        return {"none positive": self.without_pose(), "all positive": self.with_pose()}

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
        return next(each for each in ("planar", "interleaved", "strided") if each in self.name)

    @property
    def dtypes(self) -> tuple[str, str] | None:
        """Of pred and target; None: any."""
        one = {"f": "float32", "NS_8BFloat16E": "bfloat16", "NS_4HalfE": "float16"}
        found = re.search(r"kernelIf(f|NS_\w+?E)(f|S\d_)Lb", self.name)
        return found and (one[found[1]], one.get(found[2], one[found[1]]))

    @property
    def is_forward(self) -> bool:
        return re.findall("Lb([01])E", self.name)[0] == "1"

    @property
    def is_general(self) -> bool:
        """Of the planar kernels: for what the plain one does not do."""
        return re.findall("Lb([01])E", self.name)[1:] == ["1"]

    @property
    def unrolled(self) -> int:
        """Vectors that a way around the main loop computes."""
        return 4 if self.kind == "interleaved" else 1

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
    labelled = r"^(\.L\w+):(?=\s+(?:\.L\w+:\s+)*/\*([0-9a-f]+)\*/)"
    address_of = dict(re.findall(labelled, text, re.MULTILINE))
    text = re.sub(
        r"`\((\.L\w+)\)|\.L\w+(?!\w*:)", lambda m: f"<{address_of.get(m[1] or m[0])}>", text
    )
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*);"
    return tuple(
        Instruction(predicate, opcode, operands, int(address, 16))
        for address, predicate, opcode, operands in re.findall(line, text, re.MULTILINE)
    )


def compile_all() -> list[Architecture]:
    """Compiles for all architectures that nvcc knows, side by side, and returns them."""
    known = output(cuda_tool("nvcc") or "nvcc", "--list-gpu-code").split()
    architectures = [each for each in ARCHITECTURES if each.name in known]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda each: _compile(each.name), architectures))
    return architectures


# ---- the record ---------------------------------------------------------------------------------


def counts(architecture: Architecture, kernel: Kernel) -> dict[str, Any]:
    """What report.py makes its tables of."""
    flow = kernel.flow
    kinds = {"double_arithmetic": is_double_arithmetic, "double_conversions": is_double_conversion}
    return {
        "architecture": architecture.name,
        "kernel": kernel.title,
        "registers": kernel.registers,
        "blocks": architecture.resident_blocks(kernel.registers),
        "ways": {
            way: {"instructions": flow.issued(blocks) // kernel.unrolled}
            | {name: flow.issued(blocks, which) // kernel.unrolled for name, which in kinds.items()}
            for way, blocks in flow.ways().items()
        },
    }


def main() -> None:
    import measure  # by bare name, as the benchmarks import each other when they are run

    parser = argparse.ArgumentParser(prog="machine_code.py", description=__doc__)
    path = measure.RESULTS / "machine_code.json"
    parser.add_argument("--output", type=Path, default=path, help="default: in benchmarks/results/")
    path = parser.parse_args().output
    rows = [
        counts(architecture, kernel)
        for architecture in compile_all()
        for kernel in sorted(kernels(architecture.name), key=lambda kernel: kernel.title)
        if kernel.kind != "strided" and not kernel.is_general  # has code for weights of any dtype
    ]
    release = re.search(r"release ([\d.]+)", output(cuda_tool("nvcc") or "nvcc", "--version"))
    record = {"benchmark": "machine_code", "nvcc": release and release[1]}
    record |= {"git_commit": measure.git_commit(), "rows": rows}
    measure.write_json(record, path)
    print(f"written: {path.name}; `python benchmarks/report.py` makes the tables of it")


if __name__ == "__main__":
    main()
