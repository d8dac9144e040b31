"""The figures of README.md and docs/ are those of the committed JSON."""

import json
import re

import pytest
import report


def test_the_figures_of_the_pages_are_those_of_the_committed_json(capsys):
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_the_page_of_benchmarks_has_its_blocks_of_figures():
    page = report.ROOT / "docs" / "benchmarks.md"
    assert {"cpu-speed", "gpu-speed"} <= set(report.names_in(page.read_text()))


def test_times_of_the_cpu_are_not_published():
    blocks = report.make_blocks()
    for name in ("cpu-speed", "cpu-train-step"):
        assert not re.search(r"\d ?(?:ms|us|µs|ns)\b", blocks[name]), name


PAGE = "before\n<!-- figures: cpu-speed -->\nold\n<!-- end figures -->\nafter\n"


def test_a_block_is_replaced_and_the_rest_kept():
    filled = report.fill(PAGE, {"cpu-speed": "| new |"})
    assert filled == PAGE.replace("old", "| new |")
    assert report.fill(filled, {"cpu-speed": "| new |"}) == filled
    assert report.names_in(PAGE) == ["cpu-speed"]


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
    page.write_text(PAGE)
    assert report.main([str(page), "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert page.read_text() == PAGE
    assert report.main([str(page)]) == 0
    assert report.main([str(page), "--check"]) == 0


def test_what_was_not_measured_is_said_not_to_have_been(tmp_path):
    blocks = report.make_blocks(tmp_path)
    assert set(blocks) == set(report.BLOCKS)
    for name, text in blocks.items():
        assert re.search(r"not (?:been )?(?:measured|read|counted)|No |Nothing", text, re.I), name
        assert not re.search(r"\d", text), f"{name} has a figure"


def test_a_damaged_record_is_named(tmp_path, capsys):
    (tmp_path / "loss_speed_cpu.json").write_text(json.dumps({"benchmark": "gpu"}))
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path), "--check"])
    assert "loss_speed_cpu.json: is not a result of loss_speed.py" in capsys.readouterr().err
