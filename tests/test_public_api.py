"""The names and signatures that users build on."""

from __future__ import annotations

import inspect
import operator
import re

import pytest
import torch

import fcrn_fused

SIGNATURE = {
    "negative_weight": 1.0,
    "positive_weight": 1.0,
    "coord_weight": 1.0,
    "ignore_value": None,
    "weight": None,
    "positive": None,
    "reduction": "mean",
    "return_stats": False,
    "backend": "auto",
}


def test_the_public_names() -> None:
    assert set(fcrn_fused.__all__) == {
        "FCRNLoss",
        "FCRNLossFunction",
        "FCRNLossStats",
        "LinearNegativeWeight",
        "MaskedMSELoss",
        "StepNegativeWeight",
        "__version__",
        "fcrn_loss",
        "masked_mse_loss",
        "reference",
        "show_config",
    }
    for name in fcrn_fused.__all__:
        assert getattr(fcrn_fused, name) is not None


@pytest.mark.parametrize("name", ["fcrn_loss", "reference.fcrn_loss"])
def test_signatures(name: str) -> None:
    function = fcrn_fused.fcrn_loss if name == "fcrn_loss" else fcrn_fused.reference.fcrn_loss
    parameters = inspect.signature(function).parameters
    want = dict(SIGNATURE)
    if name != "fcrn_loss":
        del want["backend"]
    assert list(parameters) == ["pred", "target", *want]
    for keyword, default in want.items():
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[keyword].default == default


MASKED = {
    "masked_mse_loss": "pred, target, weight=None, *, reduction='mean', backend='auto'",
    "reference.masked_mse_loss": "pred, target, weight=None, *, reduction='mean'",
    "MaskedMSELoss": "reduction='mean', backend='auto'",
    "MaskedMSELoss.forward": "self, pred, target, weight=None",
    "FCRNLoss.forward": "self, pred, target, *, weight=None, positive=None",
}


@pytest.mark.parametrize(("name", "want"), MASKED.items(), ids=MASKED)
def test_signatures_with_a_weight(name: str, want: str) -> None:
    signature = inspect.signature(operator.attrgetter(name)(fcrn_fused))
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == f"({want})"


def test_the_kinds_of_the_public_names() -> None:
    assert issubclass(fcrn_fused.FCRNLoss, torch.nn.Module)
    assert issubclass(fcrn_fused.MaskedMSELoss, torch.nn.Module)
    assert issubclass(fcrn_fused.FCRNLossFunction, torch.autograd.Function)
    assert issubclass(fcrn_fused.FCRNLossStats, tuple)
    assert fcrn_fused.FCRNLossStats._fields == (
        "coord",
        "positive_conf",
        "negative_conf",
        "num_positive",
    )


def test_signatures_of_the_schedules() -> None:
    step = inspect.signature(fcrn_fused.StepNegativeWeight).parameters
    assert {name: p.default for name, p in step.items() if name != "loss"} == {
        "initial": 0.01,
        "gamma": 1.05,
        "step_size": 100,
        "final": 1.0,
    }
    linear = inspect.signature(fcrn_fused.LinearNegativeWeight).parameters
    assert {name: p.default for name, p in linear.items() if name != "loss"} == {
        "initial": 0.01,
        "final": 1.0,
        "total_iters": inspect.Parameter.empty,
    }
    for parameters in (step, linear):
        assert next(iter(parameters)) == "loss"
        keywords = list(parameters.values())[1:]
        assert {p.kind for p in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    for name in ("step", "get_last_weight", "state_dict", "load_state_dict"):
        assert callable(getattr(fcrn_fused.StepNegativeWeight, name))
        assert callable(getattr(fcrn_fused.LinearNegativeWeight, name))


def test_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\S*)", fcrn_fused.__version__)


def test_everything_public_has_a_docstring() -> None:
    for name in fcrn_fused.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(fcrn_fused, name))
    for owner in (
        fcrn_fused.FCRNLoss,
        fcrn_fused.MaskedMSELoss,
        fcrn_fused.StepNegativeWeight,
        fcrn_fused.LinearNegativeWeight,
    ):
        for name, member in inspect.getmembers(owner, inspect.isfunction):
            if not name.startswith("_") and name in vars(owner):
                assert member.__doc__, f"{owner.__name__}.{name}"
