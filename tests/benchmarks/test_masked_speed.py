"""The benchmark of masked_mse_loss: what it counts, what it times and what it writes."""

import json

import masked_speed
import pytest
import torch
from torch import Tensor

from fcrn_fused import masked_mse_loss


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.ones(2, 4, 16), 4 + 8 + 2 * 4),
        (torch.ones(2, 1, 16), 4 + 8 + 2 * 4 / 4),
        (torch.zeros(2, 1, 16, dtype=torch.bool), 4 + 2 / 4),
        (torch.arange(2).bool().view(2, 1, 1), 4 + 8 / 2 + 2 * 2 / 128),
    ],
    ids=["each element", "each cell", "nothing counts", "an image counts"],
)
def test_expected_bytes(weight: Tensor, expected: float):
    pred = torch.zeros(2, 4, 16)
    assert masked_speed.expected_bytes(pred, weight, 8) == pytest.approx(expected)


def test_a_sector_counts_where_one_of_its_elements_does():
    weight = torch.zeros(1, 32)
    weight[0, 3] = weight[0, 9] = 1
    assert masked_speed.expected_bytes(torch.zeros(1, 32), weight, 8) == 4 + 8 / 2 + 8


@pytest.mark.parametrize("case", masked_speed.CASES, ids=lambda case: case.name)
def test_the_weights_suit_their_maps_and_the_peers_compute_the_same(case):
    torch.manual_seed(0)
    pred, target = (torch.randn(case.shape) for _ in "12")
    weight = case.weight()
    want = masked_mse_loss(pred, target, weight)
    torch.testing.assert_close(masked_speed.by_hand(pred, target, weight.float()), want)


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert masked_speed.main(["--quick", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["rows"][0]["contender"] == "ours"
    assert all(row["median_s"] > 0 for row in record["rows"])
    ours = record["rows"][0]
    assert ours["peak_bytes"] < ours["gradient_bytes"] + 4096
    assert "a padded sequence" in capsys.readouterr().out
