"""Inputs of the loss for the CUDA kernels on the host, and what must come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cuda_on_host.passes import (
    CONTIGUOUS,
    SCHEDULES,
    Layout,
    Pass,
    Schedule,
    each_once,
    placed,
    run,
    same_bits,
)
from tolerances import assert_gradient, loss_dtype
from torch import Tensor

from fcrn_fused import reference
from fcrn_fused.reductions import COUNT_POSITIVE, DIVISORS, OUTPUTS

REDUCTIONS = tuple(DIVISORS)

# The pairs that have vector kernels; the others go element by element.
VECTOR_PAIRS = {
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
}
_DENSE = ("contiguous", "channels_last", "transposed")
_LOSS_RTOL = {torch.float64: 1e-13, torch.float32: 1e-6}  # the reference rounds too
IGNORE_VALUE = -1.0
THREADS = 256  # of a block, as the kernels' kThreads
BLOCKS_PER_MULTIPROCESSOR = 8


@dataclass(frozen=True)
class Case:
    """A batch and the settings of its loss; the defaults take the vector path in several blocks."""

    shape: tuple[int, ...] = (2, 7, 16, 16)  # (B, C, *S)
    pred_dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.float32
    pred_layout: Layout = CONTIGUOUS
    target_layout: Layout = CONTIGUOUS
    reduction: str = "mean"
    positives: str = "clustered"  # or scattered, none, all
    ignored: bool = True
    negative_weight: float | str = 0.01  # "tensor": a tensor in memory
    coord_weight: str = "each"  # or one, tensor
    multiprocessors: int = 2
    seed: int = 0

    def __str__(self) -> str:
        dtypes = "-".join(
            str(dtype).removeprefix("torch.") for dtype in (self.pred_dtype, self.target_dtype)
        )
        layouts = "-".join(
            layout.name + (f"+{layout.misaligned_by}" if layout.misaligned_by else "")
            for layout in (self.pred_layout, self.target_layout)
        )
        shape = "x".join(map(str, self.shape))
        kinds = self.positives + ("" if self.ignored else "-none_ignored")
        return (
            f"{self.reduction}-{shape}-{dtypes}-{layouts}-{kinds}"
            f"-{self.coord_weight}-{self.negative_weight}-{self.multiprocessors}-{self.seed}"
        )

    @property
    def sum_dtype(self) -> torch.dtype:
        return loss_dtype(self.pred_dtype, self.target_dtype)

    @property
    def has_one_loss(self) -> bool:
        return self.reduction not in OUTPUTS


class Batch:
    """The tensors of a case, and the passes over them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        batch, maps, *spatial = case.shape
        pred = torch.randn(case.shape, generator=generator, dtype=torch.float64)
        target = torch.randn(case.shape, generator=generator, dtype=torch.float64)
        self.positive = _positives(case, generator)  # (B, *S)
        chosen = torch.rand((batch, *spatial), generator=generator)
        self.ignored = ~self.positive & (chosen < 0.2) & case.ignored
        confidence = self.positive * (0.25 + 0.75 * chosen) + self.ignored * IGNORE_VALUE
        if case.target_layout.name == "expanded" and batch:
            self.positive, self.ignored, confidence = (
                each[:1].expand_as(each) for each in (self.positive, self.ignored, confidence)
            )
            target = target[:1].expand_as(target).clone()
        target[:, -1] = confidence
        # Elements that are not part of the computation hold what would spoil it.
        masked = ~self.positive.unsqueeze(1).expand(case.shape).clone()
        masked[:, -1] = self.ignored
        self.masked = masked
        pred[masked] = math.nan
        target[:, :-1][masked[:, :-1]] = math.inf
        self.pred = placed(pred.to(case.pred_dtype), case.pred_layout)
        self.target = placed(target.to(case.target_dtype), case.target_layout)

        weights = [0.5 + 0.3 * i for i in range(maps - 1)]
        self.coord_weight: float | Sequence[float] | Tensor = {
            "one": 1.7,
            "each": weights,
            "tensor": torch.tensor(weights, dtype=torch.float32),
        }[case.coord_weight]
        self.negative_weight: float | Tensor = (
            torch.tensor(0.01, dtype=torch.float32)
            if isinstance(case.negative_weight, str)
            else case.negative_weight
        )
        # What backward is given: nowhere 1, and another for each element of the loss.
        loss_shape = {
            "cell": (batch, *spatial),
            "none": case.shape,
        }.get(case.reduction, ())
        self.grad_output = torch.randn(loss_shape, generator=generator).to(case.sum_dtype)
        if case.reduction == "none":
            self.grad_output = placed(self.grad_output, self._dense_layout())

    # ---- the passes -----------------------------------------------------------------------------

    def forward(self, *, want_grad: bool = True, want_stats: bool = True) -> Pass:
        """The pass of `run_forward` (fcrn_fused/ops.py)."""
        case = self.case
        result = self._pass()
        self._read_pair(result)
        if not case.has_one_loss:
            per_cell = case.reduction == "cell"
            layout = CONTIGUOUS if per_cell else self._dense_layout()
            result.write("errors", case.sum_dtype, layout, per_cell=per_cell)
        else:
            result.write("loss", case.sum_dtype)
        if want_stats:
            for name in ("coord", "positive_conf", "negative_conf"):
                result.write(name, case.sum_dtype)
        if want_stats or result.divisor == COUNT_POSITIVE:
            result.write("num_positive", torch.int64)
        if want_grad:
            result.write("grad", case.pred_dtype, self._dense_layout())
        self._forbid_masked(result)
        return result

    def backward(
        self,
        *,
        wrt_target: bool = False,
        grad_output: Tensor | None = None,
        rescaled: Tensor | None = None,
    ) -> Pass:
        """That of `run_backward`, which widens a pair of dtypes for the gradient of target."""
        result = self._pass()
        result.wrt_target = wrt_target
        self._read_pair(result, widened=wrt_target and self.pred.dtype != self.target.dtype)
        result.read("grad_output", self.grad_output if grad_output is None else grad_output)
        if result.divisor == COUNT_POSITIVE:
            result.read("known_positive", self.positive.sum())
        if rescaled is None:
            dtype = result.buffers["pred"].dtype
            result.write("grad", dtype, self._dense_layout(wrt_target))
        else:
            result.grad_is_for_one = True
            result.read("grad", rescaled, written=True)
        self._forbid_masked(result)
        return result

    def _pass(self) -> Pass:
        case = self.case
        return Pass(
            case.shape,
            output=OUTPUTS.get(case.reduction, 0),
            divisor=DIVISORS[case.reduction](self.pred),
            negative_weight=self.negative_weight,
            positive_weight=1.5,
            coord_weight=self.coord_weight,
            ignore_value=IGNORE_VALUE if case.ignored else None,
            multiprocessors=case.multiprocessors,
        )

    def _read_pair(self, result: Pass, *, widened: bool = False) -> None:
        for name, tensor, layout in (
            ("pred", self.pred, self.case.pred_layout),
            ("target", self.target, self.case.target_layout),
        ):
            if widened:
                layout = self._dense_layout(name == "target")
                tensor = placed(tensor.to(self.case.sum_dtype), layout)
            result.read(name, tensor, layout.misaligned_by)
        for name, weight in (
            ("negative_weight", self.negative_weight),
            ("coord_weights", self.coord_weight),
        ):
            if isinstance(weight, Tensor):
                result.read(name, weight)

    def _dense_layout(self, of_target: bool = False) -> Layout:
        """The layout of torch.empty_like: a tensor's own where it fills its memory."""
        layout = self.case.target_layout if of_target else self.case.pred_layout
        return Layout(layout.name if layout.name in _DENSE else "contiguous")

    # ---- what may be read ------------------------------------------------------------------------

    def kernel(self, result: Pass) -> str:
        """The kernel that must serve a pass: planar, interleaved or strided; "" for any."""
        if self.pred.numel() == 0:
            return ""
        dtypes = (result.buffers["pred"].dtype, result.buffers["target"].dtype)
        if result.wide_index or dtypes not in VECTOR_PAIRS:
            return "strided"
        width = 16 // min(dtype.itemsize for dtype in dtypes)
        batch, maps, *spatial = self.case.shape
        cells = math.prod(spatial)
        views = [name for name in ("pred", "target", "grad", "errors") if name in result.views]
        grad_output_per_cell = "grad_output" in result.views
        if grad_output_per_cell:
            views.append("grad_output")
        planar = interleaved = True
        for name in views:
            buffer = result.buffers[name]
            strides, without_maps = result.views[name]
            if buffer.misaligned_by % 16:
                return "strided"
            contiguous = CONTIGUOUS.strides(spatial)
            along = list(strides[1 if without_maps else 2 :])
            outer = [strides[0]] if batch > 1 else []
            outer += [strides[1]] if maps > 1 and not without_maps else []
            of_cells = [s for s, size in zip(along, spatial, strict=True) if size > 1]
            of_plane = [s for s, size in zip(contiguous, spatial, strict=True) if size > 1]
            planar &= of_cells == of_plane
            planar &= all(stride * buffer.dtype.itemsize % 16 == 0 for stride in outer)
            interleaved &= not without_maps and maps > 1
            interleaved &= strides == Layout("channels_last").strides(self.case.shape)
        cells_at_once = self._merged_cells(result, views)
        if planar and cells_at_once % width == 0:
            return "planar"
        interleaved &= not grad_output_per_cell and self.case.reduction != "cell"
        if interleaved and batch * cells * maps % width == 0:
            return "interleaved"
        return "strided"

    def blocks(self, result: Pass) -> int:
        """How many blocks must share a pass: one thread for each piece of work, up to a limit."""
        kernel = self.kernel(result)
        cells = self.positive.numel()
        width = 16 // min(result.buffers[name].dtype.itemsize for name in ("pred", "target"))
        work = {
            "planar": cells // width,
            "interleaved": cells * self.case.shape[1] // width,
        }.get(kernel, cells)
        return min(
            max(1, -(-work // THREADS)), self.case.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        )

    def _merged_cells(self, result: Pass, views: Sequence[str]) -> int:
        """Cells of a plane, which for C = 1 may be those of the whole batch."""
        spatial = math.prod(self.case.shape[2:])
        strides = [result.views[name][0] for name in views]
        return spatial * self.case.shape[0] if all(s[0] == spatial for s in strides) else spatial

    def _forbid_masked(self, result: Pass) -> None:
        """No thread may read a masked pose element, unless 16 bytes hold a positive one too."""
        kernel = self.kernel(result)
        if kernel == "interleaved":
            return
        unread = ~self.positive  # (B, *S)
        if kernel == "planar":
            names = ("pred", "target")
            width = 16 // min(result.buffers[name].dtype.itemsize for name in names)
            rows = unread.reshape(-1, width) if unread.numel() else unread.reshape(-1, 1)
            unread = rows.all(1, keepdim=True).expand_as(rows).reshape(unread.shape)
        for name in ("pred", "target", "grad_output"):
            if name not in result.views or result.views[name][1]:
                continue
            strides = result.views[name][0]
            forbidden = torch.zeros(result.buffers[name].elements, dtype=torch.bool)
            view = each_once(forbidden.as_strided(self.case.shape, strides))
            view[:, :-1] = unread.unsqueeze(1)[: len(view)]
            result.forbid(name, forbidden)

    # ---- what must come out ----------------------------------------------------------------------

    def expected(self, grad_output: Tensor | float) -> dict[str, Tensor]:
        """By the reference in float64: loss or errors, stats, and dloss/dpred for `grad_output`."""
        case = self.case
        pred, target = self.pred.double(), self.target.double()
        settings = {
            "negative_weight": self.negative_weight,
            "positive_weight": 1.5,
            "coord_weight": self.coord_weight,
            "ignore_value": IGNORE_VALUE if case.ignored else None,
            "reduction": case.reduction,
        }
        pred.requires_grad_()
        loss, stats = reference.fcrn_loss(pred, target, return_stats=True, **settings)
        scale = torch.as_tensor(grad_output, dtype=torch.float64).expand(loss.shape)
        (grad,) = torch.autograd.grad(loss, pred, scale)
        return {
            "loss" if case.has_one_loss else "errors": loss.detach(),
            **stats._asdict(),
            "grad": grad,
        }


def _positives(case: Case, generator: torch.Generator) -> Tensor:
    batch, _, *spatial = case.shape
    shape = (batch, *spatial)
    match case.positives:
        case "none":
            return torch.zeros(shape, dtype=torch.bool)
        case "all":
            return torch.ones(shape, dtype=torch.bool)
        case "scattered":
            return torch.rand(shape, generator=generator) < 0.1
        case _:  # one run of cells in each image
            cells = math.prod(spatial)
            chosen = torch.zeros((batch, cells), dtype=torch.bool)
            for image in range(batch if cells else 0):
                begin = int(torch.randint(cells, (), generator=generator))
                chosen[image, begin : begin + max(1, cells // 12)] = True
            return chosen.reshape(shape)


def assert_results(
    case: Case, got: dict[str, Tensor], want: dict[str, Tensor], result: Pass
) -> None:
    """Everything that the pass wrote is right; nothing of it is NaN that should not be."""
    for name, flat in got.items():
        buffer = result.buffers[name]
        if buffer.spread:
            value = flat.reshape(case.shape)
        elif name in result.views:
            value = flat.as_strided(want[name].shape, result.views[name][0])
        else:
            value = flat[0]
        expected = want[name]
        if name == "grad":
            allowed = expected.numpy().astype("longdouble")
            assert_gradient(value, allowed, buffer.dtype)
        elif name == "num_positive":
            assert value.item() == expected.item(), name
        else:
            torch.testing.assert_close(
                value.double(),
                expected,
                rtol=_LOSS_RTOL[case.sum_dtype],
                atol=torch.finfo(case.sum_dtype).tiny,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def check(
    case: Case,
    how: str = "plain",
    schedules: Sequence[Schedule] = SCHEDULES,
    *,
    wide_index: bool = False,
    **options: Any,
) -> set[str]:
    """Run the passes of a training step over a case, by every schedule, and check what they write.

    Forward with the gradient for 1; backward afresh, with respect to pred and to target; and the
    forward's gradient rescaled in place. Raises AssertionError (RunError for a reported fault);
    returns the names of the kernels that ran.
    """
    batch = Batch(case)
    kernels: set[str] = set()

    def outcome(result: Pass) -> dict[str, Tensor]:
        result.wide_index = wide_index
        done = run(result, how, schedules, **options)
        kernels.update(name.partition("(")[0] for name in done.kernels)
        kernel = f"{batch.kernel(result)}_kernel"
        assert all(kernel in name for name in done.kernels), (kernel, done.kernels)
        blocks = batch.blocks(result)
        assert all(name.endswith(f" in {blocks} blocks") for name in done.kernels), done.kernels
        for other in done.results[1:]:
            for name, value in done.results[0].items():
                assert same_bits(value, other[name]), f"{name} depends on the order of threads"
        return done.results[0]

    # The forward pass does not know how many cells are positive: the rescaling divides.
    undivided = max(1, int(batch.positive.sum())) if case.reduction == "positive" else 1
    for_one = batch.expected(float(undivided))
    forward = batch.forward()
    forward_results = outcome(forward)
    assert_results(case, forward_results, for_one, forward)

    for want_stats in (False, True):  # under no_grad
        for_nothing = batch.forward(want_grad=False, want_stats=want_stats)
        assert_results(case, outcome(for_nothing), for_one, for_nothing)

    wanted = batch.expected(batch.grad_output)["grad"]
    backward = batch.backward()
    backward_results = outcome(backward)
    assert_results(case, backward_results, {"grad": wanted}, backward)
    wrt_target = batch.backward(wrt_target=True)
    assert_results(case, outcome(wrt_target), {"grad": -wanted}, wrt_target)

    if not case.has_one_loss:
        return kernels
    rescaled = forward_results["grad"].as_strided(case.shape, forward.views["grad"][0])
    rescale = batch.backward(rescaled=rescaled)
    assert same_bits(outcome(rescale)["grad"], backward_results["grad"]), (
        "a rescaled gradient differs from one computed afresh"
    )
    one = batch.backward(rescaled=rescaled, grad_output=torch.ones((), dtype=case.sum_dtype))
    if undivided == 1:  # nothing is to be done, so nothing is read
        for name in ("pred", "target"):
            one.forbid(name, torch.ones(one.buffers[name].elements, dtype=torch.bool))
        assert same_bits(outcome(one)["grad"], forward_results["grad"]), "rescaled by 1"
    return kernels


def check_large(
    how: str = "plain",
    dtype: torch.dtype = torch.float16,
    *,
    shape: tuple[int, ...] = (2, 3, 16),
    strides: tuple[int, ...] = ((1 << 32) + 80, (1 << 31) + 8),
    kernel: str = "strided",
    **options: Any,
) -> None:
    """Tensors whose offsets do not fit 32 bits, of which few pages are in memory.

    `strides` are those of all dimensions but the last. With the default, the third map of an image
    lies 2^32 elements after the first: a 32-bit offset finds another map there. Raises as `check`.
    """
    case = Case(shape, dtype, reduction="none", positives="scattered", seed=3)
    batch = Batch(case)
    forward, backward = batch.forward(), batch.backward()
    wanted = batch.expected(1.0), batch.expected(batch.grad_output)
    last_offset = sum(
        (size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=True)
    )
    wide = last_offset >= 2**31 - 1
    for result, want in zip((forward, backward), wanted, strict=True):
        for name in result.views:
            result.spread(name, *strides)
        done = run(result, how, SCHEDULES[:1], **options)
        assert f"{kernel}_kernel" in done.kernels[0], done.kernels
        assert ("long" in done.kernels[0]) == wide, done.kernels
        assert_results(case, done.results[0], want, result)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _all_cases() -> list[Case]:
    """Every reduction, pair of dtypes, layout, misalignment and tail, with some of the rest."""
    cases = [Case(reduction=reduction) for reduction in DIVISORS]

    pairs = [(pred, target) for pred in DTYPES for target in DTYPES]
    for i, (pred, target) in enumerate(pairs):
        for reduction in (REDUCTIONS[i % 4], REDUCTIONS[4 + i % 2]):
            cases.append(Case(pred_dtype=pred, target_dtype=target, reduction=reduction, seed=i))
        if (pred, target) in VECTOR_PAIRS:
            for reduction in ("positive", "none"):
                cases.append(
                    Case((2, 7, 8, 8), pred, target, reduction=reduction, **both_channels_last())
                )

    names = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
    for i, pred in enumerate(names[:4]):
        for j, target in enumerate(names):
            reduction = REDUCTIONS[(i + 2 * j) % 6]
            dtype = (torch.float32, torch.bfloat16)[(i + j) % 2]
            layouts = {"pred_layout": Layout(pred), "target_layout": Layout(target)}
            cases.append(Case((3, 4, 8, 6), dtype, dtype, reduction=reduction, **layouts))
    for reduction in DIVISORS:
        cases.append(Case((2, 5, 6, 10), reduction=reduction, **both_channels_last()))

    for offsets in ((1, 0), (0, 1), (2, 2), (3, 4), (4, 8)):
        layouts = {
            "pred_layout": Layout(misaligned_by=offsets[0]),
            "target_layout": Layout(misaligned_by=offsets[1]),
        }
        cases.append(Case(reduction="mean", **layouts))
        cases.append(Case((2, 7, 8, 16), torch.float16, torch.float16, reduction="none", **layouts))
    both = {"pred_layout": Layout("channels_last", 2), "target_layout": Layout("channels_last", 2)}
    cases.append(Case(reduction="sum", **both))

    # Odd planes, and every remainder of the cells of an image by a vector, a warp and a block.
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases.append(Case((3, 7, 13, 13), dtype, dtype, reduction="positive"))
    for cells in (1, 2, 3, 4, 5, 7, 8, 12, 31, 32, 33, 127, 252, 255, 256, 257, 1020, 1024, 1028):
        cases.append(Case((1, 3, cells), reduction="sum", seed=cells))
    for cells in (8, 24, 2040, 2048, 2056):
        cases.append(Case((1, 3, cells), torch.float16, torch.float32, seed=cells))
    for padded in (Layout("padded"), Layout("padded", 3)):
        for reduction in ("mean", "none"):
            cases.append(Case((3, 2, 4, 8), reduction=reduction, pred_layout=padded))
            cases.append(Case((3, 2, 4, 8), reduction=reduction, target_layout=padded))
    for shape in ((2, 1, 8, 8), (5, 1, 3), (2, 2, 4, 4), (3, 7), (1, 7, 2, 2, 2, 2), (64, 2, 4)):
        for reduction in ("mean", "cell", "none"):
            cases.append(Case(shape, reduction=reduction))
    for shape in ((0, 7, 4, 4), (2, 7, 0, 4), (2, 1, 0), (0, 3)):
        for reduction in DIVISORS:
            cases.append(Case(shape, reduction=reduction))
    # The maps are not all weighted by numbers in the launch's own parameters.
    for coord_weight in ("one", "tensor"):
        cases.append(Case(coord_weight=coord_weight, negative_weight="tensor"))
        cases.append(
            Case((2, 3, 5, 5), torch.float16, coord_weight=coord_weight, negative_weight="tensor")
        )
    cases.append(Case((2, 41, 4, 4), coord_weight="tensor"))

    for positives in ("none", "scattered", "all"):
        for ignored in (False, True):
            cases.append(Case(positives=positives, ignored=ignored, reduction="positive"))
        half = torch.bfloat16
        cases.append(Case((2, 7, 5, 5), half, half, positives=positives, reduction="batchmean"))

    # More work than the grid has threads: each goes round several times. And one block for all.
    around = {"multiprocessors": 1, "positives": "scattered"}
    cases.append(Case((2, 3, 66, 64), torch.float64, torch.float64, **around))
    cases.append(Case((2, 3, 130, 64), **around))
    cases.append(Case((2, 3, 39, 33), reduction="none", **around))
    cases.append(Case((1, 2, 53, 67), torch.float16, torch.float32, reduction="cell", **around))
    cases.append(Case((1, 3, 76, 64), reduction="positive", **both_channels_last(), **around))
    cases.append(Case((2, 3, 64, 64), multiprocessors=132, reduction="batchmean"))
    return cases


def both_channels_last() -> dict[str, Layout]:
    return {"pred_layout": Layout("channels_last"), "target_layout": Layout("channels_last")}


CASES = tuple(dict.fromkeys(_all_cases()))
