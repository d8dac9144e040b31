"""One call of the loss in full: how its inputs lie in memory, what they hold, what must come out.

A call is a dictionary of plain values, so that a failing one can be printed and run again:
shape, pred_dtype, target_dtype, pred_layout, target_layout, seed, positives (the share of positive
cells), poisoned (NaN and infinity in masked places), magnitude, grad_output, settings (the
keywords of the loss) and weights_in_tensors; with the tensors `weight` and `positive` also their
shape, dtype, layout and the share of zeros.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import torch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss, loss_dtype

POISONS = (math.nan, math.inf, -math.inf)


def laid_out(values: torch.Tensor, layout: dict[str, Any], *, may_expand: bool) -> torch.Tensor:
    """`values` in that layout, with NaN in every gap; a dimension of stride 0 repeats its first."""
    sizes = [
        min(1, size) if may_expand and dim in layout["expanded"] else size
        for dim, size in enumerate(values.shape)
    ]
    strides = [0] * len(sizes)
    length = 1
    for dim in reversed(layout["order"]):
        strides[dim] = length * layout["steps"][dim]
        length = strides[dim] * max(1, sizes[dim])
    store = torch.full(
        (layout["offset"] + length + 1,), math.nan, dtype=values.dtype, device=values.device
    )
    view = store.as_strided(sizes, strides, layout["offset"])
    view.copy_(values[tuple(slice(0, size) for size in sizes)])
    return view.expand(values.shape)


def given_tensor(call: dict[str, Any], name: str, device: str) -> torch.Tensor | None:
    """The call's `weight` or `positive`, if it has one: zeros, else numbers between 0 and 4."""
    plan = call.get(name)
    if plan is None:
        return None
    generator = np.random.default_rng([call["seed"], len(name)])
    values = np.asarray(4 * generator.random(plan["shape"]))
    values = np.where(generator.random(plan["shape"]) < plan["zeros"], 0, values)
    tensor = torch.from_numpy(values).to(plan["dtype"])
    return moved(laid_out(tensor, plan["layout"], may_expand=True), device)


def tensors_of(call: dict[str, Any], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The call's `(pred, target)` on a device; masked places are poisoned if it says so."""
    generator = np.random.default_rng(call["seed"])
    shape = call["shape"]
    pred = generator.normal(size=shape) * call["magnitude"]
    target = generator.normal(size=shape) * call["magnitude"]
    cells = (shape[0], *shape[2:])
    kind = generator.random(cells)
    confidence = np.zeros(cells)
    positive = kind < call["positives"]
    confidence[positive] = generator.random(cells)[positive] + 2e-3
    ignore_value = call["settings"]["ignore_value"]
    if ignore_value is not None:
        confidence[generator.random(cells) < 0.2] = ignore_value
    target[:, -1] = confidence
    pred_tensor = torch.from_numpy(pred).to(call["pred_dtype"])
    target_tensor = torch.from_numpy(target).to(call["target_dtype"])
    target_tensor = laid_out(target_tensor, call["target_layout"], may_expand=True)
    if call["poisoned"]:
        confidence_now = target_tensor[:, -1:].double()
        is_positive = given_tensor(call, "positive", "cpu")
        is_positive = confidence_now > 0 if is_positive is None else is_positive
        masked = (~is_positive).expand(shape).clone()
        masked[:, -1:] = False
        if ignore_value is not None:
            rounded = torch.tensor(ignore_value, dtype=torch.float64).to(call["target_dtype"])
            masked |= confidence_now == rounded.double()
        if (weight := given_tensor(call, "weight", "cpu")) is not None:
            masked |= weight == 0
        poison = torch.from_numpy(generator.choice(POISONS, size=shape))
        pred_tensor = torch.where(masked, poison.to(pred_tensor.dtype), pred_tensor)
    pred_tensor = laid_out(pred_tensor, call["pred_layout"], may_expand=False)
    return moved(pred_tensor, device), moved(target_tensor, device)


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """To a device with its strides, which `.to` does not keep for tensors with gaps."""
    if device == "cpu":
        return tensor
    store = torch.empty((0,), dtype=tensor.dtype, device=device)
    store.set_(tensor.untyped_storage().to(device=device))
    return store.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_call(impl: Implementation, call: dict[str, Any]) -> None:
    """Loss, stats and both gradients, twice, against the loops; the same loss under no_grad."""
    pred, target = tensors_of(call, impl.device)
    settings = dict(call["settings"])
    for name in ("weight", "positive"):
        if (tensor := given_tensor(call, name, impl.device)) is not None:
            settings[name] = tensor
    given_settings = dict(settings)
    if call["weights_in_tensors"]:
        for name in ("negative_weight", "coord_weight"):
            given_settings[name] = torch.tensor(
                settings[name], dtype=torch.float64, device=impl.device
            )
    pred.requires_grad_()
    target.requires_grad_()
    loss, stats = impl.loss(pred, target, return_stats=True, **given_settings)
    wide = loss_dtype(pred.dtype, target.dtype)
    truth = oracle.fcrn_loss(pred, target, grad_output=call["grad_output"], **settings)
    assert_loss(loss, truth.loss, wide)
    assert_loss(stats.coord, truth.coord, wide)
    assert_loss(stats.positive_conf, truth.positive_conf, wide)
    assert_loss(stats.negative_conf, truth.negative_conf, wide)
    assert stats.num_positive.item() == truth.num_positive
    upstream = torch.full_like(loss, call["grad_output"])
    for _ in range(2):
        grads = torch.autograd.grad(loss, (pred, target), upstream, retain_graph=True)
        assert_gradient(grads[0], truth.grad, pred.dtype)
        assert_gradient(grads[1], -truth.grad, target.dtype)
    with torch.no_grad():
        assert torch.equal(
            impl.loss(pred, target, **given_settings).nan_to_num(7), loss.nan_to_num(7)
        )
