"""benchmarks/train_step.py: its settings, its conclusions and its table."""

import pytest
import torch

pytest.importorskip("tqdm")

import train_step


def row(network, grid, loss, share):
    return {
        "network": network,
        "batch": 16,
        "side": grid * 16,
        "stride": 16,
        "grid": grid,
        "loss": loss,
        "step_s": 1.0,
        "loss_s": share,
        "share": share,
        "peak_bytes": 10**6,
    }


def test_the_conclusion_names_the_grid_from_which_the_loss_counts():
    rows = [row("dense", 16, "eager", 0.001), row("dense", 32, "eager", 0.02)]
    rows += [row("dense", 16, "ours", 0.0001), row("dense", 32, "ours", 0.002)]
    eager, ours = train_step.conclusions(rows)
    assert "the eager loss is 1 % of the step or more at grids of 32 cells a side" in eager
    assert "at most 2.0%, at 32 x 32" in eager
    assert "the ours loss" not in ours
    assert "less than 1 % of the step at every grid" in ours


def test_the_table_has_a_line_for_each_loss():
    rows = [row("dense", 16, loss, 0.001) for loss in train_step.LOSSES]
    assert len(train_step.format_table(rows).splitlines()) == 1 + len(rows)


@pytest.mark.parametrize("network", list(train_step.SETTINGS))
def test_a_network_has_a_cell_for_each_stride(network):
    setting = train_step.SETTINGS[network][0]._replace(batch=1)
    net = train_step.make_network(setting).eval()
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, setting.side, setting.side))
    assert maps.shape == (1, 7, setting.grid, setting.grid)


def test_a_bad_argument_gets_a_clear_message(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--networks", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err
