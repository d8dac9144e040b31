"""benchmarks/step_breakdown.py: the parts that it takes a step into."""

import pytest
import step_breakdown
import torch
import workloads
from workloads import Case

from fcrn_fused import ops

pytestmark = pytest.mark.skipif(ops.why_not("cpu") is not None, reason=str(ops.why_not("cpu")))


@pytest.fixture
def inputs():
    case = Case((2, 7, 16, 16), workloads.parse_pattern("clustered:2"), "float32", "contiguous", 1)
    return workloads.make_inputs(case, torch.device("cpu"))


def test_a_step_of_nothing_leaves_the_gradient_that_was_there(inputs):
    step = step_breakdown.make_step(inputs, torch.tensor(0.5))
    nothing = step_breakdown.without_operators(step)
    before = dict(vars(ops))
    nothing()
    assert inputs.pred.grad is not None
    recorded = inputs.pred.grad.clone()
    step()
    assert torch.equal(inputs.pred.grad, recorded)
    assert vars(ops) == before


def test_the_operators_of_a_step_are_found_and_can_be_called_alone(inputs):
    step = step_breakdown.make_step(inputs, torch.tensor(0.5))
    calls = step_breakdown.operator_calls(step)
    assert calls[0].name == "forward"
    assert not any(
        isinstance(value, torch.Tensor) and value.requires_grad
        for call in calls
        for value in call.arguments
    )
    step_breakdown.operators_alone(step)()


def test_a_step_without_operators_is_refused():
    with pytest.raises(RuntimeError, match="no operator"):
        step_breakdown.operator_calls(lambda: None)


def test_the_parts_add_up_to_the_step():
    case = Case((1, 7, 8, 8), workloads.parse_pattern("none"), "float32", "contiguous", 1)
    parts = step_breakdown.breakdown(case, torch.device("cpu"), rounds=1, round_seconds=1e-3)
    total = sum(parts[name] for name in (*step_breakdown.PARTS, "left over"))
    assert total == pytest.approx(parts["step"])
    assert "kernel" in step_breakdown.format_breakdown("small", case, parts)


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--round-seconds", "0"]])
def test_a_bad_argument_gets_a_clear_message(arguments, capsys):
    with pytest.raises(SystemExit):
        step_breakdown.main(arguments)
    assert "--rounds must be at least 1" in capsys.readouterr().err
