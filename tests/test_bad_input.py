"""Every TypeError and ValueError of the contract, with the offending value in the message."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from batches import make_batch
from implementations import IMPLEMENTATIONS, Implementation
from tolerances import assert_gradient, assert_loss

import fcrn_fused
from fcrn_fused import FCRNLoss, reference

NAN, INF = float("nan"), float("inf")
SHAPE = (2, 3, 4, 5)


def good(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return make_batch(SHAPE, device=device)


def through_function(pred: Any, target: Any, **settings: Any) -> Any:
    return fcrn_fused.fcrn_loss(pred, target, **settings)


def through_fused(pred: Any, target: Any, **settings: Any) -> Any:
    return fcrn_fused.fcrn_loss(pred, target, backend="fused", **settings)


def through_reference(pred: Any, target: Any, **settings: Any) -> Any:
    return reference.fcrn_loss(pred, target, **settings)


def through_module(pred: Any, target: Any, **settings: Any) -> Any:
    return FCRNLoss(**settings)(pred, target)


ENTRANCES: list[Callable[..., Any]] = [
    through_function,
    through_fused,
    through_reference,
    through_module,
]
each_entrance = pytest.mark.parametrize("call", ENTRANCES, ids=lambda call: call.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:fcrn_fused falls back to plain PyTorch")


def refused(
    error: type[Exception], message: str, call: Callable[..., Any], *tensors: Any, **settings: Any
) -> None:
    """The error and its message; and the next call is right."""
    if not tensors:
        tensors = good()
    with pytest.raises(error, match=message):
        call(*tensors, **settings)
    pred, target = good()
    loss = reference.fcrn_loss(pred, target) if call is through_fused else call(pred, target)
    assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)


@pytest.mark.parametrize(
    "value",
    [None, 1.0, [[1.0]], np.zeros(SHAPE, np.float32), "tensor"],
    ids=lambda v: type(v).__name__,
)
@each_entrance
def test_not_a_tensor(call: Callable[..., Any], value: Any) -> None:
    pred, target = good()
    refused(TypeError, rf"pred.*{type(value).__name__}", call, value, target)
    refused(TypeError, rf"target.*{type(value).__name__}", call, pred, value)


NOT_NUMBERS = [None, "0.5", b"1", 1j, [1.0], {}, object(), Decimal]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", ["negative_weight", "positive_weight"])
@each_entrance
def test_a_weight_that_is_not_a_number(call: Callable[..., Any], name: str, value: Any) -> None:
    refused(TypeError, rf"{name}.*{type(value).__name__}", call, **{name: value})


@pytest.mark.parametrize("value", [None, "0.5", 1j, object()], ids=lambda v: type(v).__name__)
@each_entrance
def test_a_coord_weight_that_is_not_a_number(call: Callable[..., Any], value: Any) -> None:
    refused(TypeError, rf"coord_weight.*{type(value).__name__}", call, coord_weight=value)
    refused(TypeError, rf"coord_weight.*{type(value).__name__}", call, coord_weight=[1.0, value])


@pytest.mark.parametrize("value", ["-1", 1j, [255], object()], ids=lambda v: type(v).__name__)
@each_entrance
def test_an_ignore_value_that_is_not_a_number(call: Callable[..., Any], value: Any) -> None:
    refused(TypeError, rf"ignore_value.*{type(value).__name__}", call, ignore_value=value)


@pytest.mark.parametrize("value", [np.ones(1), np.ones((1, 1))], ids=lambda v: str(v.shape))
@pytest.mark.parametrize("name", ["negative_weight", "positive_weight", "ignore_value"])
@each_entrance
def test_an_array_of_one_number_is_not_a_number(
    call: Callable[..., Any], name: str, value: Any
) -> None:
    refused(TypeError, rf"{name}.*ndarray", call, **{name: value})


@pytest.mark.parametrize(
    "value", [np.ones((2, 2)), {0: 1.0}, {1.0, 2.0}, b"12"], ids=lambda v: type(v).__name__
)
@each_entrance
def test_coord_weights_that_are_not_a_sequence_of_numbers(
    call: Callable[..., Any], value: Any
) -> None:
    refused(TypeError, rf"coord_weight.*{type(value).__name__}", call, coord_weight=value)


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((2, 3, 4, 5), (2, 3, 5, 4)),
    ((2, 3, 4, 5), (2, 3, 4)),
    ((2, 3, 4, 5), (1, 3, 4, 5)),
    ((2, 3, 4, 5), (2, 1, 4, 5)),
    ((2, 3, 4, 5), (1,)),
    ((2, 3), (3, 2)),
]


@pytest.mark.parametrize(("pred_shape", "target_shape"), SHAPES, ids=str)
@each_entrance
def test_shapes_that_differ(
    call: Callable[..., Any], pred_shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    """No broadcasting: (1, 3, 4, 5) is as wrong as (2, 3, 5, 4)."""
    refused(
        ValueError,
        re.escape(str(target_shape)),
        call,
        torch.zeros(pred_shape),
        torch.zeros(target_shape),
    )


@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (3, 0, 4, 4)], ids=str)
@each_entrance
def test_shapes_that_are_not_b_c_s(call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    refused(ValueError, re.escape(str(shape)), call, torch.zeros(shape), torch.zeros(shape))


BAD_DTYPES = [
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@each_entrance
def test_dtypes(call: Callable[..., Any], dtype: torch.dtype) -> None:
    pred, target = good()
    bad = torch.zeros(SHAPE).to(dtype)
    refused(ValueError, rf"pred.*{dtype}", call, bad, target)
    refused(ValueError, rf"target.*{dtype}", call, pred, bad)


@each_entrance
def test_devices(call: Callable[..., Any]) -> None:
    pred, target = good()
    refused(ValueError, "target.*cpu.*meta", call, pred, target.to("meta"))
    refused(ValueError, "target.*meta.*cpu", call, pred.detach().to("meta"), target)
    if torch.cuda.is_available():
        refused(ValueError, "target.*cpu.*cuda", call, pred, target.cuda())
        refused(ValueError, "target.*cuda.*cpu", call, pred.detach().cuda(), target)


@each_entrance
def test_sparse_tensors(call: Callable[..., Any]) -> None:
    pred, target = good()
    refused(ValueError, "pred.*sparse", call, pred.detach().to_sparse(), target)
    refused(ValueError, "target.*sparse", call, pred, target.to_sparse())


@pytest.mark.parametrize("value", ["average", "Mean", "", None, 0, "mean "], ids=repr)
@each_entrance
def test_reductions(call: Callable[..., Any], value: Any) -> None:
    refused(ValueError, rf"reduction.*{re.escape(repr(value))}", call, reduction=value)


@pytest.mark.parametrize("value", ["cuda", "Fused", "", None, 1], ids=repr)
@pytest.mark.parametrize("call", [through_function, through_module], ids=["function", "module"])
def test_backends(call: Callable[..., Any], value: Any) -> None:
    refused(ValueError, rf"backend.*{re.escape(repr(value))}", call, backend=value)


@pytest.mark.parametrize("value", [-1.0, -1, -1e-30, NAN, INF, -INF, np.float32(-2)])
@pytest.mark.parametrize("name", ["negative_weight", "positive_weight", "coord_weight"])
@each_entrance
def test_weights_negative_or_not_finite(call: Callable[..., Any], name: str, value: Any) -> None:
    refused(ValueError, rf"{name}.*{re.escape(str(value))}", call, **{name: value})


@pytest.mark.parametrize("name", ["negative_weight", "positive_weight", "coord_weight"])
@each_entrance
def test_integers_beyond_the_largest_float(call: Callable[..., Any], name: str) -> None:
    refused(ValueError, rf"{name}.*finite", call, **{name: 10**400})


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
@each_entrance
def test_one_of_the_coord_weights_negative_or_not_finite(
    call: Callable[..., Any], value: float
) -> None:
    for weights in ([1.0, value], (value, 1.0), np.array([1.0, value])):
        refused(ValueError, rf"coord_weight.*{value}", call, coord_weight=weights)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
@each_entrance
def test_a_wrong_count_of_coord_weights(call: Callable[..., Any], count: int) -> None:
    """C = 3: there are two pose maps."""
    refused(ValueError, rf"coord_weight.*2.*{count}", call, coord_weight=[1.0] * count)
    refused(ValueError, rf"coord_weight.*{count}", call, coord_weight=torch.ones(count))


@each_entrance
def test_weight_tensors_of_a_wrong_shape(call: Callable[..., Any]) -> None:
    refused(ValueError, r"negative_weight.*\(1,\)", call, negative_weight=torch.ones(1))
    refused(ValueError, r"negative_weight.*\(2, 2\)", call, negative_weight=torch.ones(2, 2))
    refused(ValueError, r"coord_weight.*\(2, 1\)", call, coord_weight=torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@each_entrance
def test_weight_tensors_of_a_wrong_dtype(call: Callable[..., Any], dtype: torch.dtype) -> None:
    weight = torch.ones((), dtype=dtype)
    refused(ValueError, rf"negative_weight.*{dtype}", call, negative_weight=weight)
    refused(ValueError, rf"coord_weight.*{dtype}", call, coord_weight=weight)


@each_entrance
def test_weight_tensors_on_a_wrong_device(call: Callable[..., Any]) -> None:
    weight = torch.ones((), device="meta")
    refused(ValueError, "negative_weight.*cpu.*meta", call, negative_weight=weight)
    refused(ValueError, "coord_weight.*cpu.*meta", call, coord_weight=weight)
    if torch.cuda.is_available():
        refused(ValueError, "negative_weight.*cpu.*cuda", call, negative_weight=weight.new_ones(()))


@each_entrance
def test_positive_weight_is_a_number(call: Callable[..., Any]) -> None:
    refused(TypeError, "positive_weight.*Tensor", call, positive_weight=torch.ones(()))


@pytest.mark.parametrize("name", ["negative_weight", "coord_weight"])
@each_entrance
def test_a_weight_that_requires_grad(call: Callable[..., Any], name: str) -> None:
    weight = torch.ones((), requires_grad=True)
    refused(ValueError, rf"{name}.*requires_grad=True", call, **{name: weight})
    with torch.no_grad():
        refused(ValueError, rf"{name}.*requires_grad=True", call, **{name: weight})
    refused(ValueError, rf"{name}.*requires_grad=True", call, **{name: weight * 2})


@each_entrance
def test_an_ignore_value_that_is_nan(call: Callable[..., Any]) -> None:
    refused(ValueError, "ignore_value.*nan", call, ignore_value=NAN)
    refused(ValueError, "ignore_value.*nan", call, ignore_value=np.float32("nan"))


@pytest.mark.parametrize(
    "settings",
    [
        {"reduction": "average"},
        {"backend": "cuda"},
        {"negative_weight": -1.0},
        {"negative_weight": torch.ones(1)},
        {"positive_weight": NAN},
        {"coord_weight": [1.0, -1.0]},
        {"ignore_value": NAN},
        {"coord_weight": torch.ones((), requires_grad=True)},
    ],
    ids=str,
)
def test_the_module_refuses_when_it_is_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        FCRNLoss(**settings)


def test_keywords_only_and_no_others() -> None:
    pred, target = good()
    for call in (fcrn_fused.fcrn_loss, reference.fcrn_loss):
        with pytest.raises(TypeError):
            call(pred, target, 0.5)
        with pytest.raises(TypeError, match="weight"):
            call(pred, target, weight=0.5)
    with pytest.raises(TypeError):
        FCRNLoss(0.5)
    with pytest.raises(TypeError, match="backend"):
        reference.fcrn_loss(pred, target, backend="auto")


def test_values_of_weight_tensors_are_not_checked(impl: Implementation) -> None:
    """Looking at them would wait for the device; they do what arithmetic does."""
    pred, target = make_batch(SHAPE, device=impl.device)
    minus = torch.tensor(-1.0, device=impl.device)
    loss = impl.loss(pred, target, negative_weight=minus)
    truth = oracle.fcrn_loss(pred, target, negative_weight=-1.0)
    torch.testing.assert_close(loss.item(), float(truth.loss), rtol=1e-5, atol=0)
    nan = torch.tensor(NAN, device=impl.device)
    assert impl.loss(pred, target, negative_weight=nan).isnan()


def test_an_error_leaves_inputs_and_later_calls_alone(impl: Implementation) -> None:
    pred, target = make_batch(SHAPE, device=impl.device)
    before = pred.detach().clone(), target.clone()
    for bad in (
        {"reduction": "average"},
        {"negative_weight": -1.0},
        {"coord_weight": [1.0]},
        {"ignore_value": NAN},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            impl.loss(pred, target, **bad)
    with pytest.raises(ValueError, match="target"):
        impl.loss(pred, target[:1])
    assert torch.equal(pred, before[0])
    assert torch.equal(target, before[1])
    assert pred.grad is None
    loss = impl.loss(pred, target)
    loss.backward()
    truth = oracle.fcrn_loss(pred, target)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


def test_bad_input_is_refused_before_a_missing_backend() -> None:
    """What is wrong with the call comes before what is wrong with the installation."""
    pred, target = good()
    for backend in ("auto", "fused", "reference"):
        with pytest.raises(ValueError, match="average"):
            fcrn_fused.fcrn_loss(pred, target, reduction="average", backend=backend)


def test_fused_without_a_kernel_says_why() -> None:
    pred, target = good()
    missing = [each for each in IMPLEMENTATIONS if each.is_fused and each.why_not()]
    for each in missing:
        if each.device == "cpu":
            with pytest.raises(RuntimeError, match=re.escape(each.why_not() or "")):
                fcrn_fused.fcrn_loss(pred, target, backend="fused")
    if not any(each.device == "cpu" for each in missing):
        pytest.skip("the CPU has its kernels; tests/test_failures.py takes them away")
