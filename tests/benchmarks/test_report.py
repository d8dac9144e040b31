"""The figures of README.md and docs/ are those of the committed JSON."""

import json
import re

import pytest
import report
from inputs import Case


def test_the_figures_of_the_pages_are_those_of_the_committed_json(capsys):
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_times_of_the_cpu_are_not_published():
    for name, text in report.make_blocks().items():
        assert not (name.startswith("cpu") and re.search(r"\d ?(?:ms|us|µs|ns)\b", text)), name


PAGE = "before\n<!-- figures: cpu-speed -->\nold\n<!-- end figures -->\nafter\n"


def test_a_block_is_replaced_and_the_rest_kept():
    filled = report.fill(PAGE, {"cpu-speed": "| new |"})
    assert filled == PAGE.replace("old", "| new |")
    assert report.fill(filled, {"cpu-speed": "| new |"}) == filled


@pytest.mark.parametrize(
    "text",
    [
        PAGE.replace("<!-- end figures -->", ""),
        PAGE.replace("<!-- figures: cpu-speed -->", ""),
        PAGE + "<!-- figures: cpu-speed -->",
    ],
)
def test_a_block_that_is_not_closed_is_an_error(text):
    with pytest.raises(ValueError, match="opened"):
        report.fill(text, {"cpu-speed": ""})


def test_an_unknown_block_is_an_error():
    with pytest.raises(ValueError, match="no figures 'cpu-sped'"):
        report.fill(PAGE.replace("cpu-speed", "cpu-sped"), {"cpu-speed": ""})


def test_check_fails_where_a_page_differs_and_a_rewrite_mends_it(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("cpu-speed", "machine-code"))
    assert report.main([str(page), "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert report.main([str(page)]) == 0
    assert report.main([str(page), "--check"]) == 0


def test_a_block_without_figures_stays(tmp_path):
    assert report.make_blocks(tmp_path) == {}
    assert report.fill(PAGE, {}) == PAGE


def test_a_damaged_record_is_named(tmp_path, capsys):
    (tmp_path / "loss_speed_cpu.json").write_text(json.dumps({"benchmark": "gpu"}))
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path), "--check"])
    assert "loss_speed_cpu.json: is not a result of loss_speed.py" in capsys.readouterr().err


DEVICES = {
    "cpu": {"type": "cpu", "name": "made up", "threads": 2},
    "cuda": {"type": "cuda", "name": "Made Up 9000", "driver": "1"},
}


@pytest.mark.parametrize("device", DEVICES)
def test_the_blocks_of_speed(tmp_path, device):
    """Made-up figures, for a case of each loss, in the file where a run writes them."""
    rows = []
    for case in (Case((1, 7, 8, 8)), Case((1, 4, 8), "all", weight_shape=(1, 4, 8))):
        plain = {**case._asdict(), "case": case.label, "pass": "step", "clock": "host"}
        for name, seconds in (("ours", 2e-3), ("mse_loss", 8e-3)):
            times = {"contender": name, "median_s": seconds, "units": 64, "bytes": 64 * 36}
            rows.append({**plain, **times})
    counted = {"case": "a case", "pass": "step", "units": 64, "launches": 1}
    counted |= {"read": 64 * 8, "written": 64 * 28, "expected": 64 * 36}
    step = {"name": "tests", "status": "passed", "seconds": 1.0, "detail": "2 | 3"}
    record = {"benchmark": "loss_speed" if device == "cpu" else "gpu", "date": "today"}
    record |= {"git_commit": "abc", "device": DEVICES[device], "versions": {"torch": "2"}}
    record |= {"rows": rows, "dram": [counted], "steps": [step]}
    name = {"cpu": "loss_speed_cpu.json", "cuda": "gpu_made_up.json"}[device]
    (tmp_path / name).write_text(json.dumps(record))
    blocks = report.make_blocks(tmp_path)
    if device == "cpu":
        assert set(blocks) == {"cpu-speed", "cpu-masked"}
        assert "| (1, 7, 8, 8), 2 % clustered " in blocks["cpu-speed"]
        assert "a weight for each element" in blocks["cpu-masked"]
        assert "4.00x" in blocks["cpu-speed"]
    else:
        assert set(blocks) == {"gpu-speed", "gpu-dram"}
        assert "2 ms" in blocks["gpu-speed"]
        assert re.search(r"a case +\| step +\| +8.0 \| +28.0 \| +36.0 \| +36.0", blocks["gpu-dram"])
    assert all(f"`benchmarks/results/{name}`" in text for text in blocks.values())
