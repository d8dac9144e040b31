"""torch.export, older exporters, and opcheck on the operators beneath."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from batches import DTYPES, REDUCTIONS, make_batch
from implementations import Implementation
from tolerances import assert_loss

import fcrn_fused
from fcrn_fused import ops
from fcrn_fused.validation import Rule


class Validation(torch.nn.Module):
    """What one exports: a network with the loss of its prediction."""

    def __init__(self, impl: Implementation, **settings: Any) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(3, 7, 1)
        self.loss = impl.module(negative_weight=0.25, **settings)

    def forward(self, picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(self.network(picture), target)


def picture_and_target(device: str, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn((batch, 3, 4, 6), generator=generator).to(device)
    return picture, make_batch((batch, 7, 4, 6), device=device, ignored=0.2, seed=seed)[1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_export(impl: Implementation, reduction: str, strict: bool) -> None:
    model = Validation(impl, reduction=reduction, ignore_value=-1.0).to(impl.device)
    example = picture_and_target(impl.device)
    exported = torch.export.export(model, example, strict=strict)
    for seed in range(2):
        arguments = picture_and_target(impl.device, seed=seed)
        torch.testing.assert_close(exported.module()(*arguments), model(*arguments))


def test_export_with_a_batch_of_any_size_and_back_from_a_file(impl: Implementation) -> None:
    model = Validation(impl).to(impl.device)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        model, picture_and_target(impl.device), dynamic_shapes=({0: batch}, {0: batch})
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (2, 5, 9):
        arguments = picture_and_target(impl.device, batch=size)
        torch.testing.assert_close(loaded(*arguments), model(*arguments))


def test_the_exported_weight_is_a_buffer_that_can_be_annealed(impl: Implementation) -> None:
    model = Validation(impl).to(impl.device)
    arguments = picture_and_target(impl.device)
    exported = torch.export.export(model, arguments).module()
    assert "loss.negative_weight" in exported.state_dict()
    with torch.no_grad():
        model.loss.negative_weight.fill_(1.0)
        dict(exported.named_buffers())["loss.negative_weight"].fill_(1.0)
    torch.testing.assert_close(exported(*arguments), model(*arguments))


@pytest.mark.slow
def test_an_aot_inductor_package(fused: Implementation, tmp_path: Path) -> None:
    if fused.device == "cuda" and torch.__version__ < "2.12":
        pytest.skip("aoti_load_package of PyTorch 2.11 crashes on CUDA, with nn.MSELoss too")
    model = Validation(fused, ignore_value=-1.0).to(fused.device).eval()
    arguments = picture_and_target(fused.device)
    with torch.no_grad():
        exported = torch.export.export(model, arguments)
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "loss.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for seed in range(2):
            arguments = picture_and_target(fused.device, seed=seed)
            torch.testing.assert_close(loaded(*arguments), model(*arguments))


# ---- TorchScript, torch.fx and ONNX -------------------------------------------------------------


class Network(Validation):
    """A network that holds the loss and does not call it."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.network(picture)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [Validation, Network])
def test_torch_jit_script_is_not_supported(impl: Implementation, kind: type[Validation]) -> None:
    """It compiles each module that another one holds."""
    with pytest.raises((ValueError, RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(kind(impl))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
def test_torch_jit_trace_sees_the_weight_annealed(impl: Implementation) -> None:
    model = Validation(impl).to(impl.device)
    arguments = picture_and_target(impl.device)
    traced = torch.jit.trace(model, arguments)
    model.loss.negative_weight.fill_(1.0)
    torch.testing.assert_close(traced(*arguments), model(*arguments))


def test_symbolic_trace_of_the_loss_is_not_supported(impl: Implementation) -> None:
    with pytest.raises(TypeError, match="pred must be a tensor, got Proxy"):
        torch.fx.symbolic_trace(Validation(impl))


def test_symbolic_trace_of_a_network_that_holds_the_loss(impl: Implementation) -> None:
    network = Network(impl).to(impl.device)
    picture, _ = picture_and_target(impl.device)
    assert torch.equal(torch.fx.symbolic_trace(network)(picture), network(picture))


def test_the_loss_can_be_a_leaf_of_a_tracer(impl: Implementation) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, fcrn_fused.FCRNLoss) or super().is_leaf_module(module, name)

    model = Validation(impl).to(impl.device)
    arguments = picture_and_target(impl.device)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(*arguments), model(*arguments))


def onnx_nodes(model: Validation, arguments: tuple[torch.Tensor, ...], path: Path) -> list[str]:
    """The kinds of the nodes of `model` in ONNX."""
    import onnx

    torch.onnx.export(model.eval(), arguments, path, dynamo=True, verbose=False)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="needs ONNX: pip install onnx onnxscript"
)
def test_onnx_has_the_network_and_not_the_loss(fused: Implementation, tmp_path: Path) -> None:
    arguments = picture_and_target("cpu")
    assert onnx_nodes(Network(fused), arguments[:1], tmp_path / "network.onnx") == ["Conv"]
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"fcrn_fused\.forward"):
        onnx_nodes(Validation(fused), arguments, tmp_path / "loss.onnx")
    model = Validation(fused)
    model.loss.backend = "reference"
    assert "Conv" in onnx_nodes(model, arguments, tmp_path / "reference.onnx")


def rule_of(pred: torch.Tensor, reduction: str, *, tensors: bool = False) -> Rule:
    maps = pred.shape[1]
    if tensors:
        negative_weight = torch.tensor(0.3, device=pred.device)
        coord_weight = torch.full((maps - 1,), 0.5, device=pred.device)
        return Rule(negative_weight, 1.3, coord_weight, -1.0, reduction)
    return Rule(0.3, 1.3, [0.5] * (maps - 1), -1.0, reduction)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": lambda t: torch.cat([t, t], 3)[..., ::2],
}
CASES = [
    *itertools.product(REDUCTIONS, [torch.float32], ["contiguous"], [False, True]),
    *itertools.product(["mean", "none"], DTYPES, LAYOUTS, [False]),
]
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(operator: Any, arguments: tuple[Any, ...], utils: tuple[str, ...] = UTILS) -> None:
    result = torch.library.opcheck(operator, arguments, test_utils=utils)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("reduction", "dtype", "layout", "tensors"), CASES, ids=str)
def test_opcheck(
    fused: Implementation,
    reduction: str,
    dtype: torch.dtype,
    layout: str,
    tensors: bool,
    requires_grad: bool,
) -> None:
    pred, target = make_batch(
        (2, 3, 4, 6), dtype=dtype, device=fused.device, ignored=0.2, requires_grad=False
    )
    pred = LAYOUTS[layout](pred).requires_grad_(requires_grad)
    arguments = ops.op_arguments(pred, rule_of(pred, reduction, tensors=tensors))
    opcheck(torch.ops.fcrn_fused.forward.default, (pred, target, *arguments))
    results = torch.ops.fcrn_fused.forward.default(pred, target, *arguments)
    grad_output = torch.randn_like(results[0], requires_grad=requires_grad)
    for wrt_target in (False, True):
        opcheck(
            torch.ops.fcrn_fused.backward.default,
            (grad_output, pred, target, *arguments, results[2], wrt_target),
        )


@pytest.mark.parametrize(("reduction", "dtype", "layout", "tensors"), CASES, ids=str)
def test_opcheck_of_the_operators_that_write(
    fused: Implementation, reduction: str, dtype: torch.dtype, layout: str, tensors: bool
) -> None:
    """Those in C++, which write into what they are given."""
    pred, target = make_batch(
        (2, 3, 4, 6), dtype=dtype, device=fused.device, ignored=0.2, requires_grad=False
    )
    pred = LAYOUTS[layout](pred)
    arguments = ops.op_arguments(pred, rule_of(pred, reduction, tensors=tensors))
    results = ops.run_forward(pred, target, arguments, want_stats=True)
    workspace = ops._workspace(pred) if pred.is_cuda else None
    grad = torch.empty_like(pred)
    written = torch.ops.fcrn_fused
    opcheck(written.forward_into.default, (pred, target, *arguments, *results, grad, workspace))
    settings = (*arguments, results[2], False, False)
    opcheck(
        written.backward_into.default,
        (torch.randn_like(results[0]), pred, target, *settings, grad),
    )


def test_opcheck_of_the_sum_of_weights(fused: Implementation) -> None:
    total = torch.empty((), dtype=torch.float64, device=fused.device)
    for weight in (torch.rand(3, 5), torch.rand(40_003, dtype=torch.float64), torch.ones(37) > 0):
        weight = weight.to(fused.device)
        workspace = ops._workspace(weight)
        opcheck(torch.ops.fcrn_fused.sum_into.default, (weight, 3, total, workspace))
        torch.ops.fcrn_fused.sum_into(weight, 3, total, workspace)
        torch.testing.assert_close(total, 3 * weight.double().sum())
        torch.ops.fcrn_fused.sum_into(torch.zeros_like(weight), 3, total, workspace)
        assert total.item() == math.inf
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        torch.ops.fcrn_fused.sum_into(torch.rand(4, 4)[:, ::2], 1, total, None)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.ops.fcrn_fused.sum_into(torch.rand(3, requires_grad=True), 1, total, None)


def test_opcheck_of_dynamic_tracing(fused: Implementation) -> None:
    """AOTAutograd with symbolic sizes over the operators."""
    pred, target = make_batch((2, 3, 4, 6), device=fused.device)
    for reduction in ("mean", "positive"):
        arguments = ops.op_arguments(pred, rule_of(pred, reduction))
        utils = ("test_aot_dispatch_dynamic",)
        opcheck(torch.ops.fcrn_fused.forward.default, (pred, target, *arguments), utils)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(
    dtype: torch.dtype, reduction: str
) -> None:
    pred, target = make_batch((2, 3, 4, 6), dtype=dtype)
    real = fcrn_fused.reference.fcrn_loss(pred, target, reduction=reduction, return_stats=True)
    meta_pred = pred.detach().to("meta").requires_grad_()
    loss, stats = fcrn_fused.fcrn_loss(
        meta_pred, target.to("meta"), reduction=reduction, return_stats=True, backend="reference"
    )
    assert loss.is_meta
    assert (loss.shape, loss.dtype) == (real[0].shape, real[0].dtype)
    for part, want in zip(stats, real[1], strict=True):
        assert part.is_meta
        assert (part.shape, part.dtype) == (want.shape, want.dtype)
    loss.sum().backward()
    assert (meta_pred.grad.shape, meta_pred.grad.dtype) == (pred.shape, pred.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "positive", "cell"])
def test_fake_tensors_through_the_public_function(
    impl: Implementation, reduction: str, dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    pred, target = make_batch((2, 3, 4, 6), dtype=dtype, device=impl.device)
    pred = pred.detach()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(pred).requires_grad_()
        loss = impl.loss(fake, mode.from_tensor(target), reduction=reduction)
        loss.sum().backward()
    assert loss.shape == ((2, 4, 6) if reduction == "cell" else ())
    assert fake.grad.dtype == dtype
    assert fake.grad.stride() == pred.stride()


def test_a_loss_on_the_export_example_is_right(impl: Implementation) -> None:
    """The oracle's word on the model that the tests above compare with itself."""
    model = Validation(impl, ignore_value=-1.0).to(impl.device)
    picture, target = picture_and_target(impl.device)
    pred = model.network(picture)
    truth = oracle.fcrn_loss(pred, target, negative_weight=0.25, ignore_value=-1.0)
    assert_loss(model(picture, target), truth.loss, torch.float32)
