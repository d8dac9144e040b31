"""benchmarks/train_step.py: its settings, its rows and its table."""

import measure
import pytest
import torch
import train_step


@pytest.mark.parametrize("network", list(train_step.SETTINGS))
def test_a_network_has_a_cell_for_each_stride(network):
    if network != "dense":
        pytest.importorskip("examples.text_detection.model")
    setting = train_step.SETTINGS[network][0]
    net = train_step.make_network(setting).eval()
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, setting.side, setting.side))
    assert maps.shape == (1, 7, setting.grid, setting.grid)


def test_a_run_has_a_row_for_each_loss(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    monkeypatch.setattr(train_step, "SETTINGS", {"dense": train_step.SETTINGS["dense"][:1]})
    path = tmp_path / "run.json"
    arguments = ["--batch", "1", "--rounds", "1", "--round-seconds", "1e-4", "--output", str(path)]
    assert train_step.main(arguments) == 0
    rows = measure.read_json(path, "train_step")["rows"]
    assert [row["loss"] for row in rows] == list(train_step.LOSSES)
    assert all(0 < row["share"] == row["loss_s"] / row["step_s"] for row in rows)
    assert all(row["peak_bytes"] > 4 * 7 * 16 * 16 for row in rows)
    assert "| dense   | 1 x 16^2 " in capsys.readouterr().out


def test_a_bad_argument_gets_a_clear_message(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--networks", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err
