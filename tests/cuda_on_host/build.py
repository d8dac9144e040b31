"""Compiles the harness and the kernels for the host, once for each content."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"

_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
# The patterns make a local variable that is read before it is written show in the results.
# Functions of the program lie at fixed addresses (-no-pie): a report can name the source line.
_FLAGS = ("-std=c++20", "-g1", "-fno-pie", "-ftrivial-auto-var-init=pattern", *_WARNINGS)


@dataclass(frozen=True)
class Build:
    """One way to compile: flags of all, of the kernels alone, and of the link."""

    name: str
    flags: tuple[str, ...]
    kernel_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, hash=False)


_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = {
    build.name: build
    for build in (
        Build("plain", ("-O1",)),
        # The fibers of machines other than x86-64, tested on it.
        Build("ucontext", ("-O1", "-DCUDA_ON_HOST_UCONTEXT")),
        Build(
            "sanitized",
            ("-O1", "-fno-omit-frame-pointer", *_SANITIZERS),
            link_flags=_SANITIZERS,
            environment={
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=4",
                "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=4",
            },
        ),
        # The compiler announces loads and stores of the kernels; race_check.cpp stands in for
        # ThreadSanitizer's own library, which is therefore not linked.
        Build("race", ("-O1", "-DCUDA_ON_HOST_RACE_CHECK"), kernel_flags=("-fsanitize=thread",)),
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
    read: tuple[Path, ...]  # what it is made of, beside its source

    def compiled(self) -> Path:
        command = [*_FLAGS, *self.flags]
        key = _digest([_compiler_version(), *command], [self.source, *self.read])
        target = CACHE / "objects" / f"{self.source.stem}-{key}.o"
        _make(target, [compiler(), *command, "-c", str(self.source)])
        return target


def program(
    name: str, build: str = "plain", *, csrc: Path = CSRC, defines: Sequence[str] = ()
) -> Path:
    """The executable of `name`.cpp in this folder, with the kernels in the folder `csrc`."""
    how = BUILDS[build]
    headers = tuple(sorted([*HERE.glob("*.h"), *HERE.glob("include/*")]))
    kernels = tuple(sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.cuh")]))
    include = (f"-I{HERE / 'include'}", f"-I{HERE}")
    harness = [
        _Object(HERE / f"{part}.cpp", (*how.flags, *include), headers)
        for part in ("fiber", "grid", "race_check")
    ]
    of_kernels = (*how.flags, *how.kernel_flags, *include, f"-I{csrc}")
    of_kernels += tuple(f"-D{define}" for define in defines)
    main = _Object(HERE / f"{name}.cpp", of_kernels, (*headers, *kernels))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(_Object.compiled, [main, *harness]))
    key = _digest([name, *how.link_flags, *(path.name for path in objects)], [])
    executable = CACHE / "programs" / f"{name}-{build}-{key}"
    _make(executable, [compiler(), "-no-pie", *how.link_flags, *map(str, objects)])
    return executable


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
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _make(target: Path, command: Sequence[str]) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be at the same file: each writes its own and renames it.
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(result.stderr)
    unfinished.rename(target)
