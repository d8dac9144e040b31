"""The autograd node of the fused loss: who keeps the gradient, and when it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .reductions import OUTPUTS
from .tracing import is_traced
from .validation import Rule


class FCRNLossFunction(torch.autograd.Function):
    """The fused loss as an `autograd.Function`; `fcrn_fused.fcrn_loss` checks and calls it.

    `apply(pred, target, negative_weight, positive_weight, coord_weight, ignore_value, reduction)`
    returns `(loss, coord, positive_conf, negative_conf, num_positive)`, positional arguments only;
    the loss alone is differentiable. `coord_weight` is a number, a tuple of C - 1 numbers or a
    tensor; the rest is as in `fcrn_loss`. Four more are optional: `weight` and `positive`, which a
    change in place between forward and backward makes an error; `has_kinds`, False for
    `masked_mse_loss`; `want_stats`, False for None in place of the parts.

    In eager mode the forward pass writes the gradient for a grad_output of 1 as well, and the first
    backward pass hands it out, put right in place for another grad_output. `save_for_backward`
    would hand the same tensor to a second backward after its owner may have changed it; so the
    second one computes the gradient anew, as do traced code, float16 (which must not be rounded
    before a loss scale is applied) and reductions with a result for each cell.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        negative_weight: float | Tensor,
        positive_weight: float,
        coord_weight: float | tuple[float, ...] | Tensor,
        ignore_value: float | None,
        reduction: str,
        weight: Tensor | None = None,
        positive: Tensor | None = None,
        has_kinds: bool = True,
        want_stats: bool = True,
    ) -> tuple[Tensor | None, ...]:
        rule = Rule(
            negative_weight,
            positive_weight,
            coord_weight,
            ignore_value,
            reduction,
            weight,
            positive,
            has_kinds,
        )
        arguments = ops.op_arguments(pred, rule)
        results: Sequence[Tensor | None]
        if is_traced():
            results = ops.forward(pred, target, arguments)
        else:
            arguments = ops.without_cpu_weights(pred, arguments)
            grad = None
            if ctx.needs_input_grad[0] and reduction not in OUTPUTS and pred.dtype != torch.float16:
                grad = ctx.kept_grad = torch.empty_like(pred)
            results = ops.run_forward(pred, target, arguments, want_stats, grad)
        loss, parts, num_positive = results
        # Copies: whoever fills a weight before backward does not change this gradient.
        copies = [None if given is None else given.clone() for given in arguments[:2]]
        # A tensor kept on ctx itself is lost where autograd is compiled.
        ctx.save_for_backward(pred, target, *copies, *arguments[2:5], num_positive)
        ctx.settings, ctx.reduction = arguments[5:], reduction
        ctx.set_materialize_grads(False)
        by_kind = (None,) * 3 if parts is None else parts.unbind()
        rest = (*by_kind, num_positive)
        ctx.mark_non_differentiable(*(part for part in rest if part is not None))
        return (loss, *rest)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # raises where one was changed in place
        pred, target, *tensors, num_positive = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        rest = (None,) * 9
        if grad_output is None:  # the parts of the loss were used, the loss was not
            return *grads, *rest
        arguments = (*tensors, *ctx.settings)
        if torch.is_grad_enabled():  # create_graph=True: must be differentiable in its turn
            rule = ops.rule_of(arguments, ctx.reduction)
            grad = reference.gradient(grad_output, pred, target, rule)
            if ctx.needs_input_grad[0]:
                grads[0] = grad.to(pred.dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = -grad.to(target.dtype)
            return *grads, *rest
        is_recorded = is_traced() or _is_batched(grad_output)
        for i in (0, 1):
            if not ctx.needs_input_grad[i]:
                continue
            if is_recorded:
                grads[i] = ops.backward(grad_output, pred, target, arguments, num_positive, i == 1)
            else:
                grads[i] = ops.run_backward(
                    grad_output,
                    pred,
                    target,
                    arguments,
                    num_positive,
                    wrt_target=i == 1,
                    rescaled=vars(ctx).pop("kept_grad", None) if i == 0 else None,
                )
        return *grads, *rest


def _is_batched(grad_output: Tensor) -> bool:
    """Whether it holds several (`is_grads_batched`, vmap); PyTorch has no public name for that."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad_output) or functorch.is_legacy_batchedtensor(grad_output)
