"""`FCRNLoss`: the keywords, the buffer and what PyTorch does with a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from batches import REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss

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
        "coord_weight=[1.0, 0.5]",
        "ignore_value=-1",
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


def test_a_coord_weight_stays_out_of_the_state_dict() -> None:
    """It is a setting: a checkpoint of one loss loads into a loss with other settings."""
    module = fcrn_fused.FCRNLoss(coord_weight=torch.tensor([1.0, 2.0]))
    fcrn_fused.FCRNLoss().load_state_dict(module.state_dict())


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
@pytest.mark.parametrize("coord_weight", [2.0, (1.0, 2.0), torch.tensor([1.0, 2.0])], ids=str)
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


def test_share_memory_keeps_the_buffer_in_place() -> None:
    module = fcrn_fused.FCRNLoss(negative_weight=0.25).share_memory()
    assert module.negative_weight.is_shared()
    assert module.negative_weight.item() == 0.25
