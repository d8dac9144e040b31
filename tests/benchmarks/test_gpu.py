"""`make gpu` without a GPU: its steps, how it ends them and reads the tools, and dram.py's figures.

The outputs of tools and the figures here are made up; nothing of them is written to a file of the
repository.
"""

import json
import sys
import types

import dram
import gpu
import measure
import pytest
import torch
from gpu import Step
from inputs import Case

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def python(code, name="tests", **more):
    return Step(name, (sys.executable, "-c", code), 60, **more)


@without_gpu
def test_without_a_gpu_it_ends_in_one_sentence_and_a_status(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 1
    ending = capsys.readouterr()
    assert not ending.out
    assert "finds no CUDA device; nothing was run" in ending.err
    assert not (tmp_path / "gpu.json").exists()


def test_a_dry_run_lists_the_steps(capsys):
    assert gpu.main(["--dry-run", "--only", "speed", "large"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed] == ["2. speed", "4. large"]
    assert str(measure.ROOT) not in printed[0]


def test_a_missing_tool_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(gpu, "cuda_tool", lambda name: None)
    reasons = {step.name: step.why_not for stage in gpu.stages() for step in stage}
    assert reasons["dram"] == "ncu was not found"
    assert reasons["memcheck"] == "compute-sanitizer was not found"
    assert reasons["tests"] is None
    entry = gpu.run(python("1/0", why_not="ncu was not found"), 60)
    assert (entry["status"], entry["detail"]) == ("skipped", "ncu was not found")


def test_a_step_has_its_environment_and_its_output_is_kept(logs):
    code = "import os; print(os.environ['FIGURE'])"
    entry = gpu.run(python(code, environment=(("FIGURE", "7"),)), 60)
    assert (entry["status"], entry["detail"]) == ("passed", "7")
    assert (logs / "tests.log").read_text() == "7\n"


def test_a_step_that_takes_too_long_is_interrupted_and_what_it_said_kept(monkeypatch):
    monkeypatch.setattr(gpu, "_FOR_SIGINT", 20.0)
    code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("FAILED tests/test_a.py::test_b - no")
    print("1 failed, 2 passed in 3.00s")
"""
    entry = gpu.run(python(code), 3)
    assert entry["status"] == "failed"
    assert entry["detail"] == (
        "stopped after 3 s; 1 failed, 2 passed in 3.00s; tests/test_a.py::test_b"
    )
    assert entry["seconds"] < 20


def test_a_step_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(gpu, "_FOR_SIGINT", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    entry = gpu.run(python(code), 3)
    assert entry["status"] == "failed"
    assert entry["seconds"] < 30


CLEAN = "==== 46 passed, 113 deselected in 19.52s ====\n"
SUMMARY = "========= ERROR SUMMARY: {} errors\n"


@pytest.mark.parametrize(
    ("name", "returncode", "log", "status", "detail"),
    [
        ("tests", 0, CLEAN, "passed", "46 passed, 113 deselected in 19.52s"),
        ("tests", 1, "1 failed, 2 passed in 9.0s", "failed", "1 failed, 2 passed in 9.0s"),
        ("build", 1, "/usr/bin/nvcc is missing\n", "failed", "nvcc is missing"),
        ("memcheck", 0, CLEAN + SUMMARY.format(0), "passed", "0 errors; 46 passed"),
        ("racecheck", 0, CLEAN + "RACECHECK SUMMARY: 0 hazards displayed", "passed", "0 errors"),
        ("racecheck", 0, "fcrn::\n" + CLEAN + "RACECHECK SUMMARY: 2 hazards", "failed", "2 errors"),
        ("memcheck", 86, "at fcrn::cuda\n" + CLEAN + SUMMARY.format(3), "failed", "3 errors; 46"),
        (
            "initcheck",
            86,
            CLEAN + SUMMARY.format(3),
            "passed",
            "3 errors, all of them in kernels of",
        ),
        ("memcheck", 0, CLEAN, "failed", "0 errors"),  # no summary: it checked nothing
        ("memcheck", 0, SUMMARY.format(0), "failed", "0 errors"),  # no test ran
        (
            "memcheck",
            1,
            "1 failed, 2 passed in 9s\n" + SUMMARY.format(0),
            "failed",
            "0 errors; 1 f",
        ),
        ("memcheck", 1, "Device not supported", "skipped", "0 errors"),
        ("dram", 1, "==ERROR== ERR_NVGPUCTRPERM", "skipped", "may not read"),
    ],
)
def test_a_verdict(name, returncode, log, status, detail):
    got = gpu.verdict(name, returncode, log)
    assert got[0] == status
    assert detail in got[1]


def test_a_whole_run_with_a_step_that_fails_stops_no_other(tmp_path, monkeypatch, logs, capsys):
    rows = f"import json, pathlib; pathlib.Path({str(logs)!r}, 'speed.json').write_text"
    steps = [
        [python("raise SystemExit('no nvcc')", "build")],
        [python(rows + "(json.dumps({'rows': [{'median_s': 1}]}))", "speed")],
        [python("print('2 passed in 1.0s')", "tests"), python("", "memcheck", why_not="missing")],
    ]
    device = {"type": "cuda", "name": "Made Up 9000"}
    monkeypatch.setattr(gpu, "stages", lambda: steps)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "describe_device", lambda _: device)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert gpu.main([]) == 1
    record = json.loads((tmp_path / "gpu_made_up_9000.json").read_text())
    assert record["device"] == device
    assert record["versions"]["torch"] == torch.__version__
    assert [(step["name"], step["status"]) for step in record["steps"]] == [
        ("build", "failed"),
        ("speed", "passed"),
        ("tests", "passed"),
        ("memcheck", "skipped"),
    ]
    assert record["rows"] == [{"median_s": 1}]
    assert record["dram"] == []
    assert "failed: build" in capsys.readouterr().out


# ---- dram.py ------------------------------------------------------------------------------------


def ncu_line(number, kernel, metric, value):
    return f'"{number}","123","python","{kernel}","{metric}","byte","{value}"'


def test_the_bytes_of_kernels_after_a_marker_are_those_of_a_case():
    ours, marker = (
        "void fcrn::cuda::planar_kernel<float, float>(int)",
        "at::cuda::spin_kernel(long)",
    )
    lines = [
        "==PROF== Connected",
        '"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"',
    ]
    kernels = [ours, marker, ours, "void at::native::fill(int)", ours, marker, ours]
    for number, kernel in enumerate(kernels):
        for metric in dram.METRICS:
            lines.append(ncu_line(number, kernel, metric, f"1,{number:03}"))
    lines[4:4] = ["expected 36864.0"]
    lines.append("expected 72.0")
    tasks = [
        (Case((1, 7, 32, 32)), "step"),
        (Case((1, 7, 8, 8)), "no_grad"),
        (Case((1, 7, 4, 4)), "step"),
    ]
    rows = dram.make_rows("\n".join(lines), tasks)
    assert [row["read"] for row in rows] == [1002 + 1004, 1006]
    assert [row["launches"] for row in rows] == [2, 1]
    assert rows[0]["expected"] == 36864
    assert dram.table(rows)[1] == [
        "(1, 7, 32, 32), 2 % clustered",
        "step",
        "2.0",
        "2.0",
        "3.9",
        "36.0",
    ]


def test_the_workload_says_what_to_expect_of_each_case(capsys):
    tasks = [(Case((1, 7, 8, 8), "none"), "step"), (Case((1, 7, 8, 8), "all"), "no_grad")]
    dram.workload(tasks, torch.device("cpu"))
    assert capsys.readouterr().out == f"expected {36 * 64.0}\nexpected {56 * 64.0}\n"


def test_a_run_that_ended_early_keeps_its_rows_and_fails(tmp_path, monkeypatch, capsys):
    ended = types.SimpleNamespace(stdout="", stderr="==ERROR== no counters")
    monkeypatch.setattr(dram, "cuda_tool", lambda name: name)
    monkeypatch.setattr(dram.subprocess, "run", lambda *_, **__: ended)
    monkeypatch.setattr(measure, "describe_device", lambda _: {"type": "cuda", "name": "x"})
    assert dram.main(["--output", str(tmp_path / "dram.json")]) == 1
    assert "no counters" in capsys.readouterr().err
    assert measure.read_json(tmp_path / "dram.json", "dram")["rows"] == []
