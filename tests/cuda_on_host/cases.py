"""Inputs of the loss for the CUDA kernels on the host, and what must come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
from fcrn_fused.validation import make_masked_rule

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
TABLE = 256  # pose maps whose weights a block keeps


@dataclass(frozen=True)
class Case:
    """A batch and the settings of its loss; the defaults take the vector path in several blocks."""

    shape: tuple[int, ...] = (2, 7, 16, 16)  # (B, C, *S); without kinds any
    pred_dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.float32
    pred_layout: Layout = CONTIGUOUS
    target_layout: Layout = CONTIGUOUS
    reduction: str = "mean"
    positives: str = "clustered"  # or scattered, none, all
    ignored: bool = True
    negative_weight: float | str = 0.01  # "tensor": a tensor in memory
    coord_weight: str = "each"  # or one, tensor
    resident_blocks: int = 16
    seed: int = 0
    weight: tuple[int, ...] | None = None  # the shape of what the caller gives
    weight_dtype: torch.dtype = torch.float32
    weight_layout: Layout = CONTIGUOUS
    all_masked: bool = False
    positive: tuple[int, ...] | None = None  # the shape of what the caller gives
    has_kinds: bool = True  # no: that of masked_mse_loss
    grid: tuple[int, int] | None = None  # without kinds: its maps, and how many cells have a weight

    def __str__(self) -> str:
        dtypes = "-".join(
            str(dtype).removeprefix("torch.") for dtype in (self.pred_dtype, self.target_dtype)
        )
        layouts = f"{self.pred_layout}-{self.target_layout}"
        shape = "x".join(map(str, self.shape))
        given = ""
        if self.weight is not None:
            given += f"-weight{'x'.join(map(str, self.weight))}"
            given += f"-{self.weight_dtype}".replace("torch.", "") + "-all_masked" * self.all_masked
            given += f"-{self.weight_layout}" * (self.weight_layout != CONTIGUOUS)
        if self.positive is not None:
            given += f"-positive{'x'.join(map(str, self.positive))}"
        if not self.has_kinds:
            return f"masked-{self.reduction}-{shape}-{dtypes}-{layouts}{given}"
        kinds = self.positives + ("" if self.ignored else "-none_ignored")
        return (
            f"{self.reduction}-{shape}-{dtypes}-{layouts}-{kinds}"
            f"-{self.coord_weight}-{self.negative_weight}-{self.resident_blocks}-{self.seed}{given}"
        )

    @property
    def sum_dtype(self) -> torch.dtype:
        return loss_dtype(self.pred_dtype, self.target_dtype)

    @property
    def has_one_loss(self) -> bool:
        return self.reduction not in OUTPUTS

    @property
    def is_plain(self) -> bool:
        return self.has_kinds and self.weight is None and self.positive is None


class Batch:
    """The tensors of a case, and the passes over them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        pred = torch.randn(case.shape, generator=generator, dtype=torch.float64)
        target = torch.randn(case.shape, generator=generator, dtype=torch.float64)
        self.weight = self.given_positive = None
        # Which elements are part of the computation; and which weigh something by the caller.
        self.counted = torch.ones(case.shape, dtype=torch.bool)
        self.weighs = self.counted
        self.num_positive = torch.zeros((), dtype=torch.int64)
        if case.target_layout.name == "expanded":
            target = target[:1].expand_as(target).clone()
        if case.has_kinds:
            self._draw_kinds(target, generator)
        if case.weight is not None:
            self.weight = _weight(case, generator)
            self.weighs = (self.weight != 0).expand(case.shape)
            self.counted = self.counted & self.weighs
        # Elements that are not part of the computation hold what would spoil it.
        spoiled = ~self.counted
        pred[spoiled] = math.nan
        if case.has_kinds:
            self.num_positive = (self.positive & self.weighs[:, -1]).sum()
            # But target's confidences say which cells to ignore and, if nothing else does, which
            # are positive.
            spoiled[:, -1] &= ~self.ignored
            if case.positive is None:
                spoiled[:, -1] &= ~self.positive
            target[:, -1][spoiled[:, -1]] = math.nan
            target[:, :-1][spoiled[:, :-1]] = math.inf
        else:
            target[spoiled] = math.inf
        self.pred = placed(pred.to(case.pred_dtype), case.pred_layout)
        self.target = placed(target.to(case.target_dtype), case.target_layout)

        weights = [0.5 + 0.3 * i for i in range(case.shape[1] - 1 if case.has_kinds else 0)]
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
            "cell": (*case.shape[:1], *case.shape[2:]),
            "none": case.shape,
        }.get(case.reduction, ())
        self.grad_output = torch.randn(loss_shape, generator=generator).to(case.sum_dtype)
        if case.reduction == "none":
            self.grad_output = placed(self.grad_output, self._dense_layout())

    def _draw_kinds(self, target: Tensor, generator: torch.Generator) -> None:
        case = self.case
        positive = _positives(case, generator)  # (B, *S)
        chosen = torch.rand(positive.shape, generator=generator)
        ignored = ~positive & (chosen < 0.2) & case.ignored
        confidence = positive * (0.25 + 0.75 * chosen) + ignored * IGNORE_VALUE
        if case.positive is not None:  # the confidences say something else
            given = positive.unsqueeze(1)
            for dim, size in enumerate(case.positive):
                given = given.narrow(dim, 0, size)
            self.given_positive = placed(given, CONTIGUOUS).expand_as(positive.unsqueeze(1))
            ignored = (chosen < 0.2) & case.ignored
            positive = self.given_positive[:, 0] & ~ignored
            confidence = torch.where(ignored, IGNORE_VALUE, chosen - 0.6)
        if case.target_layout.name == "expanded" and len(target):
            positive, ignored, confidence = (
                each[:1].expand_as(each) for each in (positive, ignored, confidence)
            )
        target[:, -1] = confidence
        self.positive, self.ignored = positive, ignored
        self.counted = positive.unsqueeze(1).expand(case.shape).clone()
        self.counted[:, -1] = ~ignored

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
        want_stats &= case.has_kinds
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
            result.read("known_positive", self.num_positive)
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
        result = Pass(
            case.shape,
            case.has_kinds,
            output=OUTPUTS.get(case.reduction, 0),
            divisor=DIVISORS[case.reduction](self.pred),
            resident_blocks=case.resident_blocks,
        )
        if case.has_kinds:
            result.negative_weight = self.negative_weight
            result.positive_weight = 1.5
            result.coord_weight = self.coord_weight
            result.ignore_value = IGNORE_VALUE if case.ignored else None
        else:
            rule = make_masked_rule(self.weight, case.reduction)
            total = reference.weight_sum(self.pred, rule)
            if total is not None:
                result.read("known_divisor", total)
        return result

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
        if self.weight is not None:
            expanded = self.weight.expand(self.case.shape)
            result.read("weight", expanded, self.case.weight_layout.misaligned_by)
        if self.given_positive is not None:
            result.read("positive", self.given_positive.squeeze(1))

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
        if self.case.weight_dtype == torch.float64:
            return "strided"
        width = 16 // min(dtype.itemsize for dtype in dtypes)
        views = [name for name in result.views if name not in ("weight", "positive")]
        if not self.case.has_kinds:
            return "planar" if self._is_planar(result, views, width) else "strided"
        batch, maps, *spatial = self.case.shape
        if self.case.coord_weight != "one" and maps - 1 > TABLE:
            return "strided"
        cells = math.prod(spatial)
        grad_output_per_cell = "grad_output" in result.views
        planar, interleaved = True, self.case.is_plain
        for name in ("weight", "positive"):  # at any stride, but at one
            strides, without_maps = result.views.get(name, ((0,) * len(self.case.shape), False))
            along = [
                (stride, size)
                for stride, size in zip(strides[1 if without_maps else 2 :], spatial, strict=True)
                if size > 1
            ]
            planar &= all(outer == inner * size for (outer, _), (inner, size) in pairwise(along))
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
        interleaved &= width - 1 <= maps <= TABLE
        if interleaved and batch * cells * maps % width == 0:
            return "interleaved"
        return "strided"

    def _is_planar(self, result: Pass, views: Sequence[str], width: int) -> bool:
        """Whether a pass without kinds can be done in 16-byte units, by its grid."""
        grid = result.grid()
        is_planar = len(grid.cells) == 1 and grid.num_cells % width == 0
        for name in views:
            strides = (grid.images.strides[name], grid.maps.strides[name])
            buffer = result.buffers[name]
            is_planar &= buffer.misaligned_by % 16 == 0 and grid.cells[0].strides[name] == 1
            is_planar &= all(stride * buffer.dtype.itemsize % 16 == 0 for stride in strides)
        return is_planar

    def blocks(self, result: Pass) -> int:
        """How many blocks must share a pass: one thread for each piece of work, up to a limit."""
        kernel = self.kernel(result)
        grid = result.grid()
        cells = grid.images.size * grid.num_cells
        width = 16 // min(result.buffers[name].dtype.itemsize for name in ("pred", "target"))
        work = {
            "planar": cells // width,
            "interleaved": cells * grid.maps.size // width,
        }.get(kernel, cells)
        return min(max(1, -(-work // THREADS)), self.case.resident_blocks)

    def _merged_cells(self, result: Pass, views: Sequence[str]) -> int:
        """Cells of a plane, which for C = 1 may be those of the whole batch."""
        spatial = math.prod(self.case.shape[2:])
        strides = [result.views[name][0] for name in views]
        return spatial * self.case.shape[0] if all(s[0] == spatial for s in strides) else spatial

    def _forbid_masked(self, result: Pass) -> None:
        """No thread may read a masked element, unless 16 bytes hold one that counts too.

        But the confidences: all threads read that of target, the vector kernels both.
        """
        case, kernel = self.case, self.kernel(result)
        if kernel == "interleaved":
            return
        unread = ~self.counted
        if kernel == "planar" and case.has_kinds:
            # Where weights differ from map to map, they do not matter to what is read.
            of_cells = case.weight is None or case.weight == () or case.weight[1] == 1
            unread = ~(self.positive.unsqueeze(1) & (self.weighs if of_cells else True))
            unread = unread.expand(case.shape).clone()
            unread[:, -1] = False
        grid = result.grid()
        for name in ("pred", "target", "grad_output"):
            if name not in result.views or result.views[name][1]:
                continue
            strides = result.views[name][0]
            of_tensor = unread
            if name == "target" and case.has_kinds:
                of_tensor = unread.clone()
                of_tensor[:, -1] = False
            for dim, stride in enumerate(strides):
                if stride == 0:  # several elements are one
                    of_tensor = of_tensor.all(dim, keepdim=True)
            forbidden = torch.zeros(result.buffers[name].elements, dtype=torch.bool)
            each_once(forbidden.as_strided(case.shape, strides)).copy_(of_tensor)
            if kernel == "planar":
                width = 16 // min(result.buffers[n].dtype.itemsize for n in ("pred", "target"))
                sizes = (grid.images.size, grid.maps.size, grid.num_cells // width, width)
                outer = (grid.images.strides[name], grid.maps.strides[name])
                vectors = each_once(forbidden.as_strided(sizes, (*outer, width, 1)))
                vectors.copy_(vectors.all(-1, keepdim=True))
            result.forbid(name, forbidden)

    # ---- what must come out ----------------------------------------------------------------------

    def expected(self, grad_output: Tensor | float) -> dict[str, Tensor]:
        """By the reference in float64: loss or errors, stats, and dloss/dpred for `grad_output`."""
        case = self.case
        pred, target = self.pred.double(), self.target.double()
        pred.requires_grad_()
        stats = {}
        if case.has_kinds:
            loss, sums = reference.fcrn_loss(
                pred,
                target,
                negative_weight=self.negative_weight,
                positive_weight=1.5,
                coord_weight=self.coord_weight,
                ignore_value=IGNORE_VALUE if case.ignored else None,
                weight=self.weight,
                positive=self.given_positive,
                reduction=case.reduction,
                return_stats=True,
            )
            stats = sums._asdict()
        else:
            loss = reference.masked_mse_loss(pred, target, self.weight, reduction=case.reduction)
        scale = torch.as_tensor(grad_output, dtype=torch.float64).expand(loss.shape)
        (grad,) = torch.autograd.grad(loss, pred, scale)
        return {
            "loss" if case.has_one_loss else "errors": loss.detach(),
            **stats,
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


def _weight(case: Case, generator: torch.Generator) -> Tensor:
    """Some zeros of either sign, and a third of all in a row; but a single one is not 0."""
    assert case.weight is not None
    values = 0.25 + torch.rand(case.weight, generator=generator, dtype=torch.float64)
    number = torch.arange(values.numel()).reshape(case.weight)
    is_zero = torch.rand(case.weight, generator=generator) < 0.15
    is_zero |= (number * 4 >= values.numel()) & (number * 12 < 7 * values.numel())
    is_zero &= torch.tensor(values.numel() > 1)
    is_zero |= torch.tensor(case.all_masked)
    values[is_zero] = torch.where(number % 2 == 0, 0.0, -0.0).double()[is_zero]
    return placed(values.to(case.weight_dtype), case.weight_layout)


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
        if case.grid is not None:
            grid = result.grid()
            assert (grid.maps.size, grid.weight_repeat) == case.grid
        blocks = batch.blocks(result)
        assert all(name.endswith(f" in {blocks} blocks") for name in done.kernels), done.kernels
        for other in done.results[1:]:
            for name, value in done.results[0].items():
                assert same_bits(value, other[name]), f"{name} depends on the order of threads"
        return done.results[0]

    # The forward pass does not know how many cells are positive: the rescaling divides.
    undivided = max(1, int(batch.num_positive)) if case.reduction == "positive" else 1
    for_one = batch.expected(float(undivided))
    forward = batch.forward()
    forward_results = outcome(forward)
    assert_results(case, forward_results, for_one, forward)

    for want_stats in (False, True)[: 2 if case.has_kinds else 1]:  # under no_grad
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
    weight: bool = False,
    **options: Any,
) -> None:
    """Tensors whose offsets do not fit 32 bits, of which few pages are in memory.

    With `weight`, that is one of all elements; the others are small. `strides` are those of all
    dimensions but the last. With the default, the third map of an image
    lies 2^32 elements after the first: a 32-bit offset finds another map there. Raises as `check`.
    """
    case = Case(shape, dtype, reduction="none", positives="scattered", seed=3)
    if weight:
        case = replace(case, weight=shape, weight_dtype=dtype)
    batch = Batch(case)
    forward, backward = batch.forward(), batch.backward()
    wanted = batch.expected(1.0), batch.expected(batch.grad_output)
    last_offset = sum(
        (size - 1) * stride for size, stride in zip(shape, (*strides, 1), strict=True)
    )
    wide = last_offset >= 2**31 - 1
    for result, want in zip((forward, backward), wanted, strict=True):
        for name in ("weight",) if weight else result.views:
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
    for shape in ((0, 7, 4, 4), (0, 4, 2), (2, 7, 0, 4), (2, 1, 0), (0, 3)):
        for reduction in DIVISORS:
            cases.append(Case(shape, reduction=reduction))
    # The maps are not all weighted by numbers in the launch's own parameters.
    for coord_weight in ("one", "tensor"):
        cases.append(Case(coord_weight=coord_weight, negative_weight="tensor"))
        cases.append(
            Case((2, 3, 5, 5), torch.float16, coord_weight=coord_weight, negative_weight="tensor")
        )
    cases.append(Case((2, 41, 4, 4), coord_weight="tensor"))
    # More of them than a block keeps.
    for layout in ({}, both_channels_last()):
        for coord_weight in ("one", "tensor"):
            cases.append(Case((2, 300, 2, 4), coord_weight=coord_weight, **layout))

    for positives in ("none", "scattered", "all"):
        for ignored in (False, True):
            cases.append(Case(positives=positives, ignored=ignored, reduction="positive"))
        half = torch.bfloat16
        cases.append(Case((2, 7, 5, 5), half, half, positives=positives, reduction="batchmean"))

    # More work than the grid has threads: each goes round several times. And one block for all.
    around = {"resident_blocks": 8, "positives": "scattered"}
    cases.append(Case((2, 3, 66, 64), torch.float64, torch.float64, **around))
    cases.append(Case((2, 3, 130, 64), **around))
    cases.append(Case((2, 3, 39, 33), reduction="none", **around))
    cases.append(Case((1, 2, 53, 67), torch.float16, torch.float32, reduction="cell", **around))
    cases.append(Case((1, 3, 76, 64), reduction="positive", **both_channels_last(), **around))
    cases.append(Case((2, 3, 64, 64), resident_blocks=1056, reduction="batchmean"))
    return cases + _cases_with_weights() + _cases_without_kinds()


def _cases_with_weights() -> list[Case]:
    """Weights and kinds of the caller's: every way to broadcast, and every vector kernel."""
    f64, f32, f16, bf16 = DTYPES
    maps = (2, 7, 16, 16)
    cells, images = (2, 1, 16, 16), (2, 1, 1, 1)
    some = {"positives": "scattered"}
    last, skewed = Layout("channels_last"), Layout("transposed")
    return [
        Case(maps, weight=cells, weight_dtype=torch.bool, **some),
        Case(maps, weight=cells, reduction="positive", negative_weight="tensor", **some),
        Case(maps, f16, f16, weight=cells, weight_dtype=bf16, reduction="sum", **some),
        Case(maps, bf16, f32, weight=cells, weight_dtype=f16, reduction="batchmean", **some),
        Case(maps, weight=cells, weight_dtype=f64, reduction="batchmean", **some),
        Case(maps, weight=(2, 7, 1, 1), coord_weight="tensor", **some),
        Case(maps, f16, f32, weight=(1, 7, 1, 1), weight_dtype=torch.bool, **some),
        Case(maps, weight=maps, reduction="positive", **some),
        Case(maps, bf16, bf16, weight=maps, weight_dtype=bf16, reduction="none", **some),
        Case(maps, bf16, bf16, weight=maps, weight_dtype=f16, **some),
        Case(maps, weight=maps, weight_layout=last, reduction="none", **some),
        Case(maps, weight=maps, weight_layout=Layout(misaligned_by=1), reduction="cell", **some),
        Case(maps, weight=images, reduction="cell", **some),
        Case(maps, weight=cells, all_masked=True, reduction="positive", **some),
        Case(maps, positive=cells, reduction="positive", **some),
        Case(maps, f16, f16, positive=(1, 1, 16, 16), reduction="none", **some),
        Case(maps, weight=cells, weight_dtype=torch.bool, positive=cells, reduction="cell", **some),
        Case(maps, weight=maps, positive=cells, ignored=False, reduction="positive", **some),
        Case((2, 1, 8, 8), weight=(2, 1, 8, 8), positive=(2, 1, 8, 8), reduction="positive"),
        Case((2, 3, 66, 64), weight=(2, 1, 66, 64), resident_blocks=8, **some),
        # cell by cell
        Case((3, 7, 13, 13), weight=(3, 1, 13, 13), reduction="positive", **some),
        Case((3, 7, 13, 13), positive=(3, 1, 13, 1), weight=(3, 7, 13, 13), reduction="none"),
        Case((2, 4, 8, 6), f64, f64, weight=(2, 4, 1, 1), weight_dtype=f64, pred_layout=skewed),
        Case((2, 4, 8, 6), weight=(2, 1, 8, 6), weight_layout=skewed, reduction="positive", **some),
        Case((2, 4, 8, 8), weight=(2, 1, 8, 1), positive=(1, 1, 1, 8), reduction="cell"),
        Case((2, 7, 8, 16), weight=(2, 1, 8, 16), weight_dtype=torch.bool, **both_channels_last()),
        Case((2, 7, 8, 16), positive=(2, 1, 8, 16), reduction="sum", **both_channels_last()),
        Case((2, 7, 0, 4), weight=(2, 1, 0, 4), positive=(2, 1, 0, 4), reduction="positive"),
    ]


def _cases_without_kinds() -> list[Case]:
    """Those of masked_mse_loss, with the maps and the repeat that their grid must have."""
    f64, f32, f16, bf16 = DTYPES

    def masked(
        shape: tuple[int, ...],
        weight: tuple[int, ...] | None,
        grid: tuple[int, int],
        pred_dtype: torch.dtype = f32,
        target_dtype: torch.dtype = f32,
        weight_dtype: torch.dtype = f32,
        **settings: Any,
    ) -> Case:
        settings |= {"weight": weight, "weight_dtype": weight_dtype, "grid": grid}
        return Case(shape, pred_dtype, target_dtype, has_kinds=False, **settings)

    maps, per_cell, per_map = (2, 7, 16, 16), (2, 1, 16, 16), (2, 7, 1, 1)
    both_last = both_channels_last()
    boolean = torch.bool
    return [
        # flat
        masked(maps, None, (1, 1)),
        masked(maps, maps, (1, 1)),
        masked((40,), (40,), (1, 1), bf16, bf16, boolean),
        masked((3, 5, 7), (3, 5, 7), (1, 1), f16, f16, bf16, reduction="none"),
        masked((4, 6, 16), (), (1, 1)),
        masked(maps, maps, (1, 1), all_masked=True),
        # rows: sequences, keypoints
        masked((4, 6, 16), (4, 6, 1), (1, 16), f32, f32, boolean),
        masked((4, 6, 10), (4, 6, 1), (1, 10), reduction="none"),
        masked((4, 6, 24), (4, 6, 1), (1, 24), f16, f16, bf16, reduction="sum"),
        masked((4, 6, 12), (4, 6, 1), (1, 12), f16, f32, f64),
        masked((3, 5, 7), (3, 5, 1), (1, 7), f32, f32, boolean),
        masked((4, 6, 8), (4, 6, 1), (1, 8), f64, f32, f64, reduction="none"),
        masked(maps, per_map, (1, 256), f32, f32, boolean),
        masked((6, 66, 64), (6, 66, 1), (1, 64), resident_blocks=8),
        # maps
        masked(maps, per_cell, (7, 1)),
        masked(maps, per_cell, (7, 1), bf16, f32, boolean, reduction="none"),
        masked(maps, (1, 1, 16, 16), (14, 1), f16, f16, f16),
        masked((2, 3, 13, 13), (2, 1, 13, 13), (3, 1), reduction="sum"),
        # both
        masked((4, 6, 16), (1, 6, 1), (4, 16), f32, f32, boolean),
        # other layouts
        masked(maps, per_cell, (1, 7), f32, f32, boolean, **both_last),
        masked((2, 8, 8, 8), (2, 8, 1, 1), (64, 1), reduction="none", **both_last),
        masked((2, 3, 8, 8), (2, 1, 8, 8), (3, 1), target_layout=Layout("channels_last")),
        masked((2, 3, 8, 8), (2, 1, 8, 8), (3, 1), f16, f16, boolean, pred_layout=Layout("sliced")),
        masked((2, 3, 8, 8), (2, 3, 8, 1), (1, 1), pred_layout=Layout("sliced"), reduction="none"),
        masked((3, 4, 8, 8), (1, 1, 8, 8), (4, 1), target_layout=Layout("expanded")),
        # nothing
        masked((0, 3, 4), (0, 3, 1), (1, 1)),
        masked((3, 0, 4), (3, 1, 4), (1, 1), reduction="none"),
    ]


def both_channels_last() -> dict[str, Layout]:
    return {"pred_layout": Layout("channels_last"), "target_layout": Layout("channels_last")}


CASES = tuple(dict.fromkeys(_all_cases()))
