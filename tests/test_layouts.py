"""Any strides, any alignment, any number of dimensions; the gradient in pred's memory format."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss

import fcrn_fused

SETTINGS = {"negative_weight": 0.3, "coord_weight": 1.7, "ignore_value": -1.0}


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The channels innermost, in any number of dimensions."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Dense, but every dimension the other way round."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def batch_innermost(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    """A slice with a step of 2 in the last dimension, with poison between."""
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    store = tensor.new_full(shape, torch.nan)
    store[..., ::2] = tensor
    return store[..., ::2]


def every_third_image(tensor: torch.Tensor) -> torch.Tensor:
    store = tensor.new_full((3 * tensor.shape[0], *tensor.shape[1:]), torch.nan)
    store[1::3] = tensor
    return store[1::3]


def cut_from_more_maps(tensor: torch.Tensor) -> torch.Tensor:
    """Some maps of a head with more: the images are further apart than they are long."""
    maps = tensor.shape[1]
    store = tensor.new_full((tensor.shape[0], maps + 5, *tensor.shape[2:]), torch.nan)
    store[:, 2 : 2 + maps] = tensor
    return store[:, 2 : 2 + maps]


def padded_rows(tensor: torch.Tensor) -> torch.Tensor:
    store = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
    store[..., 1:-2] = tensor
    return store[..., 1:-2]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, but one element past the alignment of the allocator."""
    store = tensor.new_full((tensor.numel() + 1,), torch.nan)
    store[1:] = tensor.reshape(-1)
    return store[1:].view(tensor.shape)


def misaligned_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return misaligned(tensor.movedim(1, -1).contiguous()).movedim(-1, 1)


def cut_from_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Some maps of a channels-last head with more: cells are further apart than C."""
    return cut_from_more_maps_of(channels_last, tensor)


def cut_from_more_maps_of(
    layout: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
) -> torch.Tensor:
    maps = tensor.shape[1]
    wide = tensor.new_full((tensor.shape[0], maps + 2, *tensor.shape[2:]), torch.nan)
    store = layout(wide)
    store[:, 1:-1] = tensor
    return store[:, 1:-1]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "transposed": transposed,
    "batch_innermost": batch_innermost,
    "every_second": every_second,
    "every_third_image": every_third_image,
    "cut_from_more_maps": cut_from_more_maps,
    "cut_from_channels_last": cut_from_channels_last,
    "padded_rows": padded_rows,
    "misaligned": misaligned,
    "misaligned_channels_last": misaligned_channels_last,
}
DENSE = ("contiguous", "channels_last", "transposed", "batch_innermost", "misaligned")


def check(
    impl: Implementation, pred: torch.Tensor, target: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Loss, stats and both gradients against the loops; returns the gradient of pred."""
    pred = pred.detach().requires_grad_()
    target = target.detach().requires_grad_()
    settings = {**SETTINGS, "reduction": reduction}
    loss, stats = impl.loss(pred, target, return_stats=True, **settings)
    truth = oracle.fcrn_loss(pred, target, grad_output=0.5, **settings)
    assert_loss(loss, truth.loss, loss.dtype)
    assert_loss(stats.coord, truth.coord, loss.dtype)
    assert stats.num_positive.item() == truth.num_positive
    grad_pred, grad_target = torch.autograd.grad(0.5 * loss.sum(), (pred, target))
    assert_gradient(grad_pred, truth.grad, pred.dtype)
    assert_gradient(grad_target, -truth.grad, target.dtype)
    return grad_pred


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_layout_for_both(impl: Implementation, name: str, reduction: str) -> None:
    pred, target = make_batch((2, 7, 3, 13), device=impl.device, ignored=0.2, requires_grad=False)
    pred, target = LAYOUTS[name](pred), LAYOUTS[name](target)
    if name not in ("contiguous", "misaligned"):
        assert not pred.is_contiguous()
    grad = check(impl, pred, target, reduction)
    if name in DENSE:
        assert grad.stride() == pred.stride()


@pytest.mark.parametrize(
    ("pred_layout", "target_layout"),
    [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair[0] != pair[1]],
    ids=str,
)
def test_mixed_layouts(impl: Implementation, pred_layout: str, target_layout: str) -> None:
    pred, target = make_batch((2, 4, 3, 5), device=impl.device, ignored=0.2, requires_grad=False)
    pred, target = LAYOUTS[pred_layout](pred), LAYOUTS[target_layout](target)
    grad = check(impl, pred, target)
    if pred_layout in DENSE:
        assert grad.stride() == pred.stride()


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 7, 4, 6), torch.channels_last),
        ((2, 7, 3, 4, 2), torch.channels_last_3d),
        ((2, 7, 4, 6), torch.contiguous_format),
        ((2, 7, 3, 4, 2), torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradient_has_the_memory_format_of_pred(
    impl: Implementation,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    """Whatever target's format is, and whether the gradient is accumulated or returned."""
    pred, target = make_batch(shape, device=impl.device, dtype=dtype, requires_grad=False)
    pred = pred.contiguous(memory_format=memory_format)
    other = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for target_format in (torch.contiguous_format, other):
        grad = check(impl, pred, target.contiguous(memory_format=target_format), reduction)
        assert grad.is_contiguous(memory_format=memory_format)
        leaf = pred.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = impl.loss(leaf, target.contiguous(memory_format=target_format), reduction=reduction)
        loss.sum().backward(retain_graph=True)
        assert leaf.grad.is_contiguous(memory_format=memory_format)
        # the second one is computed afresh
        (again,) = torch.autograd.grad(loss.sum(), leaf)
        assert again.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 7),
        (1, 1),
        (4, 1),
        (2, 7, 9),
        (1, 7, 1, 1),
        (2, 7, 1, 5),
        (2, 7, 5, 1),
        (2, 7, 13, 13),
        (1, 7, 31, 33),
        (3, 2, 1, 1, 17),
        (2, 3, 2, 3, 2, 3),
        (2, 3, 1, 2, 1, 2, 1, 2),
        (1, 2, *(2,) * 8),
        (17, 7, 4, 4),
        (2, 40, 3, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "misaligned"])
def test_shapes(impl: Implementation, shape: tuple[int, ...], layout: str) -> None:
    pred, target = make_batch(shape, device=impl.device, ignored=0.2, requires_grad=False)
    check(impl, LAYOUTS[layout](pred), LAYOUTS[layout](target))


@pytest.mark.parametrize("dims", [8, 9, 10, 11, 14])
@pytest.mark.parametrize("where", ["pred", "target", "both"])
def test_many_dimensions_that_do_not_lie_in_memory_as_one(
    impl: Implementation, where: str, dims: int
) -> None:
    """Every second element in every dimension, in reverse order of memory."""
    shape = (2, 2, *(2,) * (dims - 2))
    pred, target = make_batch(shape, device=impl.device, ignored=0.2, requires_grad=False)

    def scattered(tensor: torch.Tensor) -> torch.Tensor:
        store = tensor.new_full([3] * dims, torch.nan)
        view = store[(slice(0, 3, 2),) * dims].permute(tuple(reversed(range(dims))))
        return view.copy_(tensor)

    if where != "target":
        pred = scattered(pred)
    if where != "pred":
        target = scattered(target)
    for reduction in ("mean", "cell", "none"):
        check(impl, pred, target, reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", range(8))
def test_odd_planes_at_every_alignment(
    impl: Implementation, offset: int, dtype: torch.dtype
) -> None:
    """13 x 13: every other map starts off any vector's boundary, and so may the first."""
    pred, target = make_batch((2, 7, 13, 13), dtype=dtype, device=impl.device, requires_grad=False)
    store = pred.new_full((pred.numel() + offset,), torch.nan)
    store[offset:] = pred.reshape(-1)
    pred = store[offset:].view(target.shape)
    assert pred.data_ptr() == store.data_ptr() + offset * store.element_size()
    check(impl, pred, target)


def test_every_length_of_a_row(impl: Implementation) -> None:
    """Tails of every length behind whole vectors and sectors."""
    for width in range(1, 70):
        pred, target = make_batch((2, 3, width), device=impl.device, ignored=0.1, seed=width)
        check(impl, pred, target)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (2, 3), (0, 2, 3), (0, 1, 2, 3)], ids=str)
def test_expanded_targets(impl: Implementation, dims: tuple[int, ...]) -> None:
    pred, target = make_batch((3, 4, 2, 5), device=impl.device, requires_grad=False)
    for dim in dims:
        target = target.narrow(dim, target.shape[dim] - 1, 1)
    target = target.expand(pred.shape)
    assert any(stride == 0 for stride in target.stride())
    for reduction in REDUCTIONS:
        check(impl, pred, target, reduction)


def test_expanded_predictions(impl: Implementation) -> None:
    """A prediction of one image against many targets: its gradient is the sum over them."""
    pred, target = make_batch((3, 4, 2, 5), device=impl.device, requires_grad=False)
    one = pred[:1].clone().requires_grad_()
    impl.loss(one.expand(3, -1, -1, -1), target, **SETTINGS).backward()
    truth = oracle.fcrn_loss(one.expand(3, -1, -1, -1), target, **SETTINGS)
    want = torch.from_numpy(truth.grad.sum(0, keepdims=True).astype("float32"))
    torch.testing.assert_close(one.grad.cpu(), want)


def test_overlapping_windows(impl: Implementation) -> None:
    """Strides that let elements share memory, as sliding windows do."""
    line = torch.randn(200, generator=torch.Generator().manual_seed(3)).to(impl.device)
    pred = line.as_strided((3, 4, 5, 6), (7, 13, 2, 1))
    target = line.abs().as_strided((3, 4, 5, 6), (1, 2, 3, 4), 11)
    check(impl, pred, target)


def test_a_head_with_anchors_is_read_through_views(impl: Implementation) -> None:
    """(B, A * C, H, W), as a YOLO head has it: the anchors become a dimension of space."""
    generator = torch.Generator().manual_seed(4)
    head = torch.randn((2, 3 * 7, 4, 5), generator=generator).to(impl.device).requires_grad_()
    _, target = make_batch((2, 7, 3, 4, 5), device=impl.device)
    pred = head.view(2, 3, 7, 4, 5).transpose(1, 2)
    assert pred.data_ptr() == head.data_ptr()
    loss = impl.loss(pred, target, **SETTINGS)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target, **SETTINGS)
    assert_loss(loss, truth.loss, torch.float32)
    want = truth.grad.swapaxes(1, 2).reshape(head.shape)
    assert_gradient(head.grad, want, torch.float32)


def test_a_target_with_the_confidence_of_one_tensor_and_the_pose_of_another(
    impl: Implementation,
) -> None:
    """pred and target of different strides in every dimension at once, and of different dtypes."""
    pred, target = make_batch((4, 5, 6, 7), device=impl.device, requires_grad=False)
    pred = pred.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    target = target.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1)
    check(impl, pred.half(), target.double())


def test_size_one_dimensions_with_odd_strides(impl: Implementation) -> None:
    """A dimension of size 1 may have any stride; it says nothing about the format."""
    store = torch.randn(1, 7, 1, 33, device=impl.device)
    pred = store.as_strided((1, 7, 1, 33), (99999, 33, 12345, 1))
    _, target = make_batch((1, 7, 1, 33), device=impl.device)
    check(impl, pred, target)
    check(impl, pred.as_strided((1, 7, 1, 1), (1, 1, 77, 88)), target[..., :1])


def test_non_contiguous_grad_outputs(impl: Implementation) -> None:
    """What comes from above may be expanded, transposed or channels-last."""
    for reduction in ("cell", "none"):
        pred, target = make_batch((2, 3, 4, 5), device=impl.device, ignored=0.2)
        loss = impl.loss(pred, target, reduction=reduction, **SETTINGS)
        upstream = [
            transposed(torch.randn_like(loss)),
            torch.randn_like(loss)[..., :1].expand(loss.shape),
            torch.randn((), device=impl.device).expand(loss.shape),
            every_second(torch.randn_like(loss)),
        ]
        if reduction == "none":
            upstream.append(channels_last(torch.randn_like(loss)))
        for grad_output in upstream:
            (grad,) = torch.autograd.grad(loss, pred, grad_output, retain_graph=True)
            truth = oracle.fcrn_loss(
                pred, target, reduction=reduction, grad_output=grad_output, **SETTINGS
            )
            assert_gradient(grad, truth.grad, torch.float32)


def test_more_dimensions_than_the_kernels_take(
    fused: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous they are one; else plain PyTorch serves, and "fused" says why it cannot."""
    shape = (2, 1, *[2] * 17)
    target = torch.rand(shape, device=fused.device)
    contiguous = torch.randn(shape, device=fused.device)
    fused.loss(contiguous, target, **SETTINGS)  # served

    awkward = contiguous.permute(0, 1, *reversed(range(2, 19)))
    with pytest.raises(RuntimeError, match="more than 18 dimensions"):
        fused.loss(awkward, target, **SETTINGS)
    monkeypatch.setattr(fcrn_fused.functional, "_warned", False)
    with pytest.warns(RuntimeWarning, match="more than 18 dimensions"):
        loss = fcrn_fused.fcrn_loss(awkward, target, **SETTINGS)
    torch.testing.assert_close(
        loss, fcrn_fused.fcrn_loss(awkward, target, backend="reference", **SETTINGS)
    )
