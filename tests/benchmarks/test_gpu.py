"""benchmarks/gpu.py without a GPU: its steps, how it reads the tools, its record and its tables.

The outputs of tools and the figures here are made up; nothing of them is written to a file of the
repository.
"""

import json
import subprocess
import sys

import gpu
import gpu_checks
import provenance
import pytest
import report
import torch
import workloads
from gpu import Outcome, Result, Step
from workloads import Case

from fcrn_fused import ops

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def ended(output="", log="", returncode=0):
    return Outcome(returncode, output, log)


# ---- the command --------------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu_it_ends_in_one_sentence_and_a_status(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--output", str(path)]) == 1
    ending = capsys.readouterr()
    assert ending.out == ""
    assert len(ending.err.strip().splitlines()) == 1
    assert "there is no CUDA device" in ending.err
    assert not path.exists()


@without_gpu
def test_a_check_without_a_gpu_says_so(capsys):
    with pytest.raises(SystemExit) as ending:
        gpu_checks.main(["launches"])
    assert ending.value.code == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_dry_run_without_a_record_lists_the_steps_and_states_no_figure(capsys):
    assert gpu.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for step in (step for stage in gpu.stages() for step in stage):
        assert f" {step.name} (at most" in printed
    assert "Nothing has been measured on a GPU yet" in printed
    assert " µs" not in printed
    assert str(gpu.ROOT) not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--time-limit", "0"], "--time-limit must be positive"),
        (["--record", "old.json"], "--record is for --dry-run"),
        (["--dry-run", "--record", "absent.json"], "absent.json: cannot be read"),
        (["--only", "speed", "--skip", "speed"], "no step is left"),
    ],
)
def test_a_bad_argument_gets_a_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ending:
        gpu.main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_only_and_skip_choose_steps(capsys):
    gpu.main(["--dry-run", "--only", "speed", "dram", "--skip", "dram"])
    printed = capsys.readouterr().out
    assert " speed (at most" in printed
    assert " dram (at most" not in printed


def test_everything_that_is_promised_is_a_step():
    names = {step.name for stage in gpu.stages() for step in stage}
    assert names >= {"build", "tests", "memcheck", "racecheck", "initcheck", "synccheck", "speed"}
    assert names >= {"dram", "launches", "graph_replay", "streams", "several_gpus", "huge"}
    assert names >= {"grad_scaler", "accuracy", "determinism"}


def test_the_clocks_are_left_alone():
    dram = next(step for stage in gpu.stages() for step in stage if step.name == "dram")
    assert dram.command[1:3] == ("--clock-control", "none")


@without_gpu
def test_a_whole_run_whose_steps_all_fail_still_writes_its_record(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # here, not in the processes
    path = tmp_path / "gpu.json"
    assert gpu.main(["--only", "machine", "launches", "--output", str(path)]) == 1
    record = provenance.read_json(path, "gpu")
    assert [step["status"] for step in record["steps"]] == ["failed", "failed"]
    assert all("finds no CUDA device" in step["detail"] for step in record["steps"])
    assert record["device"] is None
    assert record["rows"] == record["bars"] == record["dram"] == []
    assert capfd.readouterr().out.strip().endswith("2 of 2 steps failed")


# ---- running ------------------------------------------------------------------------------------


def python_step(name, code, limit=30.0, read=gpu.read_entries, why_skipped=None):
    return Step(name, name, limit, (sys.executable, "-c", code), read, why_skipped=why_skipped)


SAYS_PASSED = """print('{"status": "passed", "detail": "fine"}')"""


def test_a_step_that_fails_stops_no_other(capfd):
    stages = [
        [python_step("bad", "raise SystemExit('broken: /opt/secret/place/file.py')")],
        [python_step("odd", SAYS_PASSED, read=lambda outcome: [][0])],
        [python_step("missing", SAYS_PASSED, why_skipped="ncu was not found")],
        [python_step("good", SAYS_PASSED), python_step("beside", SAYS_PASSED)],
    ]
    told = []
    entries = gpu.run_stages(stages, 60, told.append)
    assert {entry["name"]: entry["status"] for entry in entries} == {
        "bad": "failed",
        "odd": "failed",
        "missing": "skipped",
        "good": "passed",
        "beside": "passed",
    }
    assert len(told) == len(entries)
    assert entries[0]["detail"] == "ended with 1: broken: file.py"
    assert "was not understood" in entries[1]["detail"]
    assert "bad failed" in capfd.readouterr().err


def test_a_step_that_takes_too_long_is_ended_and_keeps_its_figures(capfd):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"figure": "speed", "pid": %d}' % child.pid, flush=True)
time.sleep(60)
"""
    entry = gpu.run_step(python_step("slow", code), limit=2.5)
    assert entry["status"] == "failed"
    assert "stopped after 2 s" in entry["detail"]
    (figure,) = entry["figures"]
    alive = subprocess.run(["ps", "-o", "stat=", "-p", str(figure["pid"])], capture_output=True)
    assert alive.stdout.strip()[:1] in (b"", b"Z")


def test_a_step_for_which_no_time_is_left_is_skipped():
    entry = gpu.run_step(python_step("late", SAYS_PASSED), limit=1)
    assert (entry["status"], entry["detail"]) == ("skipped", "no time was left for it")


def test_a_program_that_is_not_there_is_a_failure():
    step = Step("gone", "gone", 10, ("/nowhere/tool",), gpu.read_entries)
    assert gpu.run_step(step, 10)["status"] == "failed"


# ---- reading ------------------------------------------------------------------------------------


def test_a_check_that_died_has_failed():
    outcome = ended('{"figure": "speed", "x": 1}\n{"half', "Segmentation fault", -11)
    result = gpu.read_entries(outcome)
    assert result.status == "failed"
    assert "ended with -11: Segmentation fault" in result.detail
    assert result.figures == ({"figure": "speed", "x": 1},)


@pytest.mark.parametrize(
    ("output", "returncode", "status", "detail"),
    [
        ("....\n42 passed, 3 skipped in 61.20s\n", 0, "passed", "42 passed, 3 skipped"),
        ("=== 42 passed in 61.20s (0:01:01) ===\n", 0, "passed", "42 passed"),
        (
            "FAILED tests/test_x.py::test_y - boom\n1 failed, 41 passed in 9.1s\n",
            1,
            "failed",
            "1 failed, 41 passed: tests/test_x.py::test_y",
        ),
        ("3 skipped in 0.5s\n", 0, "failed", "3 skipped"),
        ("ERROR: file not found\n", 4, "failed", "pytest gave no summary: ERROR: file not found"),
    ],
)
def test_pytest_is_read(output, returncode, status, detail):
    assert gpu.read_pytest(ended(output, "", returncode)) == Result(status, detail)


SELECTION = '{"status": "passed", "detail": "86 steps ran"}\n'


@pytest.mark.parametrize(
    ("output", "returncode", "status", "detail"),
    [
        (
            SELECTION + "========= ERROR SUMMARY: 0 errors\n",
            0,
            "passed",
            "0 errors, 86 steps ran",
        ),
        (
            SELECTION + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            0,
            "passed",
            "0 errors, 86 steps ran",
        ),
        (
            SELECTION
            + "========= Invalid __global__ read of size 4 bytes\n"
            + "=========     at void fcrn::cuda::planar_kernel<float>(fcrn::LossPass)+0x110\n"
            + "========= ERROR SUMMARY: 2 errors\n",
            86,
            "failed",
            "2 errors",
        ),
        (
            SELECTION
            + "=========     at void at::native::fill_kernel()+0x110\n"
            + "=========     Host Frame: [0x1234] in _cuda.so\n"
            + "========= ERROR SUMMARY: 1 error\n",
            86,
            "passed",
            "1 errors, all of them in kernels of PyTorch",
        ),
        ("========= ERROR SUMMARY: 0 errors\n", 1, "failed", "0 errors, and the selection"),
        ("========= Error: Device not supported\n", 1, "skipped", "does not support this device"),
        ("", 1, "failed", "ended with 1"),
    ],
)
def test_the_sanitizer_is_read(output, returncode, status, detail):
    result = gpu.read_sanitizer(ended(output, "", returncode))
    assert result.status == status
    assert detail in result.detail


def ncu_csv(rows):
    head = '"ID","Process ID","Host Name","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [head]
    for number, kernel, values in rows:
        for metric, value in zip(gpu.DRAM_METRICS, values, strict=True):
            lines.append(f'"{number}","7","host","{kernel}","{metric}","byte","{value}"')
    return "\n".join(lines) + "\n"


def dram_case():
    return Case((1, 7, 10, 10), workloads.parse_pattern("none"), "float32", "contiguous", 2)


def dram_entries(count):
    entry = {"figure": "dram", "case": dram_case().as_json(), "pass": "step", "expected": 36.0}
    return "".join(json.dumps(entry) + "\n" for _ in range(count)) + SELECTION


def test_ncu_is_read_and_its_kernels_counted_to_their_case():
    ours = "void fcrn::cuda::planar_kernel<float>(int, int)"
    table = ncu_csv(
        [
            (0, "spin_kernel(long)", ("0", "0", "5000")),
            (1, ours, ("800", "2,800", "1000")),
            (2, ours, ("100", "0", "500")),
            (3, "spin_kernel(long)", ("0", "0", "5000")),
            (4, ours, ("900", "2700", "2000")),
        ]
    )
    result = gpu.read_dram(ended(f"==PROF== connected\n{dram_entries(2)}{table}"))
    assert result.status == "passed"
    first, second = result.figures
    assert (first["read_per_cell"], first["written_per_cell"], first["launches"]) == (9, 28, 2)
    assert first["seconds"] == pytest.approx(1.5e-6)
    assert second["read_per_cell"] + second["written_per_cell"] == 36
    assert "host" not in json.dumps(result.figures)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", "skipped"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", "skipped"),
        (dram_entries(2), "failed"),
        ("", "failed"),
    ],
)
def test_ncu_that_measured_nothing_has_not_passed(text, status):
    assert gpu.read_dram(ended(text, "", 1)).status == status


def test_launches_and_waits_are_counted():
    events = [
        ("void fcrn::cuda::planar_kernel<float>()", True),
        ("void fcrn::cuda::planar_kernel<float>()", True),
        ("void at::native::fill<float>()", True),
        ("cudaLaunchKernel", False),
        ("cudaStreamSynchronize", False),
    ]
    assert gpu_checks.count_events(events * 5, 5) == {
        "our_launches": 2,
        "all_launches": 3,
        "synchronisations": 1,
        "others": ["void at::native::fill<float>()"],
    }


# ---- the record ---------------------------------------------------------------------------------


def made_up_entries():
    device = {"type": "cuda", "name": "Made-up GPU", "compute_capability": "9.9", "driver": "1.2"}
    machine = {"figure": "machine", "date": "1970-01-01 00:00 UTC", "git_commit": "0000000"}
    machine |= {"device": device, "versions": {"torch": "0.0", "cuda": "0.0"}}
    huge = Case(
        workloads.HUGE_SIZE, workloads.parse_pattern("clustered:2"), "float32", "contiguous", 2
    ).as_json()
    speed = [
        {"figure": "speed", "case": huge, "contender": name, "pass": "step", "clock": "device"}
        | {"median_s": seconds, "low_s": seconds, "high_s": seconds, "bytes_per_cell": 36.0}
        for name, seconds in (("ours", 1e-3), ("mse_loss", 4e-3), ("floor", 9.5e-4))
    ]
    launches = {"figure": "launches", "size": [1, 7, 2, 2], "dtype": "float32"}
    launches |= {"grad_output": True, "our_launches": 2.0, "all_launches": 2.0}
    launches |= {"synchronisations": 0.0, "others": []}
    dram = {"figure": "dram", "case": huge, "pass": "step", "expected": 36.0}
    dram |= {"read_per_cell": 8.1, "written_per_cell": 28.0, "seconds": 1e-3, "launches": 2}
    figures = {"machine": [machine], "speed": speed, "launches": [launches], "dram": [dram]}
    entries = [
        {"name": name, "title": name, "status": "passed", "detail": "fine | well", "seconds": 1.0}
        | {"figures": some}
        for name, some in figures.items()
    ]
    entries += [
        {"name": "huge", "title": "huge", "status": "failed", "detail": "off", "seconds": 1.0}
        | {"figures": []},
        {"name": "memcheck", "title": "memcheck", "status": "skipped", "detail": "not found"}
        | {"seconds": 0.0, "figures": []},
    ]
    return entries


def test_the_record_survives_json_and_makes_every_table(tmp_path, capsys):
    record = gpu.make_record(made_up_entries(), 12.3)
    path = tmp_path / "gpu_made_up.json"
    provenance.write_json(record, path)
    assert provenance.read_json(path, "gpu") == record
    assert gpu.record_path(record).name == "gpu_made_up_gpu.json"
    assert gpu.main(["--dry-run", "--record", str(path)]) == 0
    printed = capsys.readouterr().out
    for text in ("Made-up GPU", "| 1000.0 | 4.0x |", "95%", "| 36.1 | 36.0 |", "fine \\| well"):
        assert text in printed
    blocks = report.make_blocks(tmp_path)
    assert all("Made-up GPU" in blocks[name] for name in blocks if name.startswith("gpu-"))


def test_what_failed_is_printed_last():
    lines = gpu.failures(gpu.make_record(made_up_entries(), 1.0)).splitlines()
    assert lines[0] == "skipped: memcheck: not found"
    assert lines[1] == "failed: huge: off"
    assert any(line.startswith("missed: ") and "mse_loss" in line for line in lines)
    assert lines[-1] == "1 of 6 steps failed"


def test_a_record_without_a_single_figure_is_still_a_record():
    entries = [
        {"name": "build", "title": "build", "status": "failed", "detail": "x", "seconds": 0.1}
        | {"figures": []}
    ]
    record = gpu.make_record(entries, 0.1)
    assert record["rows"] == []
    assert record["bars"] == []
    text = gpu.format_record(record)
    assert "| build | failed | x |" in text
    assert "Nothing has been measured" in text


def test_no_path_of_this_machine_gets_into_a_record():
    text = f"error in {gpu.ROOT}/csrc/a.cu and /usr/lib/python3/x.py and /opt/cuda/bin/nvcc"
    assert gpu.without_paths(text) == "error in csrc/a.cu and x.py and nvcc"


def test_no_record_is_committed_whose_device_was_made_up():
    for path in provenance.RESULTS.glob("gpu_*.json"):
        record = provenance.read_json(path, "gpu")
        assert record["device"]["type"] == "cuda"
        assert record["device"]["driver"]
        assert "made" not in path.name


# ---- the checks themselves, on the CPU's kernels ------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    reason = ops.why_not("cpu")
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(gpu_checks, "DEVICE", torch.device("cpu"))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["selection", "grad_scaler"])
def test_a_check_passes_on_kernels_that_are_right(name):
    *_, last = gpu_checks.run_check(gpu_checks.CHECKS[name])
    assert last["status"] == "passed", last["detail"]


@pytest.mark.usefixtures("on_cpu")
def test_the_images_of_a_batch_are_checked_one_by_one(monkeypatch):
    monkeypatch.setattr(gpu_checks, "OVER_2_31", (3, 7, 24, 24))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    *_, last = gpu_checks.run_check(gpu_checks.CHECKS["huge"])
    assert last["status"] == "passed", last["detail"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    *_, last = gpu_checks.run_check(gpu_checks.CHECKS["huge"])
    assert last["status"] == "skipped"


def test_a_check_that_cannot_be_run_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (entry,) = gpu_checks.run_check(gpu_checks.CHECKS["several_gpus"])
    assert entry == {"status": "skipped", "detail": "there is one GPU"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_or_a_loss_that_is_off_is_seen(dtype):
    truth = torch.rand(100, dtype=torch.float64) + 1
    grad, loss = truth.to(dtype), torch.tensor(2.0)
    gpu_checks.check_close(loss, loss.double(), grad, truth)
    with pytest.raises(gpu_checks.CheckFailedError, match="the loss is off"):
        gpu_checks.check_close(loss * 1.00001, loss.double(), grad, truth)
    wrong = grad.clone()
    wrong[7] *= 1 + 10 * torch.finfo(dtype).eps
    with pytest.raises(gpu_checks.CheckFailedError, match="ulp"):
        gpu_checks.check_close(loss, loss.double(), wrong, truth)
    wrong[7] = float("nan")
    with pytest.raises(gpu_checks.CheckFailedError):
        gpu_checks.check_close(loss, loss.double(), wrong, truth)


@pytest.mark.usefixtures("on_cpu")
def test_an_exception_in_a_check_is_a_failure():
    def raises():
        yield {"figure": "x"}
        raise ZeroDivisionError("no")

    entries = list(gpu_checks.run_check(gpu_checks.Check(raises, "raises")))
    assert entries[-1] == {"status": "failed", "detail": "ZeroDivisionError: no"}


def test_the_timings_cover_the_cases_of_the_gpu():
    plans = gpu_checks.speed_plans()
    sizes = {case.size for plan in plans for case in plan.cases}
    assert sizes == {*workloads.FCRN_SIZES, *workloads.DENSE_SIZES, workloads.HUGE_SIZE}
    timed = {
        (case, name, pass_)
        for plan in plans
        for case in plan.cases
        for name in plan.contenders
        for pass_ in plan.passes
    }
    every = {case for case, *_ in timed}
    assert {case.dtype for case in every} == {"float32", "bfloat16", "float16"}
    assert {case.layout for case in every} == {"contiguous", "channels_last"}
    for case in every:
        assert {(case, name, "step") for name in ("ours", "mse_loss", "compile", "floor")} <= timed
    huge = plans[0].cases[-1]
    assert huge.size == workloads.HUGE_SIZE
    for name in ("eager", "compile-max-autotune"):
        assert (huge, name, "step") in timed
    assert (huge, "ours", "no_grad") in timed
    assert all((case, "ours-scaled", "step") in timed for case in plans[0].cases)
