"""The inputs of the benchmarks, and the bytes that each must move."""

import numpy as np
import pytest
import torch
import workloads
from workloads import Case


def case(pattern="clustered:2", dtype="float32", layout="contiguous", size=(2, 7, 64, 64)):
    return Case(size, workloads.parse_pattern(pattern), dtype, layout, 1)


def bytes_per_cell(pass_="step", device_type="cuda", pattern="none", **kind):
    its = case(pattern, **kind)
    batch, _, height, width = its.size
    positive = workloads.positive_cells(its.pattern, batch, height, width)
    return workloads.expected_bytes_per_cell(its, positive.reshape(batch, -1), pass_, device_type)


def test_bytes_without_positives_are_the_floor():
    assert bytes_per_cell() == 36
    assert bytes_per_cell(dtype="bfloat16") == 18
    assert bytes_per_cell(dtype="float16") == 22  # backward reads again
    assert bytes_per_cell("no_grad") == 8
    assert bytes_per_cell("no_grad", dtype="bfloat16") == 4


def test_bytes_with_positives_everywhere():
    assert bytes_per_cell(pattern="all") == 84
    assert bytes_per_cell("no_grad", pattern="all") == 56


def test_channels_last_reads_every_map_whatever_the_pattern():
    assert bytes_per_cell(layout="channels_last") == 84
    assert bytes_per_cell("no_grad", layout="channels_last") == 56


def test_a_float16_forward_writes_no_gradient():
    assert bytes_per_cell("forward", dtype="float16") == 4
    assert bytes_per_cell("forward", dtype="float32") == 36


def test_a_grad_output_that_is_not_1_costs_12_bytes_more():
    assert bytes_per_cell("scaled") == 48
    assert bytes_per_cell("scaled", dtype="float16") == 22


def test_scattered_positives_touch_one_sector_in_seven():
    size = (16, 7, 256, 256)
    share = 1 - 0.98**8
    assert bytes_per_cell(pattern="scattered:2", size=size) == pytest.approx(36 + 48 * share, 0.01)
    half = 1 - 0.98**16
    got = bytes_per_cell(pattern="scattered:2", dtype="bfloat16", size=size)
    assert got == pytest.approx(18 + 24 * half, 0.01)


def test_clustered_positives_touch_few_sectors():
    assert 36 < bytes_per_cell(pattern="clustered:2", size=(4, 7, 256, 256)) < 38.5


def test_a_cache_line_of_the_cpu_holds_twice_as_many_cells():
    size = (16, 7, 256, 256)
    expected = 36 + 48 * (1 - 0.98**16)
    got = bytes_per_cell(device_type="cpu", pattern="scattered:2", size=size)
    assert got == pytest.approx(expected, 0.01)


def test_touched_share_counts_a_sector_that_is_cut_off():
    positive = np.zeros((1, 10), dtype=bool)
    positive[0, 9] = True
    assert workloads.touched_share(positive, 8) == 0.5


@pytest.mark.parametrize("kind", workloads.KINDS)
@pytest.mark.parametrize("percent", [0.5, 2, 50])
def test_the_share_is_met_in_every_image(kind, percent):
    positive = workloads.positive_cells(workloads.Pattern(kind, percent), 3, 40, 56)
    wanted = np.ceil(40 * 56 * percent / 100)
    counts = positive.reshape(3, -1).sum(1)
    assert (counts == wanted).all()


def test_inputs_have_the_dtype_the_layout_and_the_confidences():
    inputs = workloads.make_inputs(
        case(dtype="bfloat16", layout="channels_last"), torch.device("cpu")
    )
    assert inputs.pred.requires_grad
    assert inputs.pred.is_leaf
    assert inputs.pred.is_contiguous(memory_format=torch.channels_last)
    assert inputs.target.dtype is torch.bfloat16
    confidence = inputs.target[:, -1].reshape(2, -1) > 0
    assert torch.equal(confidence, torch.from_numpy(inputs.positive))


@pytest.mark.parametrize("text", ["64x7x128", "64x7x0x16", "axbxcxd", "64x7x-1x3", ""])
def test_a_bad_size_is_named(text):
    with pytest.raises(ValueError, match="a size is BxCxHxW"):
        workloads.parse_size(text)


@pytest.mark.parametrize(
    "text", ["some", "clustered", "clustered:200", "scattered:x", "scattered:"]
)
def test_a_bad_pattern_is_named(text):
    with pytest.raises(ValueError, match="a pattern is none, all"):
        workloads.parse_pattern(text)


@pytest.mark.parametrize("pattern", ["none", "all", "clustered:2", "scattered:12.5"])
def test_a_case_survives_json(pattern):
    its = case(pattern)
    assert Case.from_json(its.as_json()) == its
