"""benchmarks/loss_speed.py: its arguments, its contenders, its record and its tables."""

import getpass
import json
import socket
import subprocess
import sys

import bars
import loss_speed
import provenance
import pytest
import torch
import workloads
from workloads import Case

from fcrn_fused import ops

TINY = ["--sizes", "2x7x16x16", "--rounds", "2", "--round-seconds", "0.001"]
UNCOMPILED = ["--contenders", "ours", "ours-scaled", "mse_loss", "eager", "floor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64x7x128"], "a size is BxCxHxW"),
        (["--patterns", "many"], "a pattern is none, all"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--rounds", "0"], "a whole number of at least 1"),
        (["--round-seconds", "-1"], "must be a positive number"),
        (["--device", "tpu:x"], "--device must be cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "this PyTorch finds"),
        (["--contenders", "compile-max-autotune"], "only with --device cuda"),
        (["--output", "figures.csv"], "must end in .json"),
        (["--compare", "absent.json"], "absent.json: cannot be read"),
    ],
)
def test_a_bad_argument_gets_a_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ending:
        loss_speed.parse_arguments(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_benchmark_is_not_compared(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"benchmark": "train_step"}')
    (tmp_path / "text.json").write_text("figures")
    for name, message in (("other", "not a result of loss_speed.py"), ("text", "is not JSON")):
        with pytest.raises(SystemExit):
            loss_speed.parse_arguments(["--compare", str(tmp_path / f"{name}.json")])
        assert message in capsys.readouterr().err


def test_the_fused_backend_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(ops, "why_not", lambda device_type: "there is no compiler")
    with pytest.raises(SystemExit):
        loss_speed.parse_arguments(["--backend", "fused"])
    assert "--backend fused: there is no compiler" in capsys.readouterr().err


def test_the_default_is_every_size_and_one_factor_at_a_time():
    plan = loss_speed.make_plan(loss_speed.parse_arguments(["--threads", "2"]))
    assert {case.size for case in plan.cases} == set(workloads.FCRN_SIZES + workloads.DENSE_SIZES)
    chosen = loss_speed.default_cases(torch.device("cpu"), 2)
    plain = chosen[3]
    assert all(sum(a != b for a, b in zip(plain, case, strict=True)) <= 1 for case in chosen)
    assert {str(case.pattern) for case in chosen} == {"clustered:2", "scattered:2", "none", "all"}
    assert {case.dtype for case in chosen} == {"float32", "bfloat16", "float16"}
    assert {case.layout for case in chosen} == {"contiguous", "channels_last"}
    assert workloads.HUGE_SIZE in {
        case.size for case in loss_speed.default_cases(torch.device("cuda"), 2)
    }


def test_what_is_chosen_is_combined():
    arguments = [
        "--sizes",
        "1x7x8x8",
        "2x7x8x8",
        "--patterns",
        "none",
        "all",
        "--dtypes",
        "float16",
    ]
    plan = loss_speed.make_plan(loss_speed.parse_arguments(arguments))
    assert len(plan.cases) == 4
    assert {case.dtype for case in plan.cases} == {"float16"}


@pytest.mark.parametrize("study", list(loss_speed.STUDIES))
def test_a_study_goes_over_many_inputs_of_ours_and_the_floor(study):
    plan = loss_speed.make_plan(loss_speed.parse_arguments(["--study", study]))
    assert plan.contenders == ["ours", "floor"]
    assert plan.passes == ["step"]
    assert len(plan.cases) >= 5


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    path = tmp_path_factory.mktemp("results") / "run.json"
    arguments = [*TINY, *UNCOMPILED, "--dtypes", "float32", "float16", "--output", str(path)]
    assert loss_speed.main(arguments) == 0
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text()), path


def test_the_record_has_a_row_for_each_contender_pass_and_dtype(record):
    rows = record[0]["rows"]
    got = {(row["contender"], row["pass"], row["case"]["dtype"]) for row in rows}
    expected = {
        (name, pass_, dtype)
        for name in ("ours", "mse_loss", "eager", "floor")
        for pass_ in loss_speed.PASSES
        for dtype in ("float32", "float16")
    }
    expected |= {("ours-scaled", "step", dtype) for dtype in ("float32", "float16")}
    assert got == expected
    for row in rows:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert len(row["rounds_s"]) == 2
    step = next(r for r in rows if (r["contender"], r["pass"]) == ("mse_loss", "step"))
    assert step["peak_bytes"] >= step["gradient_bytes"]


def test_the_record_says_where_it_comes_from_and_not_on_whose_machine(record):
    written, path = record
    assert written["versions"]["torch"] == torch.__version__
    assert written["device"]["type"] == "cpu"
    assert written["device"]["threads"] >= 1
    text = path.read_text()
    for private in (socket.gethostname(), str(path.parent), "/home/", f"/{getpass.getuser()}/"):
        assert private not in text


def test_a_run_compared_with_itself_is_not_slower(record):
    written = record[0]
    assert "nothing of" in loss_speed.compare(written, written)


def test_what_got_slower_is_printed_and_nothing_else(record):
    written = record[0]
    slow = json.loads(json.dumps(written))
    row = next(row for row in slow["rows"] if row["contender"] == "ours")
    for name in ("median_s", "low_s", "high_s"):
        row[name] *= 100
    lines = loss_speed.compare(written, slow).splitlines()
    assert "slower than" in lines[0]
    assert len(lines) == 3
    assert " ours " in lines[2]
    slow["device"] = {**slow["device"], "name": "another"}
    assert "other devices" in loss_speed.compare(written, slow)


def test_the_table_has_a_line_for_each_pass(record):
    table = loss_speed.format_table(record[0]["rows"]).splitlines()
    assert len(table) == 1 + 2 * len(loss_speed.PASSES)
    assert "x mse_loss" in table[0]


def test_a_contender_that_fails_is_recorded_and_the_others_are_timed(monkeypatch):
    def broken(pred, target):
        raise RuntimeError("no kernel\nfor this")

    real = loss_speed.loss_function
    monkeypatch.setattr(
        loss_speed,
        "loss_function",
        lambda name, device, backend="auto": broken if name == "eager" else real(name, device),
    )
    case = Case((1, 7, 4, 4), workloads.parse_pattern("all"), "float32", "contiguous", 1)
    plan = loss_speed.Plan([case], ["mse_loss", "eager"], ["step"], 1, 1e-3, "auto")
    rows = loss_speed.measure(plan, torch.device("cpu"))
    failed = [row for row in rows if row["median_s"] is None]
    assert [row["contender"] for row in failed] == ["eager"]
    assert failed[0]["failure"] == "RuntimeError: no kernel"
    assert [row["contender"] for row in rows if row["median_s"]] == ["mse_loss"]


def test_seconds_are_written_with_three_digits():
    assert loss_speed.format_seconds(3.84e-5) == "38.4 us"
    assert loss_speed.format_seconds(0.00123) == "1.23 ms"
    assert loss_speed.format_seconds(2.0) == "2 s"


# ---- bars ---------------------------------------------------------------------------------------


def row(case, contender, seconds, pass_="step", clock="wall", **more):
    return {
        "case": case.as_json(),
        "contender": contender,
        "pass": pass_,
        "clock": clock,
        "median_s": seconds,
        "bytes_per_cell": 36.0,
        "peak_bytes": 100,
        "gradient_bytes": 100,
    } | more


def plain(size, threads=2):
    return Case(size, workloads.parse_pattern("clustered:2"), "float32", "contiguous", threads)


def test_bars_of_the_cpu_are_met_or_missed():
    small, dense = plain(workloads.FCRN_SIZES[0]), plain(workloads.DENSE_SIZES[2])
    rows = [row(small, "ours", 1.0), row(small, "eager", 6.0), row(small, "compile", 2.0)]
    rows += [row(dense, "ours", 1.0), row(dense, "mse_loss", 2.4), row(dense, "floor", 0.6)]
    rows += [row(plain(dense.size, 1), "ours", 1.8)]
    judged = {bar.promise: bar.met for bar in bars.judge(rows, "cpu")}
    name, other = bars.label(small), bars.label(dense)
    assert judged == {
        f"{name}: times as fast as eager": True,
        f"{name}: times as fast as compile": False,
        f"{other}: times as fast as mse_loss": True,
        f"{other}: share of the floor": False,
        f"{other}: 2 threads over 1": True,
    }


def test_bars_of_the_gpu_are_those_of_device_time():
    huge = plain(workloads.HUGE_SIZE)
    rows = [row(huge, "ours", 1.0, clock="device"), row(huge, "compile", 3.4, clock="device")]
    rows += [row(huge, "mse_loss", 5.5, clock="device"), row(huge, "floor", 0.95, clock="device")]
    judged = {bar.promise: bar.met for bar in bars.judge(rows, "cuda")}
    name = bars.label(huge)
    assert judged == {
        f"{name}: times as fast as compile, device time": False,
        f"{name}: times as fast as mse_loss, device time": True,
        f"{name}: share of the floor, step": True,
    }


def test_the_floor_is_scaled_to_the_bytes_of_the_pattern():
    case = plain(workloads.DENSE_SIZES[2])
    rows = [row(case, "ours", 2.0, bytes_per_cell=72.0), row(case, "floor", 1.0)]
    assert bars.Timings(rows).floor_share(case) == 1.0


# ---- how they are started -----------------------------------------------------------------------


@pytest.mark.parametrize("program", ["loss_speed", "gpu"])
@pytest.mark.parametrize("how", ["file", "module"])
def test_a_benchmark_is_started_as_a_file_or_as_a_module(program, how):
    root = provenance.ROOT
    name = f"benchmarks/{program}.py" if how == "file" else f"benchmarks.{program}"
    command = [sys.executable, *([] if how == "file" else ["-m"]), name, "--help"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"usage: {program}.py" in run.stdout
