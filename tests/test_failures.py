"""Broken installations: the import works, the next backend computes, one warning says why.

Each case is a copy of the package in which something is broken, imported in a process of its own;
the processes are forked from one that has imported PyTorch, which is what takes the time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import fcrn_fused
from fcrn_fused import ops

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
REMEDY = "pip install"

PROBE = """
import contextlib, io, json, os, runpy, sys, traceback, warnings
import torch

def probe(directory, prepare):
    sys.path = [path for path in sys.path if not os.path.isdir(os.path.join(path, "fcrn_fused"))]
    sys.path.insert(0, directory)
    exec(prepare)
    report = {"error": None}
    try:
        import fcrn_fused
        from fcrn_fused import ops
        assert fcrn_fused.__file__.startswith(directory), fcrn_fused.__file__
        report["dynamo"] = "torch._dynamo" in sys.modules
        pred = torch.full((1, 2, 3), 2.0, requires_grad=True)
        target = torch.ones(1, 2, 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                loss, stats = fcrn_fused.fcrn_loss(pred, target, return_stats=True)
                loss.backward()
                fcrn_fused.FCRNLoss()(pred, target)
        report["loss"] = loss.item()
        report["grad"] = pred.grad.flatten().tolist()
        report["warnings"] = [[w.category.__name__, str(w.message)] for w in caught]
        report["why_not"] = {device: ops.why_not(device) for device in ("cpu", "cuda")}
        try:
            fcrn_fused.fcrn_loss(pred, target, backend="fused")
            report["fused"] = None
        except RuntimeError as error:
            report["fused"] = str(error)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            runpy.run_module("fcrn_fused", run_name="__main__")
        report["config"] = output.getvalue()
    except BaseException:
        report["error"] = traceback.format_exc()
    return report

for name, case in json.load(open(sys.argv[1])).items():
    if os.fork() == 0:
        report = probe(case["directory"], case["prepare"])
        with open(os.path.join(case["directory"], "report.json"), "w") as file:
            json.dump(report, file)
        os._exit(0)
    os.wait()
"""


class Case(NamedTuple):
    damage: Callable[[Path], None]  # what is done to the copy of the package
    prepare: str = ""  # Python to run before the import


def nothing(package: Path) -> None:
    pass


def never_built(package: Path) -> None:
    for path in (*package.glob("*.so"), *package.glob("_build_info.py")):
        path.unlink()


def built_without(device: str, problem: str) -> Callable[[Path], None]:
    """What setup.py leaves behind that built no kernels for the device."""

    def damage(package: Path) -> None:
        for path in package.glob("_C.*" if device == "cpu" else "_cuda.*"):
            path.unlink()
        record(package, **{f"{device}_problem": problem, "cuda": None})

    return damage


def record(package: Path, **changes: str | None) -> None:
    info = {**ops.BUILD_INFO, **changes}
    (package / "_build_info.py").write_text(f"INFO = {info!r}")


def compiled_for_another_python(package: Path) -> None:
    for path in package.glob("*.so"):
        path.unlink()
    record(package, cpu_problem=None)
    (package / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")


def compiled_file_cut_off(package: Path) -> None:
    never_built(package)
    (package / f"_C{SUFFIX}").write_bytes(b"\x7fELF and then the disk was full")


def of_another_version(package: Path) -> None:
    record(package, version="0.0.1")


def cuda_library_that_does_not_load(package: Path) -> None:
    record(package, cuda="13.0", cuda_problem=None)
    (package / f"_cuda{SUFFIX}").write_bytes(b"\x7fELF needs a libtorch_cuda.so")


def torch_version(version: str) -> str:
    return f"import torch; torch.__version__ = torch.torch_version.TorchVersion({version!r})"


CUDA_BUILD = "import torch; torch.backends.cuda.is_built = lambda: True"
CPU_BUILD = "import torch; torch.backends.cuda.is_built = lambda: False"
# The source folder of a clone comes first on the path, what is installed lies elsewhere.
SOURCE_FOLDER = f"sys.path.append({str(Path(fcrn_fused.__file__).parent.parent)!r})"
TOO_OLD = "nvcc is of CUDA 11.8, PyTorch of CUDA 13.0"
CASES = {
    "intact": Case(nothing),
    "source folder": Case(never_built, SOURCE_FOLDER),
    "never built": Case(never_built),
    "no compiler": Case(built_without("cpu", "there is no compiler 'c++'")),
    "another Python": Case(compiled_for_another_python),
    "another version": Case(of_another_version),
    "cut off": Case(compiled_file_cut_off),
    "old PyTorch": Case(nothing, torch_version("2.10.3")),
    "very old PyTorch": Case(nothing, torch_version("1.13.1+cu117")),
    "a newer PyTorch": Case(nothing, torch_version("3.0.0a0+git123")),
    "nvcc too old": Case(built_without("cuda", TOO_OLD), CUDA_BUILD),
    "CUDA library broken": Case(cuda_library_that_does_not_load, CUDA_BUILD),
    "CPU build of PyTorch": Case(cuda_library_that_does_not_load, CPU_BUILD),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    source = Path(fcrn_fused.__file__).parent
    cases = {}
    for name, case in CASES.items():
        directory = tmp_path_factory.mktemp("broken").resolve()
        shutil.copytree(
            source, directory / "fcrn_fused", ignore=shutil.ignore_patterns("__pycache__")
        )
        case.damage(directory / "fcrn_fused")
        cases[name] = {"directory": str(directory), "prepare": case.prepare}
    listing = tmp_path_factory.mktemp("cases") / "cases.json"
    listing.write_text(json.dumps(cases))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(listing)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=listing.parent,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    reports = {}
    for name, case in cases.items():
        report = json.loads((Path(case["directory"]) / "report.json").read_text())
        assert report["error"] is None, f"{name}: {report['error']}"
        reports[name] = report
    return reports


def assert_works(report: dict[str, Any]) -> None:
    assert report["loss"] == 1.0
    assert report["grad"] == [pytest.approx(3 * 2 / 6)] * 6  # three backwards


def assert_falls_back(report: dict[str, Any], *words: str) -> None:
    """The loss works; one RuntimeWarning, "fused" and `python -m fcrn_fused` name the cause."""
    assert_works(report)
    assert len(report["warnings"]) == 1, report["warnings"]
    category, message = report["warnings"][0]
    assert category == "RuntimeWarning"
    for text in (message, report["fused"], report["config"], report["why_not"]["cpu"]):
        for word in (*words, REMEDY):
            assert word in text, f"{word!r} is not in {text!r}"
    assert "cpu: reference" in report["config"]


def test_a_source_folder_that_was_never_built(reports: dict[str, dict[str, Any]]) -> None:
    assert_falls_back(reports["never built"], "was not built")


def test_the_reason_of_the_build_is_the_reason_given(reports: dict[str, dict[str, Any]]) -> None:
    assert_falls_back(reports["no compiler"], "there is no compiler 'c++'")


def test_kernels_of_another_version(reports: dict[str, dict[str, Any]]) -> None:
    assert_falls_back(reports["another version"], "0.0.1", fcrn_fused.__version__)


def test_compiled_for_another_python(reports: dict[str, dict[str, Any]]) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert_falls_back(reports["another Python"], "another Python", version, "cpython-399")


def test_a_compiled_file_that_does_not_load(reports: dict[str, dict[str, Any]]) -> None:
    assert_falls_back(reports["cut off"], "does not load", f"_C{SUFFIX}")


@pytest.mark.parametrize(
    ("name", "version"), [("old PyTorch", "2.10.3"), ("very old PyTorch", "1.13.1+cu117")]
)
def test_a_pytorch_too_old(reports: dict[str, dict[str, Any]], name: str, version: str) -> None:
    assert_falls_back(reports[name], "2.11", version)


def needs_compiled_kernels() -> None:
    if ops.why_not("cpu") is not None:
        pytest.skip(f"nothing to break here: {ops.why_not('cpu')}")


def test_an_intact_copy_warns_of_nothing(reports: dict[str, dict[str, Any]]) -> None:
    needs_compiled_kernels()
    for name in ("intact", "a newer PyTorch", "source folder"):
        assert_works(reports[name])
        assert reports[name]["warnings"] == []
        assert reports[name]["fused"] is None
        assert reports[name]["why_not"]["cpu"] is None


def test_the_import_does_not_pull_in_the_compiler(reports: dict[str, dict[str, Any]]) -> None:
    """torch._dynamo takes longer to import than the rest of PyTorch, and few need it."""
    for name, report in reports.items():
        assert not report["dynamo"], name


def test_a_cuda_library_that_does_not_load_leaves_the_cpu_alone(
    reports: dict[str, dict[str, Any]],
) -> None:
    """libtorch_cuda missing looks the same to the loader."""
    needs_compiled_kernels()
    report = reports["CUDA library broken"]
    assert_works(report)
    assert report["warnings"] == []
    assert report["fused"] is None, "the CPU kernels are intact"
    for text in (report["why_not"]["cuda"], report["config"]):
        assert "fcrn_fused._cuda does not load" in text
        assert REMEDY in text


def test_the_reason_why_cuda_was_left_out_is_the_reason_given(
    reports: dict[str, dict[str, Any]],
) -> None:
    needs_compiled_kernels()
    report = reports["nvcc too old"]
    assert_works(report)
    assert report["warnings"] == []
    assert report["why_not"]["cpu"] is None
    for text in (report["why_not"]["cuda"], report["config"]):
        assert f"without CUDA kernels: {TOO_OLD}" in text
        assert REMEDY in text


def test_cuda_kernels_under_a_cpu_build_of_pytorch(reports: dict[str, dict[str, Any]]) -> None:
    needs_compiled_kernels()
    report = reports["CPU build of PyTorch"]
    assert_works(report)
    assert report["warnings"] == []
    assert "is not a CUDA build" in report["why_not"]["cuda"]
    assert report["why_not"]["cuda"] in report["config"]


@pytest.mark.parametrize(
    "problem",
    [
        "no kernel image is available for execution on the device",
        "CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_a_gpu_that_cannot_run_the_kernels(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    """What the CUDA runtime says is passed on, with the GPU, what was built, and what to do."""
    import torch

    module = ModuleType("fcrn_fused._cuda")
    module.problem = lambda index: problem  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fcrn_fused._cuda", module)
    monkeypatch.setitem(ops.BUILD_INFO, "cuda", "13.0")
    monkeypatch.setitem(ops.BUILD_INFO, "architectures", "sm_80 sm_90")
    monkeypatch.setitem(ops._problems, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla K80")
    monkeypatch.setattr(ops, "_usable_cuda_devices", set())
    reason = ops.why_not("cuda") or ""
    config = fcrn_fused.show_config()
    for word in (problem, "Tesla K80", "13.0", "sm_80 sm_90", "driver", REMEDY):
        assert word in reason
    assert f"cuda: reference, because {reason}" in config

    module.problem = lambda index: ""  # type: ignore[attr-defined]
    assert ops.why_not("cuda") is None, "a failure that has passed is not kept"


def test_no_gpu_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setitem(ops._problems, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "_usable_cuda_devices", set())
    reason = ops.why_not("cuda") or ""
    assert "no CUDA device" in reason
    assert "nvidia-smi" in reason


def test_another_type_of_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "xpu" in (ops.why_not("xpu") or "")
