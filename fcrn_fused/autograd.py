"""The autograd node of the fused loss: who keeps the gradient, and when it is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .validation import Rule

_SCALAR_REDUCTIONS = ("mean", "sum", "batchmean", "positive")


class FCRNLossFunction(torch.autograd.Function):
    """The fused loss as an `autograd.Function`; `fcrn_fused.fcrn_loss` checks and calls it.

    `apply(pred, target, negative_weight, positive_weight, coord_weight, ignore_value, reduction)`
    returns `(loss, coord, positive_conf, negative_conf, num_positive)`, positional arguments only;
    the loss alone is differentiable. `coord_weight` is a number, a sequence of C - 1 numbers or a
    tensor; the rest is as in `fcrn_loss`. One more argument, False, leaves out the four parts.

    In eager mode the forward launch writes the gradient for a grad_output of 1 as well. It is kept
    as a plain attribute and handed out once: kept by `save_for_backward`, a second backward would
    find that its owner has changed it. Where grad_output is not 1, the backward launch puts it
    right in place; later backwards, traced code, float16 (which must not be rounded before a loss
    scale is applied) and reductions with a result for each cell compute it then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        negative_weight: float | Tensor,
        positive_weight: float,
        coord_weight: Any,
        ignore_value: float | None,
        reduction: str,
        return_stats: bool = True,
    ) -> tuple[Tensor, ...]:
        if isinstance(coord_weight, (float, int)):
            coord_weight = (coord_weight,)
        rule = Rule(negative_weight, positive_weight, coord_weight, ignore_value, reduction)
        keep_grad = (
            ctx.needs_input_grad[0]
            and reduction in _SCALAR_REDUCTIONS
            and pred.dtype is not torch.float16
            and not torch.compiler.is_compiling()
        )
        result = ops.forward(
            pred,
            target,
            rule,
            want_grad=keep_grad,
            want_stats=return_stats or reduction == "positive",
        )
        if keep_grad:
            result, ctx.kept_grad = result[:-1], result[-1]
        ctx.save_for_backward(
            pred,
            target,
            negative_weight if isinstance(negative_weight, Tensor) else None,
            coord_weight if isinstance(coord_weight, Tensor) else None,
            result[4] if reduction == "positive" else None,
        )
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        if not return_stats:
            return result[:1]
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output = grad_outputs[0]
        pred, target, negative_weight, coord_weight, num_positive = ctx.saved_tensors
        rule = ctx.rule
        needs_pred, needs_target = ctx.needs_input_grad[:2]
        grad_pred = grad_target = None
        if grad_output is None:
            pass
        elif torch.is_grad_enabled():  # create_graph=True: must be differentiable in its turn
            grad = reference.gradient(grad_output, pred, target, rule)
            grad_pred = grad.to(pred.dtype) if needs_pred else None
            grad_target = -grad.to(target.dtype) if needs_target else None
        else:
            if needs_pred:
                grad_pred = vars(ctx).pop("kept_grad", None)  # given away once
                if grad_pred is None:
                    grad_pred = ops.backward(grad_output, pred, target, rule, num_positive)
                else:
                    ops.rescale_(grad_pred, grad_output, pred, target, rule, num_positive)
            if needs_target:
                grad_target = ops.backward(
                    grad_output, pred, target, rule, num_positive, wrt_target=True
                )
        return grad_pred, grad_target, None, None, None, None, None, None
