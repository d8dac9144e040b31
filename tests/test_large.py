"""More than 2^31 elements: offsets and counts that 32 bits do not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from implementations import Implementation

GIB = 2**30


def needs_memory(device: str, gib: float) -> None:
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / GIB
    else:
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():
            pytest.skip("the free memory of this system is not known")
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) / 2**20
    if free < gib:
        pytest.skip(f"{gib:.1f} GiB of free memory needed, {free:.1f} are there")


def zeros(shape: tuple[int, ...], device: str) -> torch.Tensor:
    """bfloat16 zeros; on the CPU pages that take no memory before they are written."""
    if device == "cuda":
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


CHANNELS, CELLS = 64, 2**25 + 64  # many maps, so that most of them are those of negative cells


@pytest.mark.parametrize("reduction", ["sum", "positive", "mean"])
def test_expanded_tensors(fused: Implementation, reduction: str) -> None:
    """2^31 + some elements that take no memory: images and cells of stride 0."""
    shape = (9, 2000, 2**17)
    pred = torch.zeros((1, shape[1], 1), device=fused.device)
    target = torch.zeros_like(pred)
    pred[0, -1] = 0.5
    pred, target = pred.expand(shape), target.expand(shape)
    assert pred.numel() > 2**31
    with torch.no_grad():
        loss, stats = fused.loss(pred, target, reduction=reduction, return_stats=True)
    want = 9 * 2**17 * 0.25
    assert stats.negative_conf.item() == want
    assert loss.item() == pytest.approx(want / (pred.numel() if reduction == "mean" else 1))
    assert stats.num_positive.item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_tensor_whose_end_lies_beyond_2_to_the_31(fused: Implementation, layout: str) -> None:
    """Positive cells at both ends of 4.3 GB: an offset of 32 bits would miss the last."""
    needs_memory(fused.device, 12 if fused.device == "cuda" else 3)
    if layout == "contiguous":
        pred, target = (zeros((1, CHANNELS, CELLS), fused.device) for _ in range(2))
    else:
        pred, target = (zeros((1, CELLS, CHANNELS), fused.device).transpose(1, 2) for _ in range(2))
    assert pred.numel() > 2**31
    for cell in (0, CELLS - 1):
        pred[0, :, cell] = torch.arange(1, CHANNELS + 1, device=fused.device).bfloat16()
        target[0, -1, cell] = 1
    pred[0, -1, CELLS - 2] = 3
    with torch.no_grad():
        loss, stats = fused.loss(pred, target, reduction="sum", return_stats=True)
    assert stats.num_positive.item() == 2
    assert stats.coord.item() == 2 * sum(j**2 for j in range(1, CHANNELS))
    assert stats.positive_conf.item() == 2 * 63**2
    assert stats.negative_conf.item() == 9
    assert loss.item() == sum(part.item() for part in stats[:3])


@pytest.mark.slow
def test_the_gradient_of_more_than_2_to_the_31_elements(fused: Implementation) -> None:
    needs_memory(fused.device, 16)
    pred, target = (zeros((1, CHANNELS, CELLS), fused.device) for _ in range(2))
    for cell in (0, CELLS - 1):
        pred[0, :, cell] = 2
        target[0, -1, cell] = 1
    pred[0, -1, CELLS // 2] = 3
    pred.requires_grad_()
    loss = fused.loss(pred, target, reduction="sum")
    assert loss.item() == 2 * (63 * 4 + 1) + 9
    (grad,) = torch.autograd.grad(2 * loss, pred)
    for cell in (0, CELLS - 1):
        assert grad[0, :-1, cell].tolist() == [8.0] * 63
        assert grad[0, -1, cell].item() == 4
    assert grad[0, -1, CELLS // 2].item() == 12
    assert grad[0, :, 1:9].count_nonzero() == 0
    assert grad[0, :, -9:-1].count_nonzero() == 0


def test_offsets_beyond_32_bits_in_a_small_tensor(impl: Implementation) -> None:
    """Strides that jump over 2^31 elements between two images: few elements, large offsets."""
    needs_memory(impl.device, 8 if impl.device == "cuda" else 1)
    jump = 2**31 + 8
    store = zeros((jump + 64,), impl.device)
    pred = store.as_strided((2, 3, 4), (jump, 4, 1))
    pred[0] = 1
    pred[1] = 2
    target = torch.zeros((2, 3, 4), dtype=torch.bfloat16, device=impl.device)
    target[:, -1, :2] = 1
    with torch.no_grad():
        loss = impl.loss(pred, target, reduction="none")
    assert loss[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert loss[1].tolist() == [[4, 4, 0, 0], [4, 4, 0, 0], [1, 1, 4, 4]]
