"""Builds the compiled kernels of fcrn_fused; the rest of the build is in pyproject.toml.

FCRN_FUSED_BUILD chooses what is compiled:
  auto  (default) the CPU kernels if there is a C++20 compiler; the CUDA kernels if PyTorch is a
        CUDA build and there is an nvcc of the same major version
  cpu   the CPU kernels, or an error
  cuda  both, or an error
  none  nothing; the package runs in plain PyTorch
The package records which kernels were not built and why, and reports it at run time.

TORCH_CUDA_ARCH_LIST chooses the GPU architectures ("9.0;12.0+PTX", "Hopper", "native"). The
default is that of the GPUs in this machine or, without a GPU, DEFAULT_ARCHITECTURES.
CXX, CFLAGS, LDFLAGS, CUDA_HOME and MAX_JOBS have their usual meaning for PyTorch extensions.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from pprint import pformat

from setuptools import Distribution, Extension, setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    import_problem = None
except (ImportError, OSError) as error:  # OSError: a library of PyTorch does not load
    from setuptools.command.build_ext import build_ext as BuildExtension

    import_problem = f"{error}"

MODE = os.environ.get("FCRN_FUSED_BUILD", "auto")
# Machine code also runs on later minor versions: 8.0 on 8.6 and 8.9, 12.0 on 12.1.
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX;10.0;12.0+PTX"
# The stable ABI of this version, TORCH_TARGET_VERSION below, is part of all later ones.
OLDEST_TORCH = (2, 11)
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# No debug information, which is ten times the code, unless CFLAGS ask for it; and no path of this
# machine in error messages, so that the same sources give the same bytes anywhere.
os.environ["CFLAGS"] = f"-g0 {os.environ.get('CFLAGS', '')}"
if not import_problem:
    folders = (Path.cwd(), sysconfig.get_paths()["include"], Path(torch.__file__).parents[1])
    FLAGS += [f"-ffile-prefix-map={folder}=." for folder in folders]
# Without contraction, all instruction sets compute the same bits.
CXX_FLAGS = [*FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# The stable ABI does not depend on the compiler, which is probed below.
os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"
# PyTorch 2.13 and nvcc expect CXX to be one word; PyTorch adds ccache itself.
CXX, *more_flags = [
    word for word in shlex.split(os.environ.get("CXX", "")) if word not in ("ccache", "sccache")
] or ["c++"]
os.environ["CXX"] = CXX
if more_flags:
    os.environ["CFLAGS"] = " ".join([os.environ.get("CFLAGS", ""), shlex.join(more_flags)])

# Becomes fcrn_fused._build_info.INFO: versions, and why the kernels of a device were not built.
info: dict[str, str | None] = dict.fromkeys(
    ("version", "pytorch", "cuda", "architectures", "cpu_problem", "cuda_problem")
)


class BuildError(Exception):
    """Why kernels cannot be built."""


def extensions() -> list[Extension]:
    """`_C`, the operators and their CPU kernels, and `_cuda`, their CUDA kernels."""
    found: list[Extension] = []
    try:
        found.append(cpu_extension())
        found.append(cuda_extension())
    except BuildError as problem:
        info["cuda_problem"] = str(problem)
        info["cpu_problem"] = None if found else str(problem)
    return found


def cpu_extension() -> Extension:
    if MODE == "none":
        raise BuildError("FCRN_FUSED_BUILD was none")
    if import_problem:
        raise BuildError(import_problem)
    info["pytorch"] = str(torch.__version__)
    if tuple(int(part) for part in info["pytorch"].split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"the kernels need PyTorch {oldest} or newer, this is {info['pytorch']}")
    if sys.platform != "linux":
        raise BuildError(f"the kernels are built on Linux only, this is {sys.platform}")
    python = f"-I{sysconfig.get_paths()['include']}"
    flags = [*shlex.split(os.environ.get("CFLAGS", "")), *CXX_FLAGS]
    probe([CXX, *flags, python], "probe.cpp", "#include <Python.h>\n#include <bit>\n")
    return CppExtension(
        "fcrn_fused._C",
        ["csrc/ops.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
        include_dirs=[pybind11.get_include()],  # ahead of PyTorch's own copy
        extra_compile_args=CXX_FLAGS,
    )


def cuda_extension() -> Extension:
    if MODE == "cpu":
        raise BuildError("FCRN_FUSED_BUILD was cpu")
    wanted = torch.version.cuda
    if not wanted:
        raise BuildError(f"PyTorch {info['pytorch']}, with which it was built, is not a CUDA build")
    remedy = f"install the CUDA toolkit {wanted}, or set CUDA_HOME to where it is"
    nvcc = Path(cpp_extension.CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
    if not nvcc.is_file():
        raise BuildError(f"nvcc was not found ({nvcc} does not exist); {remedy}")
    version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1]
    if version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(f"nvcc is of CUDA {version}, PyTorch of CUDA {wanted}; {remedy}")
    # nvcc may be a link or a script; ask it where its toolkit is.
    top = re.search(r"TOP=(.*)", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull))
    cpp_extension.CUDA_HOME = os.path.normpath(top[1])
    flags = [flag if flag[1] != "f" else f'-Xcompiler="{flag}"' for flag in FLAGS]
    flags += [f"-ccbin={CXX}", "--threads=4"]
    probe([str(nvcc), *flags], "probe.cu", "#include <cuda_runtime.h>\n#include <vector>\n")
    architectures = gencode_flags(nvcc, version)
    info["cuda"], info["architectures"] = version, codes(architectures)
    return CUDAExtension(
        "fcrn_fused._cuda",
        ["csrc/cuda/fcrn_loss_cuda.cu"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": [], "nvcc": [*flags, *architectures, "-DUSE_CUDA"]},
        optional=MODE == "auto",
    )


def gencode_flags(nvcc: Path, version: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST or its default as flags, without those that nvcc does not support."""
    wanted = ";".join(re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")))
    is_default = wanted in ("", "native") and not torch.cuda.is_available()
    os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES if is_default else wanted
    try:  # private, but it knows all names that PyTorch accepts
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST is {wanted!r}: {error}") from None
    flags.sort(key=lambda flag: int(re.search(r"\d+", flag)[0]))
    known = output_of(nvcc, "--list-gpu-code").split() + output_of(nvcc, "--list-gpu-arch").split()
    unknown = [flag for flag in flags if codes([flag]) not in known]
    problem = f"nvcc {version} cannot compile for {codes(unknown)}"
    if len(unknown) == len(flags) or (unknown and MODE == "cuda" and not is_default):
        raise BuildError(f"{problem}; install another CUDA toolkit, or set TORCH_CUDA_ARCH_LIST")
    if unknown and not is_default:
        print(f"fcrn_fused: {problem}, which is left out", file=sys.stderr)
    return [flag for flag in flags if flag not in unknown]


def codes(flags: list[str]) -> str:
    return " ".join(flag.rpartition("=")[2] for flag in flags)


def output_of(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def probe(compiler: list[str], name: str, source: str) -> None:
    """Compile `source`, or raise BuildError with the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(source)
        command = [*compiler, "-c", str(path), "-o", f"{path}.o"]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            raise BuildError(
                f"there is no compiler {compiler[0]!r}; install g++ 11 or newer, or set CXX"
            ) from None
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).strip().splitlines()
        error = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise BuildError(
            f"{compiler[0]} does not compile a C++20 file ({error.replace(str(path), name)})"
        )


class BuildKernels(BuildExtension):
    """Compiles the extensions and writes `_build_info.py`."""

    def run(self) -> None:
        if import_problem and MODE != "none":
            sys.exit(
                f"fcrn_fused cannot be built: {import_problem}. Run `pip install torch ninja "
                "pybind11 'setuptools>=77'`, then repeat this command with --no-build-isolation "
                "to build against the installed PyTorch."
            )
        problem = info["cuda_problem"] if MODE == "cuda" else info["cpu_problem"]
        if problem and MODE in ("cpu", "cuda"):
            sys.exit(f"FCRN_FUSED_BUILD={MODE}, but {problem}")
        super().run()
        package = Path(self.get_ext_fullpath("fcrn_fused._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        built = {Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions}
        for left_over in {*package.glob("_C.*"), *package.glob("_cuda.*")} - built:
            left_over.unlink()
        # without the local part that a wheel's version may have
        info["version"] = self.distribution.get_version().partition("+")[0]
        (package / "_build_info.py").write_text(f"# By setup.py.\nINFO = {pformat(info)}\n")
        for device in ("cpu", "cuda"):
            if problem := info[f"{device}_problem"]:
                print(f"fcrn_fused: no {device} kernels: {problem}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        print(f"fcrn_fused: compiling {ext.name}, a minute or two", flush=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                sys.exit(f"{ext.name} did not compile ({error}); FCRN_FUSED_BUILD=none omits it")
            info["cuda"] = info["architectures"] = None
            info["cuda_problem"] = "they did not compile; install with `pip install -v` to see why"


class BinaryDistribution(Distribution):
    """Runs build_ext even if nothing is compiled, to write `_build_info.py`."""

    def has_ext_modules(self) -> bool:
        return True


if MODE not in (modes := ("auto", "cpu", "cuda", "none")):
    sys.exit(f"FCRN_FUSED_BUILD must be one of {', '.join(modes)}, got {MODE!r}")
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    distclass=BinaryDistribution,
)
