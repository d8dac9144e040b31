"""`FCRNLoss`: the keywords, the buffer and what PyTorch does with a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss
from torch.optim.swa_utils import AveragedModel

import fcrn_fused

SETTINGS: dict[str, Any] = {
    "negative_weight": 0.3,
    "positive_weight": 1.3,
    "coord_weight": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "ignore_value": -1.0,
}
POINT_01 = torch.tensor(0.01).item()  # as float32 holds it


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_module_is_the_function(impl: Implementation, reduction: str) -> None:
    module = impl.module(reduction=reduction, **SETTINGS)
    pred, target = make_batch(device=impl.device, ignored=0.2)
    loss = module(pred, target)
    loss.sum().backward()
    truth = oracle.fcrn_loss(pred, target, reduction=reduction, **SETTINGS)
    assert_loss(loss, truth.loss, torch.float32)
    assert_gradient(pred.grad, truth.grad, torch.float32)


def test_the_module_returns_stats(impl: Implementation) -> None:
    module = impl.module(return_stats=True)
    pred, target = make_batch(device=impl.device)
    loss, stats = module(pred, target)
    assert isinstance(stats, fcrn_fused.FCRNLossStats)
    assert_loss(loss, oracle.fcrn_loss(pred, target).loss, torch.float32)
    assert stats.num_positive.item() == (target[:, -1] > 0).sum()


def test_keywords_and_defaults_are_those_of_the_function() -> None:
    of_function = inspect.signature(fcrn_fused.fcrn_loss).parameters
    of_module = inspect.signature(fcrn_fused.FCRNLoss).parameters
    keywords = {name: p for name, p in of_function.items() if p.kind is p.KEYWORD_ONLY}
    for name in ("weight", "positive"):  # forward's
        del keywords[name]
    assert list(of_module) == list(keywords)
    for name, parameter in of_module.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == keywords[name].default


def test_negative_weight_is_a_float32_buffer() -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.01)
    assert isinstance(module, torch.nn.Module)
    assert dict(module.named_buffers())["negative_weight"] is module.negative_weight
    assert module.negative_weight.dtype == torch.float32
    assert module.negative_weight.shape == ()
    assert not module.negative_weight.requires_grad
    assert list(module.state_dict()) == ["negative_weight"]
    assert list(module.parameters()) == []


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(like)": lambda module: module.to(torch.ones(1, dtype=torch.bfloat16)),
    "type": lambda module: module.type(torch.float64),
    "half and back": lambda module: module.half().float(),
    "bfloat16 twice": lambda module: module.bfloat16().half(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_casts_keep_dtype_and_value(
    cast: Callable[[torch.nn.Module], torch.nn.Module], inside: bool
) -> None:
    """0.01 has no faithful float16 or bfloat16, so it must not pass through one either."""
    module = fcrn_fused.FCRNLoss(negative_weight=0.01)
    if inside:
        cast(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([module])))
    else:
        assert cast(module) is module
    assert module.negative_weight.dtype == torch.float32
    assert module.negative_weight.item() == POINT_01
    assert dict(module.named_buffers())["negative_weight"] is module.negative_weight


def test_a_coord_weight_tensor_is_kept_and_moved() -> None:
    weight = torch.tensor([1.0, 0.1], dtype=torch.float64)
    module = fcrn_fused.FCRNLoss(coord_weight=weight).half()
    assert torch.equal(module.coord_weight, weight)
    weight.fill_(7)
    assert module.coord_weight.tolist() == [1.0, 0.1], "the caller's tensor is the caller's"
    assert module.to("meta").coord_weight.is_meta


def test_to_another_device() -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.01)
    assert module.to("meta").negative_weight.is_meta
    assert "meta" in repr(module)
    if torch.cuda.is_available():
        module = fcrn_fused.FCRNLoss(negative_weight=0.01).cuda()
        assert module.negative_weight.is_cuda
        assert module.cpu().negative_weight.item() == POINT_01


def test_a_weight_given_as_a_tensor_is_copied() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64)
    module = fcrn_fused.FCRNLoss(negative_weight=weight)
    assert module.negative_weight.dtype == torch.float32
    module.negative_weight.fill_(1.0)
    assert weight.item() == 0.5


def test_repr_shows_the_settings_and_the_weight_of_now() -> None:
    module = fcrn_fused.FCRNLoss(
        negative_weight=0.01,
        positive_weight=2.0,
        coord_weight=[1.0, 0.5],
        ignore_value=-1,
        reduction="positive",
    )
    text = repr(module)
    for part in (
        "FCRNLoss(",
        "negative_weight=0.01,",
        "positive_weight=2.0",
        "coord_weight=(1.0, 0.5)",
        "ignore_value=-1.0",
        "reduction='positive'",
    ):
        assert part in text
    module.negative_weight.fill_(0.75)
    assert "negative_weight=0.75" in repr(module)
    assert "return_stats=True" in repr(fcrn_fused.FCRNLoss(return_stats=True))
    assert "backend='reference'" in repr(fcrn_fused.FCRNLoss(backend="reference"))


def test_filling_the_weight_in_place_changes_the_loss(impl: Implementation) -> None:
    module = impl.module(negative_weight=0.01)
    pred, target = make_batch(device=impl.device)
    pointer = module.negative_weight.data_ptr()
    for weight in (0.01, 0.5, 1.0):
        module.negative_weight.fill_(weight)
        loss = module(pred, target)
        truth = oracle.fcrn_loss(pred, target, negative_weight=module.negative_weight)
        assert_loss(loss, truth.loss, torch.float32)
    assert module.negative_weight.data_ptr() == pointer


def test_state_dict_round_trip() -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.01)
    module.negative_weight.fill_(0.25)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = fcrn_fused.FCRNLoss().half()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.negative_weight.item() == 0.25
    assert other.negative_weight.dtype == torch.float32


def test_a_state_dict_in_halves_loads_into_float32() -> None:
    module = fcrn_fused.FCRNLoss()
    module.load_state_dict({"negative_weight": torch.tensor(0.25, dtype=torch.float16)})
    assert module.negative_weight.dtype == torch.float32
    assert module.negative_weight.item() == 0.25


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_a_checkpoint_of_another_dtype_loads_into_the_dtypes_of_the_module(
    inside: bool, dtype: torch.dtype, assign: bool
) -> None:
    loss = fcrn_fused.FCRNLoss(coord_weight=torch.ones(2))
    checkpoint = {"negative_weight": torch.tensor(0.25), "coord_weight": torch.tensor([1.0, 2.0])}
    checkpoint = {name: weight.to(dtype) for name, weight in checkpoint.items()}
    if inside:
        nested = {f"0.{name}": weight for name, weight in checkpoint.items()}
        torch.nn.Sequential(loss).load_state_dict(nested, assign=assign)
    else:
        loss.load_state_dict(checkpoint, assign=assign)
    assert loss.negative_weight.dtype == loss.coord_weight.dtype == torch.float32
    assert loss.negative_weight.item() == 0.25
    assert loss.coord_weight.tolist() == [1.0, 2.0]
    assert all(weight.dtype == dtype for weight in checkpoint.values()), "the caller's"


def test_assign_takes_a_tensor_of_the_right_dtype_as_it_is() -> None:
    checkpoint = {"negative_weight": torch.tensor(0.25)}
    loss = fcrn_fused.FCRNLoss()
    loss.load_state_dict(checkpoint, assign=True)
    assert loss.negative_weight.data_ptr() == checkpoint["negative_weight"].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coord_weight_tensor_is_in_the_state_dict(dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, 2.0], dtype=dtype)
    state = fcrn_fused.FCRNLoss(coord_weight=weight).state_dict()
    other = fcrn_fused.FCRNLoss(coord_weight=torch.zeros(2, dtype=dtype))
    other.load_state_dict(state)
    assert other.coord_weight.dtype == dtype
    assert torch.equal(other.coord_weight, weight)


@pytest.mark.parametrize("weight", [2.0, [1.0, 2.0], np.ones(2)], ids=type)
def test_a_coord_weight_of_numbers_is_not_in_the_state_dict(weight: Any) -> None:
    assert list(fcrn_fused.FCRNLoss(coord_weight=weight).state_dict()) == ["negative_weight"]


def test_a_checkpoint_without_the_coord_weight_is_refused_by_name() -> None:
    state = fcrn_fused.FCRNLoss().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*coord_weight"):
        fcrn_fused.FCRNLoss(coord_weight=torch.ones(2)).load_state_dict(state)


WEIGHTS: dict[str, dict[str, Any]] = {
    "numbers": {"negative_weight": 0.25, "coord_weight": (1.0, 0.1)},
    "numpy": {"negative_weight": np.float32(0.25), "coord_weight": np.array([1.0, 0.1])},
    "float64 tensors": {
        "negative_weight": torch.tensor(0.25, dtype=torch.float64),
        "coord_weight": torch.tensor([1.0, 0.1], dtype=torch.float64),
    },
    "one coord weight": {"coord_weight": torch.tensor(0.1)},
}
each_weight = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())


@each_weight
def test_reset_parameters_fills_in_the_values_of_construction(weights: dict[str, Any]) -> None:
    loss, fresh = fcrn_fused.FCRNLoss(**weights), fcrn_fused.FCRNLoss(**weights)
    for buffer in loss.buffers():
        buffer.fill_(7)
    loss.reset_parameters()
    torch.testing.assert_close(loss.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@each_weight
def test_a_module_made_on_meta_is_materialised_and_reset(weights: dict[str, Any]) -> None:
    with torch.device("meta"):
        loss = fcrn_fused.FCRNLoss(**weights)
    loss.to_empty(device="cpu")
    loss.reset_parameters()
    fresh = fcrn_fused.FCRNLoss(**weights)
    torch.testing.assert_close(loss.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@each_weight
def test_a_module_moved_to_meta_loads_a_checkpoint(weights: dict[str, Any]) -> None:
    fresh = fcrn_fused.FCRNLoss(**weights)
    loss = fcrn_fused.FCRNLoss(**weights).to("meta").to_empty(device="cpu")
    loss.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(loss.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["negative_weight", "coord_weight"])
def test_a_weight_tensor_on_meta_has_no_values_to_reset_to(name: str) -> None:
    loss = fcrn_fused.FCRNLoss(**{name: torch.ones((), device="meta")}).to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=f"{name}.*meta"):
        loss.reset_parameters()


def test_repr_on_meta() -> None:
    with torch.device("meta"):
        loss = fcrn_fused.FCRNLoss(coord_weight=torch.ones(6))
    assert "negative_weight='meta'" in repr(loss)
    assert "size=(6,)" in repr(loss)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module),
}


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize(
    "coord_weight", [2.0, (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])], ids=str
)
def test_copies_are_equal_and_independent(
    impl: Implementation, coord_weight: Any, duplicate: Callable[[Any], Any]
) -> None:
    module = impl.module(
        negative_weight=0.01, coord_weight=coord_weight, ignore_value=-1.0, reduction="positive"
    )
    pred, target = make_batch((2, 3, 4, 5), device=impl.device, ignored=0.2)
    loss = module(pred, target)
    loss.backward()
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert torch.equal(other(pred, target), loss)
    other.negative_weight.fill_(1.0)
    assert module.negative_weight.item() == POINT_01


def test_a_copy_of_a_schedule_anneals_its_own_copy_of_the_loss() -> None:
    schedule = fcrn_fused.StepNegativeWeight(fcrn_fused.FCRNLoss(), step_size=1, gamma=2.0)
    other = copy.deepcopy(schedule)
    other.step()
    assert other.loss.negative_weight.item() == pytest.approx(0.02)
    assert schedule.loss.negative_weight.item() == pytest.approx(0.01)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_has_the_weight_of_its_last_update(use_buffers: bool) -> None:
    """With `use_buffers=True` it averages the weight, as it does the parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), fcrn_fused.FCRNLoss())
    schedule = fcrn_fused.LinearNegativeWeight(model[1], initial=0.0, total_iters=4)
    average = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(2):
        schedule.step()
        average.update_parameters(model)
    assert model[1].negative_weight.item() == 0.5
    schedule.step()
    assert average.module[1].negative_weight.item() == (0.375 if use_buffers else 0.5)


def test_a_schedule_does_not_reach_a_copy_of_its_loss() -> None:
    loss = fcrn_fused.FCRNLoss()
    schedule = fcrn_fused.LinearNegativeWeight(loss, initial=0.0, total_iters=4)
    alone, (other, other_schedule) = copy.deepcopy(loss), copy.deepcopy((loss, schedule))
    schedule.step()
    assert [each.negative_weight.item() for each in (loss, alone, other)] == [0.25, 0.0, 0.0]
    other_schedule.step()
    assert other.negative_weight.item() == 0.25


def test_train_eval_and_zero_grad_do_nothing(impl: Implementation) -> None:
    module = impl.module(negative_weight=0.3)
    pred, target = make_batch(device=impl.device)
    want = module(pred, target).detach()
    module.eval()
    module.zero_grad()
    module.requires_grad_(True)
    assert torch.equal(module(pred, target).detach(), want)


@pytest.mark.parametrize(
    "weight", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), 1, True], ids=type
)
def test_every_number_becomes_the_buffer(weight: Any) -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=weight)
    assert module.negative_weight.item() == float(weight)


NUMBERS = [
    2,
    Fraction(2),
    Decimal(2),
    np.float16(2),
    np.float32(2),
    np.float64(2),
    np.int64(2),
    np.array(2),
    np.array(2.0),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__name__} {number}")
@pytest.mark.parametrize("name", ["positive_weight", "coord_weight", "ignore_value"])
def test_a_number_of_any_type_is_kept_as_a_float(name: str, number: Any) -> None:
    kept = getattr(fcrn_fused.FCRNLoss(**{name: number}), name)
    assert type(kept) is float
    assert kept == 2.0


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__name__} {number}")
@pytest.mark.parametrize("name", ["negative_weight", "positive_weight", "coord_weight"])
def test_a_number_of_any_type_weighs_the_same(impl: Implementation, name: str, number: Any) -> None:
    pred, target = make_batch(device=impl.device)
    want = impl.loss(pred, target, **{name: 2.0})
    assert torch.equal(impl.loss(pred, target, **{name: number}), want)
    assert torch.equal(impl.module(**{name: number})(pred, target), want)


SEQUENCES = [
    [1, 2],
    (1.0, 2.0),
    range(1, 3),
    [np.float32(1), Fraction(2)],
    np.array([1, 2]),
    np.array([1.0, 2.0]),
    np.array([1.0, 0.0, 2.0])[::2],
]


@pytest.mark.parametrize("weights", SEQUENCES, ids=repr)
def test_coord_weights_of_any_type_are_kept_as_floats(weights: Any) -> None:
    kept = fcrn_fused.FCRNLoss(coord_weight=weights).coord_weight
    assert type(kept) is tuple
    assert kept == (1.0, 2.0)
    assert all(type(weight) is float for weight in kept)


@pytest.mark.parametrize("weights", SEQUENCES, ids=repr)
def test_coord_weights_of_any_type_weigh_the_same(impl: Implementation, weights: Any) -> None:
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    want = impl.loss(pred, target, coord_weight=(1.0, 2.0))
    assert torch.equal(impl.loss(pred, target, coord_weight=weights), want)
    assert torch.equal(impl.module(coord_weight=weights)(pred, target), want)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_a_change_of_the_callers_coord_weights_has_no_effect(
    impl: Implementation, make: Callable[[list[float]], Any]
) -> None:
    weights = make([1.0, 2.0])
    pred, target = make_batch((2, 3, 4, 5), device=impl.device)
    loss = impl.module(coord_weight=weights)
    before = loss(pred, target)
    weights[0] = 100.0
    assert torch.equal(loss(pred, target), before)


def test_more_than_32_coord_weights_given_as_numbers(impl: Implementation) -> None:
    weights = np.arange(40) / 8
    pred, target = make_batch((2, 41, 3, 3), device=impl.device)
    truth = oracle.fcrn_loss(pred, target, coord_weight=weights.tolist())
    assert_loss(impl.module(coord_weight=weights)(pred, target), truth.loss, torch.float32)


@pytest.mark.parametrize(
    "weights",
    [
        *(
            {"coord_weight": weight}
            for weight in (np.ones(6), np.float32(2), np.array(2.0), [1] * 6)
        ),
        {"coord_weight": torch.ones(6)},
        {"positive_weight": np.float64(2), "ignore_value": np.float32(-1)},
    ],
    ids=str,
)
def test_a_module_compiles_without_a_graph_break(
    impl: Implementation, weights: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    loss = impl.module(**weights)
    pred, target = make_batch(device=impl.device)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pred, target), loss(pred, target))


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("positive_weight", np.float32(2), 2.0),
        ("coord_weight", [1, 2], (1.0, 2.0)),
        ("coord_weight", np.array(2), 2.0),
        ("ignore_value", -1, -1.0),
        ("reduction", "sum", "sum"),
        ("backend", "reference", "reference"),
    ],
    ids=str,
)
def test_a_setting_changed_later_is_kept_as_at_construction(
    name: str, value: Any, kept: Any
) -> None:
    loss = fcrn_fused.FCRNLoss()
    setattr(loss, name, value)
    assert getattr(loss, name) == kept
    assert type(getattr(loss, name)) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("positive_weight", -1.0, ValueError),
        ("positive_weight", "1", TypeError),
        ("coord_weight", [1.0, float("nan")], ValueError),
        ("ignore_value", float("nan"), ValueError),
        ("reduction", "average", ValueError),
        ("backend", "cuda", ValueError),
        ("negative_weight", torch.ones(1), ValueError),
        ("negative_weight", torch.tensor(1.0, requires_grad=True), ValueError),
    ],
    ids=str,
)
def test_a_setting_changed_later_is_checked(name: str, value: Any, error: type[Exception]) -> None:
    loss = fcrn_fused.FCRNLoss()
    before = getattr(loss, name)
    with pytest.raises(error, match=name):
        setattr(loss, name, value)
    assert getattr(loss, name) is before


@pytest.mark.parametrize("name", ["negative_weight", "coord_weight"])
def test_a_weight_that_came_to_require_grad_is_refused(impl: Implementation, name: str) -> None:
    loss = impl.module(coord_weight=torch.ones(6))
    getattr(loss, name).requires_grad_()
    with pytest.raises(ValueError, match=f"{name}.*requires_grad=True"):
        loss(*make_batch(device=impl.device))


def test_share_memory_keeps_the_buffer_in_place() -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.25).share_memory()
    assert module.negative_weight.is_shared()
    assert module.negative_weight.item() == 0.25
