"""The inputs of the benchmarks and the tests, and the bytes that each must move."""

import inputs
import numpy as np
import pytest
import torch
from inputs import Case

SIZE = (2, 7, 64, 64)


def bytes_of_unit(pass_="step", device_type="cuda", pattern="none", shape=SIZE, **kind):
    case = Case(shape, pattern, **kind)
    chosen = inputs.choose(pattern, case.weight_shape or (shape[0], *shape[2:]))
    return inputs.expected_bytes(case, chosen, pass_, device_type) / case.units


def test_bytes_without_positives_are_the_floor():
    assert bytes_of_unit() == 36
    assert bytes_of_unit(dtype="bfloat16") == 18
    assert bytes_of_unit(dtype="float16") == 22  # backward reads again
    assert bytes_of_unit("no_grad") == 8
    assert bytes_of_unit("no_grad", dtype="bfloat16") == 4
    assert bytes_of_unit("no_grad", dtype="float16") == 4


def test_bytes_with_positives_everywhere():
    assert bytes_of_unit(pattern="all") == 84
    assert bytes_of_unit("no_grad", pattern="all") == 56


def test_channels_last_reads_every_map_whatever_the_pattern():
    assert bytes_of_unit(layout="channels_last") == 84
    assert bytes_of_unit("no_grad", layout="channels_last") == 56


def test_a_grad_output_that_is_not_1_costs_12_bytes_more():
    assert bytes_of_unit("scaled") == 48
    assert bytes_of_unit("scaled", dtype="float16") == 22


def test_scattered_positives_touch_one_sector_in_seven():
    shape = (16, 7, 256, 256)
    share, half = 1 - 0.98**8, 1 - 0.98**16
    got = bytes_of_unit(pattern="scattered:2", shape=shape)
    assert got == pytest.approx(36 + 48 * share, 0.01)
    got = bytes_of_unit(pattern="scattered:2", dtype="bfloat16", shape=shape)
    assert got == pytest.approx(18 + 24 * half, 0.01)
    got = bytes_of_unit(device_type="cpu", pattern="scattered:2", shape=shape)
    assert got == pytest.approx(36 + 48 * half, 0.01)  # a cache line holds twice as many cells


def test_clustered_positives_touch_few_sectors():
    assert 36 < bytes_of_unit(pattern="clustered:2", shape=(4, 7, 256, 256)) < 38.5


@pytest.mark.parametrize(
    ("weight_shape", "pattern", "expected"),
    [
        ((2, 4, 16), "all", 4 + 8 + 2 * 4),  # float
        ((2, 1, 16), "all", 4 + 8 + 2 / 4),  # bool
        ((2, 1, 16), "none", 4 + 2 / 4),
        ((2, 4, 1), "first:50", 4 + 8 / 2 + 2 / 16),
    ],
)
def test_bytes_of_a_masked_loss(weight_shape, pattern, expected):
    got = bytes_of_unit(shape=(2, 4, 16), weight_shape=weight_shape, pattern=pattern)
    assert got == pytest.approx(expected)


def test_touched_share_counts_a_sector_that_is_cut_off():
    chosen = np.zeros((1, 10), dtype=bool)
    chosen[0, 9] = True
    assert inputs.touched_share(chosen, 8) == 0.5


@pytest.mark.parametrize("kind", ["clustered", "scattered", "first"])
@pytest.mark.parametrize("percent", [0.5, 2, 50])
def test_the_share_is_met_in_every_image(kind, percent):
    chosen = inputs.choose(f"{kind}:{percent}", (3, 40, 56))
    assert (chosen.reshape(3, -1).sum(1) == np.ceil(40 * 56 * percent / 100)).all()


def test_inputs_have_the_dtype_the_layout_and_the_confidences():
    case = Case(SIZE, dtype="bfloat16", layout="channels_last")
    made = inputs.make_inputs(case, "cpu")
    assert made.pred.requires_grad
    assert made.pred.is_leaf
    assert made.pred.is_contiguous(memory_format=torch.channels_last)
    assert made.target.dtype is torch.bfloat16
    assert torch.equal(made.target[:, -1] > 0, torch.from_numpy(made.chosen))


def test_a_batch_has_its_shares_of_positive_and_ignored_cells():
    pred, target = inputs.make_batch((4, 3, 100, 100), positives=0.2, ignored=0.1)
    assert pred.requires_grad
    confidence = target[:, -1]
    assert (confidence == 1).double().mean() == pytest.approx(0.2, abs=0.01)
    assert (confidence == -1).double().mean() == pytest.approx(0.1, abs=0.01)
    assert ((confidence == 0) | (confidence == 1) | (confidence == -1)).all()


def test_a_large_batch_is_drawn_alike(monkeypatch):
    """What is drawn on the device, in its dtype, has the same shares and spread."""
    monkeypatch.setattr(inputs, "_DRAWN_ON_THE_CPU", 10)
    pred, target = inputs.make_batch((4, 3, 100, 100), positives=0.2, dtype=torch.bfloat16)
    assert pred.dtype is target.dtype is torch.bfloat16
    assert (target[:, -1] > 0).double().mean() == pytest.approx(0.2, abs=0.01)
    assert pred.detach().double().std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("text", ["some", "clustered", "scattered:x", "scattered:", "first:-1"])
def test_a_bad_pattern_is_named(text):
    with pytest.raises(ValueError, match="a pattern is none, all"):
        inputs.choose(text, (1, 4, 4))


def test_a_case_is_named_by_what_is_not_ordinary():
    assert Case(SIZE).label == "(2, 7, 64, 64), 2 % clustered"
    case = Case(SIZE, "none", "float16", "channels_last")
    assert case.label == "(2, 7, 64, 64), none positive, float16, channels-last"
    masked = Case((2, 9, 4), "first:60", weight_shape=(2, 9, 1))
    assert masked.label == "(2, 9, 4), mask (2, 9, 1), 60 % count"
