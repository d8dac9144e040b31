"""The autograd node of the fused loss: when the gradient is computed, and when it is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .reductions import OUTPUTS
from .tracing import is_traced
from .validation import Rule

_RULE_SIZE = len(Rule._fields)


class FCRNLossFunction(torch.autograd.Function):
    """The fused loss as an `autograd.Function`, without the checks of `fcrn_fused.fcrn_loss`.

    `apply(pred, target, negative_weight, positive_weight, coord_weight, ignore_value, reduction)`
    returns `(loss, coord, positive_conf, negative_conf, num_positive)`; only the loss is
    differentiable. Arguments are positional and as in `fcrn_loss`, except that numbers are floats.
    Four more are optional: `weight` and `positive`, which must not be changed in place between
    forward and backward; `has_kinds`, False for `masked_mse_loss`; and `want_stats`, False to get
    None in place of the parts.

    In eager mode, forward also writes the gradient for a grad_output of 1. The first backward
    returns that tensor, corrected in place for any other grad_output. Later ones recompute the
    gradient, because the first tensor is the caller's to change. So do traced code, float16 (whose
    gradients must not be rounded before the loss scale is applied) and reductions with a result
    for each cell.
    """

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, target: Tensor, *settings: Any
    ) -> tuple[Tensor | None, ...]:
        rule = Rule(*settings[:_RULE_SIZE])
        (want_stats,) = settings[_RULE_SIZE:] or (True,)
        arguments = ops.op_arguments(pred, rule)
        if is_traced():
            results = ops.forward(pred, target, arguments)
        else:
            arguments = ops.without_cpu_weights(pred, arguments)
            grad = None
            is_scalar = rule.reduction not in OUTPUTS
            if ctx.needs_input_grad[0] and is_scalar and pred.dtype != torch.float16:
                grad = ctx.kept_grad = torch.empty_like(pred)
            results = ops.run_forward(pred, target, arguments, want_stats, grad)
        loss, parts, num_positive = results
        ops.save_for_backward(ctx, pred, target, arguments, num_positive)
        ctx.reduction = rule.reduction
        by_kind = (None,) * 3 if parts is None else parts.unbind()
        stats = (*by_kind, num_positive)
        ctx.mark_non_differentiable(*(part for part in stats if part is not None))
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # This raises if a saved tensor was changed in place.
        pred, target, *tensors, num_positive = ctx.saved_tensors
        arguments = (*tensors, *ctx.settings)
        grads: list[Tensor | None] = [None, None]
        needed = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        if grad_output is None:  # only the parts of the loss were used
            pass
        elif torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            rule = ops.rule_of(arguments, ctx.reduction)
            grad = reference.gradient(grad_output, pred, target, rule)
            for i in needed:
                grads[i] = -grad.to(target.dtype) if i == 1 else grad.to(pred.dtype)
        else:
            inputs = (grad_output, pred, target, arguments, num_positive)
            is_recorded = is_traced() or _is_batched(grad_output)
            for i in needed:
                if is_recorded:
                    grads[i] = ops.backward(*inputs, i == 1)
                else:
                    kept = vars(ctx).pop("kept_grad", None) if i == 0 else None
                    grads[i] = ops.run_backward(*inputs, wrt_target=i == 1, rescaled=kept)
        return *grads, *(None,) * (_RULE_SIZE + 1)


def _is_batched(grad_output: Tensor) -> bool:
    """Whether it is batched (`is_grads_batched`, vmap); PyTorch has no public name for this."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad_output) or functorch.is_legacy_batchedtensor(grad_output)
