"""Builds the compiled kernels of fcrn_fused with ninja; pyproject.toml holds everything else.

FCRN_FUSED_BUILD chooses what is compiled:
  auto  (default) the CPU kernels where a C++20 compiler works, the CUDA kernels where nvcc does too
  cpu   the CPU kernels; an error where they cannot be built
  cuda  both; an error where they cannot be built
  none  nothing: the package runs in plain PyTorch
TORCH_CUDA_ARCH_LIST chooses the GPU architectures, as in PyTorch's own extensions ("9.0;12.0+PTX").
Left out, it is the architecture of the GPU at hand or, where there is none, 8.0 to 12.0.
CXX, CUDA_HOME and MAX_JOBS mean what they always do.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "none")
# Machine code runs on every later minor version too: 8.0 serves 8.6 and 8.9, 12.0 serves 12.1.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# Kernels are built for PyTorch's stable ABI as of 2.11: they load under that and all later ones.
TORCH_TARGET_VERSION = "0x020b000000000000"
INSTALL_BUILD_TOOLS = (
    "run `pip install torch ninja pybind11 setuptools` and then "
    "`pip install --no-build-isolation .`"
)

COMMON_FLAGS = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
# Without contraction a result is the same to the bit whichever instruction set computes it.
CXX_FLAGS = [
    *COMMON_FLAGS,
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = [*COMMON_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]


def main() -> None:
    mode = os.environ.get("FCRN_FUSED_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"FCRN_FUSED_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    problem = _compiler_problem() if mode != "none" else "FCRN_FUSED_BUILD is none"
    if problem and mode in ("cpu", "cuda"):
        sys.exit(f"FCRN_FUSED_BUILD={mode}, but {problem}")
    if problem:
        print(f"fcrn_fused is installed without compiled kernels: {problem}", file=sys.stderr)
    setup(
        ext_modules=[] if problem else [Extension("fcrn_fused._C", sources=[])],
        cmdclass={"build_ext": BuildKernels},
    )


class BuildKernels(build_ext):
    """Writes a build.ninja, runs it, and puts the two libraries where setuptools wants them."""

    def build_extensions(self) -> None:
        try:
            import ninja
            import pybind11
            import torch
        except ImportError as error:
            sys.exit(f"the kernels cannot be built without {error.name}: {INSTALL_BUILD_TOOLS}")
        nvcc = _nvcc(os.environ.get("FCRN_FUSED_BUILD", "auto"))
        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        module = Path(self.get_ext_fullpath("fcrn_fused._C")).absolute()
        module.parent.mkdir(parents=True, exist_ok=True)
        architectures = _architectures(nvcc) if nvcc else []
        _write_ninja(
            build / "build.ninja",
            module=module,
            torch_root=Path(torch.__file__).parent,
            torch_version=torch.__version__,
            pybind11_include=pybind11.get_include(),
            nvcc=nvcc,
            architectures=architectures,
        )
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build)]
        jobs = os.environ.get("MAX_JOBS")
        if subprocess.run([*command, *(["-j", jobs] if jobs else [])]).returncode != 0:
            sys.exit(
                "the kernels of fcrn_fused did not compile; FCRN_FUSED_BUILD=none leaves them out"
            )
        with (build / "compile_commands.json").open("w") as database:  # for clangd and clang-tidy
            subprocess.run([*command, "-t", "compdb"], stdout=database, check=True)
        if not nvcc:
            _cuda_library(module).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """What `--inplace` and editable installs do with `_C`, for the CUDA library as well."""
        super().copy_extensions_to_source()
        built = _cuda_library(Path(self.build_lib) / "fcrn_fused" / "_C")
        in_source = ROOT / "fcrn_fused" / built.name
        in_source.unlink(missing_ok=True)
        if built.exists():
            shutil.copy2(built, in_source)


def _cuda_library(module: Path) -> Path:
    return module.parent / "fcrn_fused_cuda.so"


def _write_ninja(
    path: Path,
    *,
    module: Path,
    torch_root: Path,
    torch_version: str,
    pybind11_include: str,
    nvcc: str | None,
    architectures: list[str],
) -> None:
    """Sources to objects to `_C` (CPU kernels, operators) and `fcrn_fused_cuda.so`."""
    from ninja.ninja_syntax import Writer

    csrc = ROOT.absolute() / "csrc"
    includes = [f"-isystem {torch_root / 'include'}"]
    python_includes = [
        f"-isystem {sysconfig.get_paths()['include']}",
        f"-isystem {pybind11_include}",
    ]
    facts = {
        "FCRN_BUILT_TORCH": torch_version,
        "FCRN_BUILT_CUDA": _nvcc_version(nvcc) if nvcc else "none",
        "FCRN_BUILT_ARCHITECTURES": " ".join(architectures) or "none",
    }
    defines = [f"'-D{name}=\"{value}\"'" for name, value in facts.items()]
    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("cxx", _cxx())
        ninja.variable("cxx_flags", " ".join(CXX_FLAGS))
        ninja.rule(
            "cxx",
            "$cxx $cxx_flags $flags -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", "$cxx -shared $in -o $out $libraries")

        def compile_cxx(source: str, flags: list[str]) -> str:
            output = f"{source}.o"
            ninja.build(output, "cxx", str(csrc / source), variables={"flags": " ".join(flags)})
            return output

        objects = [
            compile_cxx("ops.cpp", includes + python_includes + defines),
            compile_cxx("cpu/fcrn_loss_cpu.cpp", includes),
            compile_cxx("cpu/cell_loops_baseline.cpp", []),
        ]
        if platform.machine().lower() in ("x86_64", "amd64"):
            objects.append(compile_cxx("cpu/cell_loops_avx2.cpp", ["-mavx2", "-mf16c"]))
        libraries = f"-L{torch_root / 'lib'} -Wl,--no-as-needed -ltorch_cpu"
        ninja.build(str(module), "link", objects, variables={"libraries": libraries})
        ninja.default(str(module))
        if not nvcc:
            return

        ninja.variable("nvcc", f"{nvcc} -ccbin {_cxx()}")
        ninja.variable("nvcc_flags", " ".join(NVCC_FLAGS + _gencode(architectures)))
        ninja.rule(
            "nvcc", "$nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
        )
        ninja.rule("link_cuda", "$nvcc -shared -cudart=static $in -o $out $libraries")
        # Stands in for PyTorch's CUDA library, which a CPU build of PyTorch does not have: the
        # linker notes its name, and the loader finds the real one in the running process.
        ninja.rule(
            "stand_in", "echo | $cxx -x c++ -shared -fPIC - -Wl,-soname,libtorch_cuda.so -o $out"
        )
        ninja.build("libtorch_cuda.so", "stand_in")
        flags = [*includes, _cuda_include(nvcc), "-DUSE_CUDA"]
        cuda_objects = [compile_cxx("cuda/fcrn_loss_cuda.cpp", flags)]
        for source in sorted((csrc / "cuda").glob("*.cu")):
            ninja.build(f"cuda/{source.name}.o", "nvcc", str(source))
            cuda_objects.append(f"cuda/{source.name}.o")
        libraries = f"-L. -L{torch_root / 'lib'} -Xlinker --no-as-needed -ltorch_cuda -ltorch_cpu"
        library = str(_cuda_library(module))
        ninja.build(
            library,
            "link_cuda",
            cuda_objects,
            implicit="libtorch_cuda.so",
            variables={"libraries": libraries},
        )
        ninja.default(library)


# ---- what the machine has -----------------------------------------------------------------------


def _cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


def _compiler_problem() -> str | None:
    """Why the CPU kernels cannot be compiled here; None if they can."""
    if sys.platform != "linux":
        return f"the kernels are built on Linux only, this is {sys.platform}"
    return _compile_problem([*_cxx().split(), "-std=c++20"], "probe.cpp", "#include <bit>\n")


def _compile_problem(compiler: list[str], name: str, source: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / name
        probe.write_text(source + "int probe() { return 0; }\n")
        try:
            result = subprocess.run(
                [*compiler, "-c", str(probe), "-o", str(probe) + ".o"],
                capture_output=True,
                text=True,
            )
        except OSError:
            return f"there is no compiler {compiler[0]!r} (install g++ 11 or newer, or set CXX)"
    if result.returncode == 0:
        return None
    first_line = (result.stderr or result.stdout).strip().partition("\n")[0]
    return f"{' '.join(compiler)} does not compile a C++20 file ({first_line})"


def _nvcc(mode: str) -> str | None:
    """The nvcc to compile the CUDA kernels with; None: not wanted, or cannot be built."""
    if mode == "cpu":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    for candidate in ("/usr/local/cuda/bin/nvcc",):
        nvcc = nvcc or (candidate if Path(candidate).exists() else None)
    problem = (
        "nvcc was not found on PATH or under CUDA_HOME; install the CUDA toolkit, or choose "
        "FCRN_FUSED_BUILD=cpu"
        if nvcc is None or not Path(nvcc).exists()
        else _compile_problem([nvcc, "-ccbin", _cxx(), "-std=c++20"], "probe.cu", "")
    )
    if problem is None:
        return nvcc
    if mode == "cuda":
        sys.exit(f"FCRN_FUSED_BUILD=cuda, but {problem}")
    print(f"fcrn_fused is built without CUDA kernels: {problem}", file=sys.stderr)
    return None


def _nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def _cuda_include(nvcc: str) -> str:
    """Where cuda_runtime.h lies, as nvcc itself would look for it."""
    text = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    found = re.search(r"INCLUDES=(.*)", text)
    return found[1].strip().replace('"', "").replace("-I", "-isystem ") if found else ""


def _architectures(nvcc: str) -> list[str]:
    """Architectures to compile for, such as ["9.0", "12.0+PTX"]."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        named = re.split(r"[;,\s]+", wanted.strip())
        for name in named:
            if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
                sys.exit(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {name!r}")
        return named
    if present := _present_architectures():
        return present
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [name for name in DEFAULT_ARCHITECTURES if f"sm_{name.replace('.', '')}" in codes]
    return [*known[:-1], known[-1] + "+PTX"]


def _present_architectures() -> list[str]:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = re.findall(r"^\d+\.\d$", result.stdout, re.MULTILINE)
    return sorted(set(names)) if result.returncode == 0 else []


def _gencode(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


main()
