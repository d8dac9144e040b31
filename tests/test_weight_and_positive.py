"""`weight=` and `positive=` of `fcrn_loss`; and what holds for the weight of both losses."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch, make_weight
from calls import POISONS, check_call
from counting import passes
from hypothesis import given, settings
from implementations import Implementation
from strategies import any_call, given_kinds, given_weights
from test_export import opcheck
from test_needless_work import SMALL, allocations
from tolerances import assert_gradient, assert_loss
from torch import Tensor
from torch._dynamo.utils import counters
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fcrn_fused
from fcrn_fused import ops
from fcrn_fused.validation import Rule, make_masked_rule

SHAPE = (2, 3, 4, 5)
SETTINGS = {"negative_weight": 0.3, "coord_weight": 1.5, "ignore_value": -1.0}
Shape = tuple[int, ...]
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


class Inputs(NamedTuple):
    pred: Tensor
    target: Tensor
    weight: Tensor
    positive: Tensor


def make_inputs(
    shape: Shape = SHAPE,
    *,
    weight_shape: Shape | None = None,
    weight_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **batch: Any,
) -> Inputs:
    """A batch, a weight for each element or of `weight_shape`, and positive cells of their own."""
    pred, target = make_batch(shape, ignored=0.2, seed=seed, **batch)
    weight_shape = shape if weight_shape is None else weight_shape
    weight = make_weight(weight_shape, weight_dtype, device=pred.device, seed=seed)
    cells = (shape[0], 1, *shape[2:])
    positive = make_weight(cells, torch.bool, device=pred.device, zeros=0.7, seed=seed + 1)
    return Inputs(pred, target, weight, positive)


# ---- fcrn_loss: values --------------------------------------------------------------------------


@st.composite
def any_call_with_more(draw: st.DrawFn) -> dict[str, Any]:
    call = draw(any_call())
    return {
        **call,
        "weight": draw(given_weights(call["shape"])),
        "positive": draw(given_kinds(call["shape"])),
    }


@pytest.mark.sanitizer
@settings(max_examples=150)
@given(call=any_call_with_more())
def test_any_call_against_the_loops(impl: Implementation, call: dict[str, Any]) -> None:
    check_call(impl, call)


def check(impl: Implementation, inputs: Inputs, **given_settings: Any) -> None:
    """Loss, stats and gradient against the loops."""
    pred, target, weight, positive = inputs
    given_settings = {**SETTINGS, "weight": weight, "positive": positive, **given_settings}
    loss, stats = impl.loss(pred, target, return_stats=True, **given_settings)
    truth = oracle.fcrn_loss(pred, target, **given_settings)
    for got, want in zip((loss, *stats[:3]), (truth.loss, *truth[2:5]), strict=True):
        assert_loss(got, want, loss.dtype)
    assert stats.num_positive.item() == truth.num_positive
    assert_gradient(torch.autograd.grad(loss.sum(), pred)[0], truth.grad, pred.dtype)


@each_reduction
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_way_in_which_they_repeat_themselves(
    impl: Implementation,
    memory_format: torch.memory_format,
    weight_dtype: torch.dtype,
    reduction: str,
) -> None:
    weight_shapes = [SHAPE, (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 4, 5), (1, 3, 1, 1), ()]
    shapes = [(2, 1, 4, 5), (2, 1, 1, 5), (1, 1, 4, 1), (1, 1, 1, 1)]
    for weight_shape, shape in zip(weight_shapes, itertools.cycle(shapes), strict=False):
        inputs = make_inputs(
            weight_shape=weight_shape, weight_dtype=weight_dtype, device=impl.device
        )
        pred = inputs.pred.detach().contiguous(memory_format=memory_format).requires_grad_()
        positive = make_weight(shape, torch.bool, device=impl.device)
        check(impl, inputs._replace(pred=pred, positive=positive), reduction=reduction)


def test_positive_and_not_the_confidence_says_what_is_positive(impl: Implementation) -> None:
    """Confidences of exactly 0 are regressed to in positive cells, those above 0 in negative ones;
    a cell to ignore is no positive one."""
    pred = torch.full((1, 2, 4), 3.0, device=impl.device)
    target = torch.tensor([[[1.0, 1, 1, 1], [0, 1, -1, -1]]], device=impl.device)
    positive = torch.tensor([[[True, False, True, False]]], device=impl.device)
    loss, stats = impl.loss(
        pred,
        target,
        positive=positive,
        negative_weight=0.5,
        ignore_value=-1,
        reduction="none",
        return_stats=True,
    )
    assert loss.tolist() == [[[4, 0, 0, 0], [9, 2, 0, 0]]]
    assert [part.item() for part in stats] == [4, 9, 2, 1]


def test_a_masked_confidence_is_not_counted_but_its_pose_is(impl: Implementation) -> None:
    pred = torch.full((1, 2, 3), 3.0, device=impl.device)
    target = torch.ones_like(pred)
    weight = torch.tensor([[[2.0, 0, 1], [0, 1, 1]]], device=impl.device)
    loss, stats = impl.loss(pred, target, weight=weight, reduction="positive", return_stats=True)
    assert [part.item() for part in stats] == [12, 8, 0, 2]
    assert loss.item() == 10
    nothing = torch.zeros((1, 1, 3), dtype=torch.bool, device=impl.device)
    for reduction in REDUCTIONS:
        loss, stats = impl.loss(
            pred, target, weight=nothing, reduction=reduction, return_stats=True
        )
        assert (loss == 0).all()
        assert [part.item() for part in stats] == [0, 0, 0, 0]


@each_reduction
def test_a_weight_of_ones_and_the_kinds_of_the_table_change_nothing(
    impl: Implementation, reduction: str
) -> None:
    pred, target = make_batch((2, 7, 13, 13), device=impl.device, ignored=0.2)
    want = impl.loss(pred, target, reduction=reduction, **SETTINGS)
    (want_grad,) = torch.autograd.grad(want.sum(), pred)
    for given_settings in (
        {"weight": torch.ones((), device=impl.device)},
        {"weight": torch.ones((2, 1, 13, 13), dtype=torch.bool, device=impl.device)},
        {"positive": target[:, -1:] > 0},
    ):
        given_settings |= {**SETTINGS, "reduction": reduction}
        loss = impl.loss(pred, target, **given_settings)
        assert torch.equal(loss, want)
        assert torch.equal(torch.autograd.grad(loss.sum(), pred)[0], want_grad)


def test_more_than_2_to_the_31_elements(fused: Implementation) -> None:
    """Which take no memory: images and cells of stride 0."""
    shape = (9, 2000, 2**17)
    pred, target = (torch.zeros((1, 2000, 1), device=fused.device) for _ in range(2))
    pred[0, -1] = 0.5
    weight = torch.full((9, 1, 2**17), 2.0, device=fused.device)
    weight[-1, :, 1:] = 0
    positive = torch.zeros((9, 1, 2**17), dtype=torch.bool, device=fused.device)
    positive[-1, :, :2] = True
    loss, stats = fused.loss(
        pred.expand(shape),
        target.expand(shape),
        weight=weight,
        positive=positive,
        reduction="sum",
        return_stats=True,
    )
    assert [part.item() for part in stats] == [0, 0.5, 8 * 2**17 / 2, 1]
    assert loss.item() == 8 * 2**17 / 2 + 0.5


def test_the_module_passes_both_on(impl: Implementation) -> None:
    pred, target, weight, positive = make_inputs(device=impl.device)
    module = impl.module(return_stats=True, **SETTINGS)
    want = impl.loss(pred, target, weight=weight, positive=positive, return_stats=True, **SETTINGS)
    loss, stats = module(pred, target, weight=weight, positive=positive)
    assert torch.equal(loss, want[0])
    assert all(map(torch.equal, stats, want[1]))
    assert not torch.equal(module(pred, target)[0], loss)
    with pytest.raises(TypeError):
        module(pred, target, weight)


# ---- both losses --------------------------------------------------------------------------------

Loss = Callable[..., Tensor]
each_loss = pytest.mark.parametrize("name", ["fcrn_loss", "masked_mse_loss"])


def loss_of(impl: Implementation, name: str, reduction: str = "mean") -> Loss:
    """The loss of `Inputs`."""

    def fcrn_loss(pred: Tensor, target: Tensor, weight: Tensor, positive: Tensor) -> Tensor:
        return impl.loss(
            pred, target, weight=weight, positive=positive, reduction=reduction, **SETTINGS
        )

    def masked_mse_loss(pred: Tensor, target: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        return impl.masked_loss(pred, target, weight, reduction=reduction)

    return fcrn_loss if name == "fcrn_loss" else masked_mse_loss


def truth(name: str, inputs: Inputs, **given_settings: Any) -> tuple[np.ndarray, np.ndarray]:
    pred, target, weight, positive = inputs
    if name == "masked_mse_loss":
        return oracle.masked_mse_loss(pred, target, weight, **given_settings)
    given_settings = {**SETTINGS, "weight": weight, "positive": positive, **given_settings}
    return oracle.fcrn_loss(pred, target, **given_settings)[:2]


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("weight_shape", [(2, 3, 4, 17), (2, 1, 4, 17), (1, 3, 1, 1)], ids=str)
def test_what_is_masked_changes_nothing(
    impl: Implementation,
    weight_shape: Shape,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    name: str,
) -> None:
    """NaN and infinities there give the same bits: loss, gradients, second derivatives."""
    inputs = make_inputs(
        (2, 3, 4, 17),
        weight_shape=weight_shape,
        weight_dtype=weight_dtype,
        dtype=dtype,
        device=impl.device,
    )
    masked = (inputs.weight == 0).expand(inputs.pred.shape)
    in_target = masked.clone()
    if name == "fcrn_loss":
        in_target[:, -1] = False  # which cells are ignored is said there
    poison = torch.tensor(POISONS, device=impl.device, dtype=dtype).repeat(136).view(2, 3, 4, 17)
    for reduction in REDUCTIONS if name == "fcrn_loss" else ("mean", "sum", "none"):
        results = []
        for poisoned in (False, True):
            pair = [
                torch.where(where & poisoned, poison, x.detach()).requires_grad_()
                for where, x in zip((masked, in_target), inputs[:2], strict=True)
            ]
            loss = loss_of(impl, name, reduction)(*pair, *inputs[2:])
            first = torch.autograd.grad(loss.sum(), pair, create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), pair)
            assert all((gradient[masked] == 0).all() for gradient in (*first, *second))
            assert first[0].count_nonzero() > 30
            results.append([loss, *first, *second])
        assert all(map(torch.equal, *results))


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_second_backward_with_another_grad_output(
    impl: Implementation, dtype: torch.dtype, reduction: str, name: str
) -> None:
    """Also after the owner of the first gradient changed it in place."""
    inputs = make_inputs(dtype=dtype, device=impl.device)
    inputs.target.requires_grad_()
    loss = loss_of(impl, name, reduction)(*inputs)
    for scale in (1.0, -2.5, 0.0, 3e3):
        grads = torch.autograd.grad(
            loss, inputs[:2], torch.full_like(loss, scale), retain_graph=True
        )
        _, want = truth(name, inputs, reduction=reduction, grad_output=scale)
        assert_gradient(grads[0], want, dtype)
        assert_gradient(grads[1], -want, dtype)
        grads[0].fill_(torch.nan)


@each_loss
@pytest.mark.parametrize("weight_shape", [(2, 3, 2), (2, 1, 2), (1, 3, 1), ()], ids=str)
def test_second_derivatives_and_batched_gradients(
    impl: Implementation, weight_shape: Shape, name: str
) -> None:
    inputs = make_inputs(
        (2, 3, 2), weight_shape=weight_shape, dtype=torch.float64, device=impl.device
    )
    inputs.target.add_(0.5).requires_grad_()  # a small step ignores no cell
    inputs.weight.view(-1)[1:2] = 0
    for reduction in ("mean", "none"):
        loss = loss_of(impl, name, reduction)

        def of_pair(*pair: Tensor, loss: Loss = loss) -> Tensor:
            return loss(*pair, *inputs[2:])

        assert torch.autograd.gradcheck(of_pair, inputs[:2])
        assert torch.autograd.gradgradcheck(of_pair, inputs[:2])
        value = loss(*inputs)
        upstream = torch.randn(3, *value.shape, dtype=torch.float64).to(impl.device)
        options = {"retain_graph": True}
        each = [torch.autograd.grad(value, inputs[:2], v, **options) for v in upstream]
        got = torch.autograd.grad(value, inputs[:2], upstream, is_grads_batched=True, **options)
        want = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
        torch.testing.assert_close(got, want)


@each_loss
def test_a_number_on_the_cpu_weighs_tensors_elsewhere(impl: Implementation, name: str) -> None:
    pred, target, weight, positive = make_inputs(weight_shape=())
    moved = [x.detach().to("meta") for x in (pred, target, positive)]
    moved[0].requires_grad_()
    loss = loss_of(impl, name)(*moved[:2], weight, moved[2])
    (gradient,) = torch.autograd.grad(loss, moved[0])
    assert (loss.device, loss.shape, gradient.shape) == (torch.device("meta"), (), SHAPE)


@each_loss
@pytest.mark.parametrize("which", ["weight", "positive"])
@pytest.mark.parametrize("weight_shape", [SHAPE, ()], ids=str)
def test_a_weight_changed_in_place_is_an_error_or_has_no_effect(
    impl: Implementation, weight_shape: Shape, which: str, name: str
) -> None:
    for reduction, scale, create_graph in itertools.product(
        ("mean", "none"), (1.0, 3.0), (False, True)
    ):
        inputs = make_inputs(weight_shape=weight_shape, device=impl.device)
        loss = loss_of(impl, name, reduction)(*inputs)
        _, want = truth(name, inputs, reduction=reduction, grad_output=scale)
        changed = getattr(inputs, which)
        changed.copy_(changed == 0)
        for _ in range(2):
            try:
                (got,) = torch.autograd.grad(
                    scale * loss.sum(), inputs.pred, retain_graph=True, create_graph=create_graph
                )
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)  # noqa: PT017
            else:
                assert_gradient(got, want, torch.float32)


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


@each_loss
@pytest.mark.parametrize(
    ("weight_dtype", "layout"),
    [
        (torch.bool, torch.clone),
        (torch.float32, lambda w: w.contiguous(memory_format=torch.channels_last)),
        (torch.float32, every_second),
        (torch.bfloat16, every_second),
    ],
    ids=["bool", "channels_last", "strided", "strided-bfloat16"],
)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_every_number_of_threads(
    impl: Implementation, weight_dtype: torch.dtype, layout: Callable[..., Tensor], name: str
) -> None:
    """The sum of the weights, by which the mean divides, among them."""
    if impl.device != "cpu":
        pytest.skip("the number of threads is the CPU's")
    inputs = make_inputs((2, 7, 111, 113), weight_dtype=weight_dtype)
    inputs = inputs._replace(weight=layout(inputs.weight))
    rule = make_masked_rule(inputs.weight, "mean")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = loss_of(impl, name)(*inputs)
        (grad,) = torch.autograd.grad(0.7 * loss, inputs.pred)
        total = fcrn_fused.reference.weight_sum(inputs.pred, rule)
        results.append([loss.detach(), grad, total])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# ---- needless work ------------------------------------------------------------------------------

LARGE = (16, 7, 64, 64)


@each_loss
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_shape", [LARGE, (16, 1, 64, 64), (1, 7, 1, 1)], ids=str)
def test_nothing_but_the_gradient_grows_with_the_input(
    fused: Implementation, weight_shape: Shape, weight_dtype: torch.dtype, name: str
) -> None:
    """No mask in float, no weight expanded; without a gradient, nothing at all."""
    pred, target, weight, positive = make_inputs(
        LARGE, weight_shape=weight_shape, weight_dtype=weight_dtype, device=fused.device
    )
    loss = loss_of(fused, name)
    gradient = 4 * pred.numel()
    given = (weight, weight.contiguous(memory_format=torch.channels_last), weight.expand(LARGE))
    for each in given:
        run = functools.partial(loss, pred, target, each, positive)
        for scale in (1.0, 2.0):
            peak, _ = allocations(
                fused.device, lambda scale=scale, run=run: torch.autograd.grad(scale * run(), pred)
            )
            assert gradient <= peak <= gradient + SMALL
        with torch.no_grad():
            assert allocations(fused.device, run)[0] <= SMALL
            assert passes(run) == 1


# ---- compiled, exported, traced -----------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@each_loss
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(impl: Implementation, name: str) -> None:
    """One graph for all weights and sizes."""
    step = torch.compile(loss_of(impl, name), backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in range(3):
        cells = (2 + seed, 1, 4 + 2 * seed, 5)
        shape = (cells[0], 3, *cells[2:])
        inputs = make_inputs(shape, weight_shape=cells, seed=seed, device=impl.device)
        loss = step(*inputs)
        (gradient,) = torch.autograd.grad(3 * loss, inputs.pred)
        want, want_grad = truth(name, inputs, grad_output=3.0)
        assert_loss(loss, want, torch.float32)
        assert_gradient(gradient, want_grad, torch.float32)
    assert counters["stats"]["unique_graphs"] == 1


class Step(torch.nn.Module):
    def __init__(self, impl: Implementation, name: str, reduction: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Conv2d(3, 3, 1, device=impl.device)
        self.loss = loss_of(impl, name, reduction)

    def forward(self, picture: Tensor, target: Tensor, weight: Tensor, positive: Tensor) -> Tensor:
        return self.loss(self.network(picture), target, weight, positive)


def by_export(step: Step, inputs: Inputs) -> Any:
    sizes = {0: torch.export.Dim("batch")}
    return torch.export.export(step, inputs, dynamic_shapes=(sizes,) * 4).module()


def by_jit_trace(step: Step, inputs: Inputs) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about shapes that are looked at
        return torch.jit.trace(step, inputs)


def by_compile(step: Step, _: Inputs) -> Any:
    return torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("program_of", [by_export, by_jit_trace, by_compile])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_step_that_was_exported_or_traced_trains(
    impl: Implementation, program_of: Callable[[Step, Inputs], Any], reduction: str, name: str
) -> None:
    """With other weights, also of a larger batch."""
    step = Step(impl, name, reduction)

    def inputs(batch: int) -> Inputs:
        return make_inputs(
            (batch, 3, 4, 5),
            weight_shape=(batch, 1, 4, 5),
            seed=batch,
            requires_grad=False,
            device=impl.device,
        )

    program = program_of(step, inputs(2))
    for batch in (2, 5):
        results = []
        for each in (step, program):
            loss = each(*inputs(batch))
            grads = torch.autograd.grad(3 * loss.sum(), list(each.parameters()))
            results.append([loss.detach(), *grads])
        torch.testing.assert_close(*results)


@each_loss
@pytest.mark.parametrize(
    ("mode", "weight_shape"), [("real", ()), ("symbolic", (2, 1, 4, 5))], ids=str
)
def test_make_fx(impl: Implementation, weight_shape: Shape, mode: str, name: str) -> None:
    """A loss, and a whole step; neither is that of the example's weights."""
    loss = loss_of(impl, name)

    def step(pred: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        pred = pred.detach().requires_grad_()
        return torch.autograd.grad(2 * loss(pred, *rest), pred)

    def inputs(seed: int) -> Inputs:
        return make_inputs(weight_shape=weight_shape, seed=seed, device=impl.device)

    program = make_fx(loss, tracing_mode=mode)(*inputs(0))
    step_program = make_fx(step, tracing_mode=mode)(*inputs(0))
    for seed in range(2):
        given_inputs = inputs(seed)
        want, want_grad = truth(name, given_inputs, grad_output=2.0)
        value = program(*given_inputs)
        assert_loss(value, want, torch.float32)
        (got,) = torch.autograd.grad(2 * value, given_inputs.pred)
        for gradient in (got, step_program(*given_inputs)[0]):
            assert_gradient(gradient, want_grad, torch.float32)


@each_loss
@pytest.mark.parametrize("shape", [(2, 20_000), (1, 1, 40_000)], ids=str)
def test_a_traced_sum_takes_more_elements_than_its_example(
    impl: Implementation, shape: Shape, name: str
) -> None:
    def inputs(shape: Shape) -> Inputs:
        return make_inputs(shape, requires_grad=False, device=impl.device)

    loss = loss_of(impl, name)
    program = make_fx(loss, tracing_mode="symbolic")(*inputs(shape))
    larger = inputs((*shape[:-1], 3 * shape[-1]))
    torch.testing.assert_close(program(*larger), loss(*larger))


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "weight", [{}, {"weight_shape": (2, 1, 4, 5), "weight_dtype": torch.bool}, {"weight_shape": ()}]
)
def test_opcheck(
    fused: Implementation, weight: dict[str, Any], requires_grad: bool, reduction: str, name: str
) -> None:
    inputs = make_inputs(requires_grad=requires_grad, device=fused.device, **weight)
    if name == "fcrn_loss":
        rule = Rule(0.3, 1.3, 0.5, -1.0, reduction, *inputs[2:])
    else:
        rule = make_masked_rule(inputs.weight, reduction)
    arguments = ops.op_arguments(inputs.pred, rule)
    opcheck(torch.ops.fcrn_fused.forward.default, (*inputs[:2], *arguments))
    loss, _, num_positive = torch.ops.fcrn_fused.forward.default(*inputs[:2], *arguments)
    upstream = torch.randn_like(loss).detach().requires_grad_(requires_grad)
    of_backward = (upstream, *inputs[:2], *arguments, num_positive)
    for wrt_target in (False, True):
        opcheck(torch.ops.fcrn_fused.backward.default, (*of_backward, wrt_target))


@each_loss
def test_functorch_is_the_reference_without_a_warning(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcrn_fused.functional, "_warned", False)
    inputs = make_inputs(dtype=torch.float64, requires_grad=False, device=device)
    weights = torch.stack([inputs.weight, 2 * inputs.weight.roll(1)])
    loss = loss_of(Implementation("auto", device), name)
    of_reference = loss_of(Implementation("reference", device), name)
    pred = inputs.pred.clone().requires_grad_()
    (want,) = torch.autograd.grad(of_reference(pred, *inputs[1:]), pred)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(grad(loss)(*inputs), want)
        by_weight = vmap(loss, in_dims=(None, None, 0, None))(*inputs[:2], weights, inputs[3])
        each = [of_reference(*inputs[:2], weight, inputs[3]) for weight in weights]
        torch.testing.assert_close(by_weight, torch.stack(each))
        _, tangent = jvp(lambda p: loss(p, *inputs[1:]), (pred.detach(),), (pred.detach(),))
        torch.testing.assert_close(tangent, (want * pred).sum().detach())
    refused = loss_of(Implementation("fused", device), name)
    with pytest.raises(RuntimeError, match=r"fused.*torch\.func"):
        grad(refused)(*inputs)
    with pytest.raises(RuntimeError, match=r"fused.*torch\.func"):
        vmap(refused, in_dims=(None, None, 0, None))(*inputs[:2], weights, inputs[3])


# ---- bad input ----------------------------------------------------------------------------------

ENTRANCES: dict[str, Callable[..., Any]] = {
    "fcrn_loss": fcrn_fused.fcrn_loss,
    "reference.fcrn_loss": fcrn_fused.reference.fcrn_loss,
    "FCRNLoss": fcrn_fused.FCRNLoss(),
    "masked_mse_loss": fcrn_fused.masked_mse_loss,
    "reference.masked_mse_loss": fcrn_fused.reference.masked_mse_loss,
    "MaskedMSELoss": fcrn_fused.MaskedMSELoss(),
}
BAD_WEIGHTS = [
    (0.5, TypeError, "weight.*float"),
    ([1.0], TypeError, "weight.*list"),
    (np.ones(SHAPE), TypeError, "weight.*ndarray"),
    (torch.ones(SHAPE, dtype=torch.int64), ValueError, r"weight.*bool.*torch\.int64"),
    (torch.ones((), dtype=torch.uint8), ValueError, r"weight.*torch\.uint8"),
    (torch.ones(SHAPE, dtype=torch.complex64), ValueError, r"weight.*torch\.complex64"),
    (torch.ones(2, 4, 5), ValueError, r"weight.*\(2, 4, 5\).*unsqueeze"),
    (torch.ones(5), ValueError, r"weight.*\(5,\).*unsqueeze"),
    (torch.ones(2, 3, 4, 4), ValueError, r"weight.*\(2, 3, 4, 5\).*\(2, 3, 4, 4\)"),
    (torch.ones(1, 2, 3, 4, 5), ValueError, r"weight.*\(1, 2, 3, 4, 5\)"),
    (torch.ones(SHAPE, requires_grad=True), ValueError, "weight.*requires_grad=True"),
    (torch.ones((), requires_grad=True) * 2, ValueError, "weight.*requires_grad=True"),
    (torch.ones(SHAPE, device="meta"), ValueError, "weight.*cpu.*meta"),
    (torch.ones((), device="meta"), ValueError, "weight.*cpu.*meta"),
    (torch.ones(SHAPE).to_sparse(), ValueError, "weight.*sparse"),
]
BAD_POSITIVES = [
    (True, TypeError, "positive.*bool"),
    (torch.ones(2, 1, 4, 5), ValueError, r"positive.*bool.*torch\.float32"),
    (torch.ones(2, 1, 4, 5, dtype=torch.uint8), ValueError, r"positive.*bool.*torch\.uint8"),
    (torch.ones(2, 4, 5, dtype=torch.bool), ValueError, r"positive.*\(2, 4, 5\).*unsqueeze"),
    (torch.ones((), dtype=torch.bool), ValueError, r"positive.*\(2, 1, 4, 5\).*\(\)"),
    (torch.ones(SHAPE, dtype=torch.bool), ValueError, r"positive.*\(2, 1, 4, 5\).*\(2, 3, 4, 5\)"),
    (torch.ones(2, 1, 4, 5, dtype=torch.bool, device="meta"), ValueError, "positive.*cpu.*meta"),
]
BAD = [
    *((name, "weight", *bad) for name in ENTRANCES for bad in BAD_WEIGHTS),
    *((name, "positive", *bad) for name in list(ENTRANCES)[:3] for bad in BAD_POSITIVES),
]


@pytest.mark.parametrize(("name", "keyword", "value", "error", "message"), BAD)
def test_bad_input_is_named(
    name: str, keyword: str, value: Any, error: type[Exception], message: str
) -> None:
    pred, target = make_batch(SHAPE)
    with pytest.raises(error, match=message):
        ENTRANCES[name](pred, target, **{keyword: value})
    with torch.no_grad(), pytest.raises(error, match=message):
        ENTRANCES[name](pred, target, **{keyword: value})


@each_loss
def test_more_dimensions_than_the_kernels_take(
    fused: Implementation, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback, where there is a weight for contiguous tensors too; "fused" says why not."""
    inputs = make_inputs((2, 1, *[2] * 17), weight_shape=(1,) * 19, device=fused.device)
    auto, reference = (Implementation(each, fused.device) for each in ("auto", "reference"))

    def loss(impl: Implementation) -> Tensor:
        if name == "fcrn_loss":
            return impl.loss(*inputs[:2], weight=inputs.weight, positive=inputs.positive)
        return impl.masked_loss(*inputs[:3])

    most = 18 if name == "fcrn_loss" else 17
    with pytest.raises(RuntimeError, match=f"more than {most} dimensions"):
        loss(fused)
    monkeypatch.setattr(fcrn_fused.functional, "_warned", False)
    with pytest.warns(RuntimeWarning, match=f"more than {most} dimensions"):
        value = loss(auto)
    assert torch.equal(value, loss(reference))
