"""Gradients and vmap of the ops.

Each op has one autograd.Function. The public functions apply it directly: with forward and setup_context apart it works
under torch.func, and it costs less per call than a registered formula. Its static methods are registered for the raw
op too, so that whoever calls torch.ops.flash_attn_ext.forward can train as well.

Attention and merge have no gradient of the gradient, and say so when one is asked for; softmax has one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from . import batching
from .ops import ops

# Places among the arguments of the op forward: q, k, v, nine optional tensors, then numbers.
_BIAS, _SINKS, _FIRST_NUMBER = 3, 6, 12


def run(function: type[Function], *args: Any) -> Any:
    """Applies `function` where autograd or torch.func has to see it, and else calls its op straight away.

    While torch.compile traces, the op always: it carries the same formula, and Dynamo takes no autograd.Function with
    one tensor in two places, as in attention(x, x, x).
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and _any_requires_grad(args))
    ):
        return function.apply(*args)
    return function.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110 (a loop takes half the time of a generator in any())
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _call(op: Any, *args: Any) -> Any:
    """The op without its registered formula, which has nothing to do here and takes longer than a small call."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "flash_attn_ext has no gradient of the gradient of attention and merge; where one is needed, use "
        "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


class Attention(Function):
    """(arguments of the op forward, deterministic) -> (out, lse)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _call(ops.forward.default, *args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:_FIRST_NUMBER])
        ctx.numbers = inputs[_FIRST_NUMBER:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, *options = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        bias_requires_grad = ctx.needs_input_grad[_BIAS]
        dq, dk, dv, dbias, dsinks = run(
            AttentionBackward, dout, dlse, q, k, v, out, lse, *options, *ctx.numbers, bias_requires_grad
        )
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        grads[:3] = dq, dk, dv
        if bias_requires_grad:
            grads[_BIAS] = dbias
        if ctx.needs_input_grad[_SINKS]:
            grads[_SINKS] = dsinks
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.forward(partial(run, Attention), info, in_dims, *args)


class AttentionBackward(Function):
    """(arguments of the op backward) -> (dq, dk, dv, dbias, dsinks)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call(ops.backward.default, *args)

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_no_double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.backward(partial(run, AttentionBackward), info, in_dims, *args)


class Merge(Function):
    """(out_a, lse_a, out_b, lse_b) -> (out, lse)"""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, Tensor]:
        return _call(ops.merge.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        return run(MergeBackward, dout, dlse, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.merge(partial(run, Merge), info, in_dims, *args)


class MergeBackward(Function):
    """(dout, dlse, out_a, lse_a, out_b, lse_b, out, lse) -> (dout_a, dlse_a, dout_b, dlse_b)"""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        return _call(ops.merge_backward.default, *args)

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_no_double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.merge(partial(run, MergeBackward), info, in_dims, *args)


class Softmax(Function):
    """x -> y, softmax over the last dimension"""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _call(ops.softmax.default, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return run(SoftmaxBackward, dy, y)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, x: Tensor) -> tuple[Tensor, int]:
        return batching.softmax(partial(run, Softmax), info, in_dims, x)


class SoftmaxBackward(Function):
    """(dy, y) -> dx = y (dy - sum(dy y))"""

    @staticmethod
    def forward(dy: Tensor, y: Tensor) -> Tensor:
        return _call(ops.softmax_backward.default, dy, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, Tensor]:
        dy, y = ctx.saved_tensors
        through_y = ddx * (dy - (dy * y).sum(-1, keepdim=True)) - dy * (ddx * y).sum(-1, keepdim=True)
        return run(SoftmaxBackward, ddx, y), through_y

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> tuple[Tensor, int]:
        return batching.softmax(partial(run, SoftmaxBackward), info, in_dims, *args)


class _RawAttention(Attention):
    """For those who call the op forward itself, which has no argument `deterministic`: its backward always is."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Attention.setup_context(ctx, (*inputs, True), output)


def _register() -> None:
    for op, function, rule in (
        (ops.forward, _RawAttention, batching.forward),
        (ops.backward, AttentionBackward, batching.backward),
        (ops.merge, Merge, batching.merge),
        (ops.merge_backward, MergeBackward, batching.merge),
        (ops.softmax, Softmax, batching.softmax),
        (ops.softmax_backward, SoftmaxBackward, batching.softmax),
    ):
        torch.library.register_autograd(op.default, function.backward, setup_context=function.setup_context)
        torch.library.register_vmap(op.default, partial(rule, op))


_register()
