"""Compiles the harness and the kernels for the host, once for each content."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"

_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
# As nvcc, the compiler must let memory be read as another type than it was written as.
# The patterns make a local variable that is read before it is written show in the results.
# Functions of the program lie at fixed addresses (-no-pie): a report can name the source line.
_FLAGS = (
    "-std=c++20",
    "-g1",
    "-fno-pie",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",
    *_WARNINGS,
)


@dataclass(frozen=True)
class Build:
    """One way to compile: flags of all, of the kernels alone, and of the link."""

    name: str
    flags: tuple[str, ...] = ()
    kernel_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, hash=False)


# The checks left out find null pointers, which AddressSanitizer does too, and double its time.
_SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr",
    "-fno-sanitize-recover=all",
)
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=4",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=4",
}
_RACE = ("-DCUDA_ON_HOST_RACE_CHECK",)
BUILDS = {
    build.name: build
    for build in (
        Build("plain", kernel_flags=("-O1",)),
        # The fibers of machines other than x86-64, tested on it.
        Build("ucontext", ("-DCUDA_ON_HOST_UCONTEXT",), ("-O1",)),
        Build(
            "sanitized",
            ("-fno-omit-frame-pointer", *_SANITIZERS),
            ("-Og",),
            _SANITIZERS,
            _SANITIZER_OPTIONS,
        ),
        # The compiler announces loads and stores of the kernels; race_check.cpp stands in for
        # ThreadSanitizer's own library, which is therefore not linked.
        Build("race", _RACE, ("-O1", "-fsanitize=thread")),
        # For one use only: compiled in half the time.
        Build("quick", kernel_flags=("-O0",)),
        Build(
            "sanitized-quick",
            ("-fno-omit-frame-pointer", *_SANITIZERS),
            ("-O0",),
            _SANITIZERS,
            _SANITIZER_OPTIONS,
        ),
        Build("race-quick", _RACE, ("-O0", "-fsanitize=thread")),
    )
}


@functools.cache
def compiler() -> str | None:
    """The host compiler: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    if compiler() is None:
        return "no C++ compiler: install g++ 12 or newer, or set CXX"
    probe = subprocess.run(
        [compiler(), *_FLAGS, "-fsyntax-only", "-x", "c++", "-"],
        input="#include <source_location>\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        return f"{compiler()} does not compile C++20: {probe.stderr.strip()[:300]}"
    return None


class CompileError(Exception):
    """The compiler refused a source; the message is the compiler's."""


@dataclass(frozen=True)
class _Object:
    source: Path
    flags: tuple[str, ...]
    headers: tuple[Path, ...]  # what it is made of, beside its source
    csrc: Path

    prelude: Path | None = None  # a header to compile once, and to include first

    def compiled(self) -> Path:
        # Where csrc is makes no difference, only what is in it.
        key = _digest([_compiler_version(), *_FLAGS, *self.flags], [self.source, *self.headers])
        target = CACHE / "objects" / f"{self.source.stem}-{key}.o"
        include = [f"-I{folder}" for folder in (HERE / "include", HERE, self.csrc)]
        if self.prelude:
            include += ["-include", str(_precompiled(self.prelude, self.flags))]
        command = [compiler(), *_FLAGS, *self.flags, *include, "-c", str(self.source)]
        _make(target, command)
        return target


def _precompiled(header: Path, flags: tuple[str, ...]) -> Path:
    """What to include for a header to be read from its compiled form beside it."""
    key = _digest([_compiler_version(), *_FLAGS, *flags], [header])
    target = CACHE / "objects" / f"{header.stem}-{key}.h.gch"
    _make(target, [compiler(), *_FLAGS, *flags, "-x", "c++-header", str(header)])
    return target.with_suffix("")


def program(name: str, build: str = "plain", *, csrc: Path = CSRC) -> Path:
    """The executable of `name`.cpp in this folder, with the kernels in the folder `csrc`."""
    how = BUILDS[build]
    shim = (*HERE.glob("*.h"), *HERE.glob("include/*"))
    descriptions = (*shim, *csrc.glob("*.h"))
    kernels = (*descriptions, *csrc.glob("cuda/*.cuh"))
    uses_csrc = name == "run_pass"
    main = _Object(
        HERE / f"{name}.cpp",
        (*how.flags, *how.kernel_flags),
        kernels if uses_csrc else shim,
        csrc,
        HERE / "prelude.h" if uses_csrc else None,
    )
    harness = {"fiber": shim, "grid": shim, "race_check": shim}
    if uses_csrc:
        harness["pass_file"] = descriptions
    parts = [
        _Object(HERE / f"{part}.cpp", ("-O1", *how.flags), headers, csrc)
        for part, headers in harness.items()
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(_Object.compiled, [main, *parts]))
    key = _digest([name, *how.link_flags, *(path.name for path in objects)], [])
    executable = CACHE / "programs" / f"{name}-{build}-{key}"
    link = [compiler(), "-no-pie", "-rdynamic", *how.link_flags, *map(str, objects), "-ldl"]
    _make(executable, link)
    return executable


@functools.cache
def compile_snippet(source: str) -> str:
    """What the compiler says of a CUDA source; "" if it takes it."""
    result = subprocess.run(
        [compiler(), *_FLAGS, f"-I{HERE / 'include'}", "-fsyntax-only", "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
    )
    return "" if result.returncode == 0 else result.stderr


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


_locks: dict[Path, threading.Lock] = {}


def _make(target: Path, command: Sequence[str]) -> None:
    with _locks.setdefault(target, threading.Lock()):
        if not target.exists():
            _run_compiler(target, command)


def _run_compiler(target: Path, command: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be at the same file: each writes its own and renames it.
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(result.stderr)
    unfinished.rename(target)
