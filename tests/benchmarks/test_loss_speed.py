"""benchmarks/loss_speed.py: its cases, its contenders, its record and its tables."""

import json
import subprocess
import sys

import inputs
import loss_speed
import measure
import pytest
import torch
from inputs import Case

from fcrn_fused import fcrn_loss, masked_mse_loss

CPU = torch.device("cpu")
TINY = Case((2, 7, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64x7"], "a shape is like"),
        (["--shapes", "64x7x0"], "a shape is like"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--rounds", "0"], "at least 1"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--compare", "absent.json"], "absent.json: cannot be read"),
    ],
)
def test_a_bad_argument_gets_a_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ending:
        loss_speed.parse_arguments(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("device", "huge_pages"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_the_default_covers_patterns_dtypes_layouts_and_masks(device, huge_pages):
    cases = [case for case, _ in loss_speed.default_tasks(device, huge_pages)]
    fcrn = [case for case in cases if case.weight_shape is None]
    assert {case.pattern for case in fcrn} == {"clustered:2", "scattered:2", "none", "all"}
    assert {case.dtype for case in fcrn} == {"float32", "bfloat16", "float16"}
    assert {case.layout for case in fcrn} == {"contiguous", "channels_last"}
    assert len({case.weight_shape for case in cases}) >= 3
    shapes = {case.shape for case in fcrn}
    assert loss_speed.LARGE.shape in shapes
    assert (loss_speed.HUGE.shape in shapes) == (device == "cuda")
    assert ((16, 7, 16, 16) in shapes) != huge_pages


def test_by_hand_is_the_same_loss():
    made = inputs.make_inputs(Case((2, 7, 32, 32), "clustered:20"), "cpu")
    want = fcrn_loss(made.pred, made.target, negative_weight=0.01)
    got = loss_speed.losses_for(TINY, "step", made)["eager"](made.pred, made.target)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", loss_speed.MASKED, ids=lambda case: case.label)
def test_the_weights_suit_their_maps_and_the_peers_compute_the_same(case):
    made = inputs.make_inputs(case, "cpu")
    want = masked_mse_loss(made.pred, made.target, made.weight)
    losses = loss_speed.losses_for(case, "step", made)
    for name in ("eager", "mse_loss(weight)"):
        torch.testing.assert_close(losses[name](made.pred, made.target), want)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run of eager contenders, in which one of them fails."""
    path = tmp_path_factory.mktemp("results") / "run.json"

    def broken(*_):
        raise RuntimeError("no kernel\nfor this")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *_, **__: broken)
        arguments = ["--shapes", "2x7x16x16", "--dtypes", "float32", "float16", "--rounds", "2"]
        arguments += ["--passes", *loss_speed.PASSES, "--round-seconds", "0.001"]
        assert loss_speed.main([*arguments, "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_record_has_a_row_for_each_contender_pass_and_dtype(record):
    rows = [row for row in record["rows"] if "median_s" in row]
    got = {(row["contender"], row["pass"], row["dtype"]) for row in rows}
    of_pass = {
        "step": ("ours", "mse_loss", "eager", "fill", "copy"),
        "no_grad": ("ours", "mse_loss", "fill", "copy"),
        "scaled": ("ours", "fill", "copy"),
    }
    assert got == {
        (name, pass_, dtype)
        for pass_, names in of_pass.items()
        for name in names
        for dtype in ("float32", "float16")
    }
    for row in rows:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert len(row["rounds_s"]) == 2
    step = next(r for r in rows if (r["contender"], r["pass"]) == ("mse_loss", "step"))
    assert step["peak_bytes"] >= step["gradient_bytes"]


def test_a_contender_that_fails_is_recorded_and_the_others_are_timed(record):
    failed = [row for row in record["rows"] if "failure" in row]
    assert {row["contender"] for row in failed} == {"compile"}
    assert failed[0]["failure"] == "RuntimeError: no kernel"


def test_the_table_has_a_line_for_each_case_and_pass(record):
    head, *lines = loss_speed.table(record["rows"])
    assert len(lines) == 2 * len(loss_speed.PASSES)
    assert {"ours", "mse_loss", "eager", "floor / ours", "bytes"} <= set(head)
    assert "ours" not in loss_speed.table(record["rows"], seconds=False)[0]
    assert {len(line) for line in lines} == {len(head)}


def test_a_run_compared_with_itself_is_not_slower(record):
    text, slower = loss_speed.compare(record, record)
    assert not slower
    assert "slower" not in text
    assert len(text.splitlines()) == 2 + sum("median_s" in row for row in record["rows"])


def test_what_got_slower_is_marked_and_nothing_else(record):
    slow = json.loads(json.dumps(record))
    for contender, wanted in (("mse_loss", False), ("ours", True)):
        row = next(row for row in slow["rows"] if row["contender"] == contender)
        for name in ("median_s", "low_s", "high_s"):
            row[name] *= 100
        text, slower = loss_speed.compare(record, slow)
        assert slower == wanted
        assert text.count("100.00 slower") == 1 + wanted
    slow["device"] = {**slow["device"], "name": "another"}
    assert "other devices" in loss_speed.compare(record, slow)[0]


def test_the_bounds_move_the_bytes_of_ours():
    """A gradient is written and the rest read, or half is read and half written."""
    made = inputs.make_inputs(Case((2, 7, 64, 64)), "cpu")
    gradient = made.pred.numel() * 4
    for pass_, wanted in (("step", 36 * 8192), ("no_grad", 8 * 8192)):
        bounds = loss_speed.bounds_for(made, pass_, wanted)
        written = gradient if pass_ == "step" else 0
        assert measure.allocations(bounds["fill"], CPU).peak == pytest.approx(written, abs=100)
        assert measure.allocations(bounds["copy"], CPU).peak == pytest.approx(wanted / 2, abs=100)


def row(contender, seconds, **more):
    plain = {
        "case": TINY.label,
        "pass": "step",
        "clock": "host",
        "shape": TINY.shape,
        "units": 2**18,
    }
    times = {"median_s": seconds, "low_s": seconds, "high_s": seconds, "bytes": 36 * 2**18}
    return {**plain, "contender": contender, **times, **more}


def test_the_floor_is_the_faster_bound():
    rows = [row("ours", 2.0), row("fill", 1.9), row("copy", 1.8)]
    assert loss_speed.table(rows)[1][-2:] == ["90%", "36.0"]


@pytest.mark.parametrize(("bound", "drawn"), [(1.0, True), (3.0, False)])
def test_a_floor_that_is_none_is_not_drawn(bound, drawn, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    rows = [row("ours", 2.0), row("fill", bound), row("mse_loss", 4.0)]
    loss_speed.plot(rows, "a title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert ("floor" in labels) == drawn
    assert "ours" in labels


def test_the_large_inputs_are_measured_a_second_time_with_huge_pages(tmp_path, monkeypatch):
    """In a process of its own, whose rows are marked; here with one tiny case."""
    path, run = tmp_path / "run.json", subprocess.run
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    monkeypatch.setattr(loss_speed, "default_tasks", lambda *_: [(TINY, "no_grad")])

    def run_tiny(command, *, env, check):
        assert env["THP_MEM_ALLOC_ENABLE"] == "1"
        command = [*command, "--shapes", "1x7x8x8", "--passes", "no_grad"]
        return run(command, env=env, check=check)

    monkeypatch.setattr(subprocess, "run", run_tiny)
    monkeypatch.setattr(measure, "git_commit", lambda: "abc")
    assert loss_speed.main(["--rounds", "1", "--round-seconds", "1e-4", "--output", str(path)]) == 0
    rows = measure.read_json(path, "loss_speed")["rows"]
    assert {(row["case"], row.get("huge_pages")) for row in rows} == {
        (TINY.label, None),
        (Case((1, 7, 8, 8)).label, True),
    }
    assert loss_speed.table(rows)[-1][0].endswith(", huge pages")
    assert not path.with_suffix(".png").exists()  # no forward with backward


def test_on_a_gpu_small_inputs_have_the_host_s_clock_and_large_ones_the_device_s(monkeypatch):
    """The code for CUDA, with stand-ins for what only a GPU has."""
    make_inputs, host_timer = loss_speed.make_inputs, measure.host_timer
    allocations = measure.allocations
    monkeypatch.setattr(loss_speed, "make_inputs", lambda case, _: make_inputs(case, "cpu"))
    monkeypatch.setattr(measure, "host_timer", lambda call, _: host_timer(call, CPU))
    monkeypatch.setattr(measure, "graph_timer", lambda calls: host_timer(calls[0], CPU))
    monkeypatch.setattr(measure, "allocations", lambda call, _: allocations(call, CPU))
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    monkeypatch.setattr(loss_speed, "MANY_CELLS", 4096)
    monkeypatch.setattr(loss_speed, "BOUND_BY_BYTES", 256)
    clocks = {}
    for case in (Case((1, 7, 8, 8)), Case((1, 7, 32, 32)), Case((1, 7, 64, 64))):
        rows = loss_speed.measure_case(case, "step", torch.device("cuda"), 1, 1e-4)
        assert not any("failure" in each for each in rows)
        clocks[case.shape[-1]] = {each["clock"] for each in rows}
    assert clocks == {8: {"host"}, 32: {"host", "device"}, 64: {"device"}}


def test_seconds_are_written_with_three_digits():
    assert loss_speed.format_seconds(3.84e-5) == "38.4 us"
    assert loss_speed.format_seconds(0.00123) == "1.23 ms"
    assert loss_speed.format_seconds(2.0) == "2 s"


@pytest.mark.parametrize("program", ["loss_speed", "gpu"])
@pytest.mark.parametrize("how", ["file", "module"])
def test_a_benchmark_is_started_as_a_file_or_as_a_module(program, how):
    name = f"benchmarks/{program}.py" if how == "file" else f"benchmarks.{program}"
    command = [sys.executable, *([] if how == "file" else ["-m"]), name, "--help"]
    run = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"usage: {program}.py" in run.stdout
