"""`masked_mse_loss` and its module: values, masks, shapes, layouts, accuracy, derivatives."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from batches import DTYPES, make_weight
from calls import POISONS, given_tensor, laid_out, moved
from hypothesis import given, settings
from implementations import Implementation
from strategies import given_weights, layouts
from test_large import needs_memory, zeros
from test_layouts import DENSE, LAYOUTS
from tolerances import assert_gradient, assert_loss, loss_dtype
from torch import Tensor

import fcrn_fused

Shape = tuple[int, ...]
REDUCTIONS = ("mean", "sum", "none")
WEIGHT_DTYPES = (torch.bool, *DTYPES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_weight_dtype = pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)


def make_pair(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    target_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (
        pred.to(device, dtype).requires_grad_(),
        target.to(device, target_dtype or dtype).requires_grad_(),
    )


def check(
    impl: Implementation,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> Tensor:
    """Loss and gradients, twice, against the loops; the same loss under no_grad; a gradient."""
    pred, target = pred.detach().requires_grad_(), target.detach().requires_grad_()
    loss = impl.masked_loss(pred, target, weight, reduction=reduction)
    want, grad = oracle.masked_mse_loss(
        pred, target, weight, reduction=reduction, grad_output=grad_output
    )
    assert_loss(loss, want, loss_dtype(pred.dtype, target.dtype))
    with torch.no_grad():
        without = impl.masked_loss(pred, target, weight, reduction=reduction)
    assert torch.equal(without.nan_to_num(7), loss.nan_to_num(7))
    upstream = torch.as_tensor(grad_output, dtype=loss.dtype, device=loss.device).expand_as(loss)
    for _ in range(2):
        grads = torch.autograd.grad(loss, (pred, target), upstream, retain_graph=True)
        assert_gradient(grads[0], grad, pred.dtype)
        assert_gradient(grads[1], -grad, target.dtype)
        grads[0].fill_(torch.nan)  # as its owner may
    return grads[0]


# ---- values -------------------------------------------------------------------------------------


@st.composite
def any_call(draw: st.DrawFn) -> dict[str, Any]:
    shape: Shape = ()
    for _ in range(draw(st.integers(0, 5))):
        shape = (*shape, draw(st.integers(1, max(1, min(40, 300 // math.prod(shape))))))
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "shape": shape,
        "dtypes": [draw(st.sampled_from(DTYPES)) for _ in range(2)],
        "layouts": [draw(layouts(shape)) for _ in range(2)],
        "weight": draw(given_weights(shape)),
        "poisoned": draw(st.booleans()),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "grad_output": draw(st.sampled_from([1.0, 0.5, -3.0, 100.0, 1.7])),
    }


@settings(max_examples=120)
@given(call=any_call())
def test_any_call_against_the_loops(impl: Implementation, call: dict[str, Any]) -> None:
    shape = call["shape"]
    generator = np.random.default_rng(call["seed"])
    weight = given_tensor(call, "weight", "cpu")
    masked = torch.zeros(shape, dtype=torch.bool) if weight is None else weight == 0
    pair = []
    for dtype, layout in zip(call["dtypes"], call["layouts"], strict=True):
        values = torch.from_numpy(np.asarray(generator.normal(size=shape))).to(dtype)
        may_expand = not pair  # of target, the first
        if call["poisoned"] and not (may_expand and layout["expanded"]):
            poison = torch.from_numpy(np.asarray(generator.choice(POISONS, size=shape)))
            values = torch.where(masked, poison.to(dtype), values)
        pair.append(moved(laid_out(values, layout, may_expand=may_expand), impl.device))
    target, pred = pair
    weight = given_tensor(call, "weight", impl.device)
    check(impl, pred, target, weight, call["reduction"], call["grad_output"])


PATTERNS = [
    *(((2, 3, 13, 13), w) for w in ((2, 3, 13, 13), (2, 1, 13, 13), (2, 3, 1, 1), (2, 1, 1, 1))),
    *(((2, 3, 13, 13), w) for w in ((1, 1, 13, 13), (1, 3, 1, 1), (1, 3, 13, 1), (2, 1, 1, 13))),
    *(((2, 9, 17), w) for w in ((2, 9, 1), (2, 1, 17), (1, 9, 1), (1, 1, 1))),
    *(((2, 5, 4, 3, 2), w) for w in ((2, 5, 1, 1, 1), (2, 1, 4, 1, 2), (1, 5, 1, 3, 1))),
    ((40,), (1,)),
    ((7, 5), ()),
    ((), ()),
]


@each_weight_dtype
@pytest.mark.parametrize(("shape", "weight_shape"), PATTERNS, ids=str)
def test_every_way_in_which_a_weight_repeats_itself(
    impl: Implementation,
    shape: Shape,
    weight_shape: Shape,
    weight_dtype: torch.dtype,
) -> None:
    pred, target = make_pair(shape, device=impl.device)
    weight = make_weight(weight_shape, weight_dtype, device=impl.device)
    for reduction in REDUCTIONS:
        check(impl, pred, target, weight, reduction)
    pred = pred.movedim(0, -1).contiguous().movedim(-1, 0) if shape else pred
    check(impl, pred, target, weight)


@each_weight_dtype
def test_a_number_on_the_cpu(impl: Implementation, weight_dtype: torch.dtype) -> None:
    pred, target = make_pair((2, 3, 5), device=impl.device)
    for reduction in REDUCTIONS:
        for number in (0, 0.3):
            check(impl, pred, target, torch.tensor(number, dtype=weight_dtype), reduction)


@pytest.mark.parametrize("weight_shape", [(2, 4, 3, 5), (2, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(impl: Implementation, name: str, weight_shape: Shape) -> None:
    """Of one tensor and of all three; the gradient in the format of pred."""
    tensors = [*make_pair((2, 4, 3, 5), device=impl.device), make_weight(weight_shape)]
    tensors = [tensor.detach().to(impl.device) for tensor in tensors]
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        laid = [LAYOUTS[name](x) if i in which else x for i, x in enumerate(tensors)]
        grad = check(impl, *laid, "none")
        if name in DENSE:
            assert grad.stride() == laid[0].stride()


@each_reduction
def test_grad_outputs_of_every_layout(impl: Implementation, reduction: str) -> None:
    pred, target = make_pair((2, 3, 4, 5), device=impl.device)
    weight = make_weight((2, 1, 4, 5), device=impl.device)
    for layout in LAYOUTS.values() if reduction == "none" else (torch.clone,):
        loss = impl.masked_loss(pred, target, weight, reduction=reduction)
        check(impl, pred, target, weight, reduction, layout(torch.randn_like(loss)).detach())


def test_offsets_of_a_weight_beyond_32_bits(impl: Implementation) -> None:
    """Strides that jump over 2^31 elements between two images: few elements, large offsets."""
    needs_memory(impl.device, 8 if impl.device == "cuda" else 1)
    jump = 2**31 + 8
    weight = zeros((jump + 64,), impl.device).as_strided((2, 3, 4), (jump, 4, 1))
    weight[0], weight[1, 1] = 1, 3
    pred, target = make_pair((2, 3, 4), device=impl.device)
    for reduction in REDUCTIONS:
        check(impl, pred, target, weight, reduction)


def test_seventeen_dimensions(impl: Implementation) -> None:
    """And contiguous tensors of more, which are one."""
    weight = torch.ones([1] * 17, device=impl.device)
    pred, target = make_pair((2,) * 17, device=impl.device)
    pred = pred.detach().permute(*reversed(range(17)))
    torch.testing.assert_close(impl.masked_loss(pred, target, weight), F.mse_loss(pred, target))
    pred, target = make_pair((2,) * 18, device=impl.device)
    torch.testing.assert_close(impl.masked_loss(pred, target), F.mse_loss(pred, target))


# ---- masks --------------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("which", ["pred", "target"])
def test_poison_that_counts_reaches_the_loss(
    impl: Implementation, which: str, poison: float, reduction: str
) -> None:
    pred, target = (x.detach() for x in make_pair((2, 20), device=impl.device))
    (pred if which == "pred" else target)[1, 3] = poison
    weight = make_weight((2, 20), device=impl.device)
    weight[1, 3] = 0.5
    loss = impl.masked_loss(pred.requires_grad_(), target, weight, reduction=reduction)
    loss.sum().backward()
    hit = loss[1, 3] if reduction == "none" else loss
    assert hit.isnan() if math.isnan(poison) else hit == math.inf
    others = torch.ones_like(pred, dtype=torch.bool)
    others[1, 3] = False
    assert not pred.grad[1, 3].isfinite()
    assert pred.grad[others].isfinite().all()


@each_reduction
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 3, 13, 13)], ids=str)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_values_of_mse_loss(
    impl: Implementation, is_weighted: bool, shape: Shape, reduction: str
) -> None:
    pred, target = make_pair(shape, torch.float64, device=impl.device)
    weight = make_weight(shape, torch.float64, device=impl.device) if is_weighted else None
    if weight is not None and not shape:
        weight.fill_(0.7)
    loss = impl.masked_loss(pred, target, weight, reduction=reduction)
    want = F.mse_loss(pred, target, reduction=reduction, weight=weight)
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(x.sum(), (pred, target)) for x in (loss, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "weight", [[0.0, 0.0, 0.0], [False] * 3, [1.0, 0.0, -1.0], [[-0.0]]], ids=str
)
def test_a_mean_over_weights_that_add_up_to_zero(impl: Implementation, weight: list[Any]) -> None:
    """0 and a gradient of 0, where `mse_loss` divides by 0."""
    weight = torch.tensor(weight, device=impl.device)
    shape = (3,) if weight.dim() == 1 else (2, 3)
    pred, target = make_pair(shape, device=impl.device)
    loss = impl.masked_loss(pred, target, weight)
    assert loss.item() == 0
    for scale in (1.0, 5.0):
        for grad in torch.autograd.grad(scale * loss, (pred, target), retain_graph=True):
            assert (grad == 0).all()
    assert impl.masked_loss(pred, target, weight, reduction="sum").isfinite()


@each_reduction
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("weight_kind", ["none", "0-dim", "ones", "full", "bool"])
def test_empty_inputs(impl: Implementation, weight_kind: str, shape: Shape, reduction: str) -> None:
    shapes = {"none": None, "0-dim": (), "ones": (1,) * len(shape), "full": shape, "bool": shape}
    given_shape = shapes[weight_kind]
    dtype = torch.bool if weight_kind == "bool" else torch.float32
    weight = None if given_shape is None else torch.ones(given_shape, dtype=dtype).to(impl.device)
    pred, target = make_pair(shape, device=impl.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = impl.masked_loss(pred, target, weight, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (pred, target), create_graph=True)
    want = F.mse_loss(pred, target, reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert [grad.shape for grad in grads] == [shape, shape]


# ---- accuracy -----------------------------------------------------------------------------------


def by_formula(pred: Tensor, target: Tensor, weight: Tensor) -> tuple[np.longdouble, np.ndarray]:
    """The mean and its gradient in extended precision."""
    p, t, w = (
        tensor.detach().expand(pred.shape).cpu().double().numpy().astype(np.longdouble)
        for tensor in (pred, target, weight)
    )
    return (w * (p - t) ** 2).sum() / w.sum(), 2 * w * (p - t) / w.sum()


@each_weight_dtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", [(2, 7, 23, 29), (2, 1, 23, 29), (2, 7, 1, 1)], ids=str)
def test_gradients_in_ulps(
    impl: Implementation,
    weight_shape: Shape,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    """Many elements, weights and a grad_output that no binary fraction holds."""
    pred, target = make_pair((2, 7, 23, 29), dtype, device=impl.device)
    weight = make_weight(weight_shape, weight_dtype, device=impl.device)
    want, want_grad = by_formula(pred, target, weight)
    loss = impl.masked_loss(pred, target, weight)
    assert_loss(loss, want, loss.dtype)
    for scale in (1.0, 1234.5):
        (grad,) = torch.autograd.grad(scale * loss, pred, retain_graph=True)
        assert_gradient(grad, want_grad * np.longdouble(scale), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 100_003), (2, 7, 21_013), (100_003,)], ids=str)
def test_many_weights(impl: Implementation, shape: Shape, dtype: torch.dtype) -> None:
    """A gradient is divided by their sum, of which float32 sees equal ones worst."""
    pred, target = make_pair(shape, dtype, device=impl.device)
    for weight in (torch.full(shape, 0.1, dtype=dtype), make_weight(shape, dtype)):
        want, want_grad = by_formula(pred, target, weight)
        loss = impl.masked_loss(pred, target, weight.to(impl.device))
        assert_loss(loss, want, dtype)
        assert_gradient(torch.autograd.grad(loss, pred)[0], want_grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_halves_survive_a_loss_scale(impl: Implementation, dtype: torch.dtype) -> None:
    """2 w d / sum(w) is below float16's smallest number, times 65536 it is not."""
    pred, target = make_pair((8, 7, 32, 32), dtype, device=impl.device)
    weight = make_weight((8, 1, 32, 32), device=impl.device)
    wide = [x.detach().double().requires_grad_() for x in (pred, target)]
    loss, want = (impl.masked_loss(*pair, weight) for pair in ((pred, target), wide))
    for scale in (1.0, 65536.0, 3.0):
        (grad,) = torch.autograd.grad(scale * loss, pred, retain_graph=True)
        (want_grad,) = torch.autograd.grad(scale * want, wide[0], retain_graph=True)
        assert_gradient(grad, want_grad.cpu().numpy().astype(np.longdouble), dtype)
        if scale == 65536.0:
            assert torch.equal(grad != 0, want_grad != 0)


# ---- the module ---------------------------------------------------------------------------------


@each_reduction
def test_the_module_is_the_function(impl: Implementation, reduction: str) -> None:
    module = fcrn_fused.MaskedMSELoss(reduction, impl.backend)
    pred, target = make_pair((2, 3, 5), device=impl.device)
    weight = make_weight((2, 1, 5), torch.bool, device=impl.device)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(copied) == f"MaskedMSELoss({reduction=}, backend={impl.backend!r})"
        assert copied.state_dict() == {}
        assert list(copied.parameters()) == []
        for given_weight in (weight, None):
            assert torch.equal(
                copied(pred, target, given_weight),
                impl.masked_loss(pred, target, given_weight, reduction=reduction),
            )


@pytest.mark.parametrize("reduction", ["positive", "cell", "batchmean", "average", None], ids=repr)
def test_a_reduction_of_the_other_loss_is_refused(reduction: Any) -> None:
    pred, target = make_pair((2, 3, 4))
    for call in (
        lambda: fcrn_fused.masked_mse_loss(pred, target, reduction=reduction),
        lambda: fcrn_fused.reference.masked_mse_loss(pred, target, reduction=reduction),
        lambda: fcrn_fused.MaskedMSELoss(reduction),
    ):
        with pytest.raises(ValueError, match=f"reduction.*mean, sum, none.*{reduction!r}"):
            call()


def test_a_backend_that_there_is_not_is_refused() -> None:
    pred, target = make_pair((2, 3, 4))
    for call in (
        lambda: fcrn_fused.masked_mse_loss(pred, target, backend="cuda"),
        lambda: fcrn_fused.MaskedMSELoss(backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"backend.*'cuda'"):
            call()
