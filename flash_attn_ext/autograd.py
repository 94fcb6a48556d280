"""Gradients, forward mode and vmap of the ops.

Each op has one autograd.Function. The public functions apply it directly: with forward and setup_context apart it works
under torch.func, and it costs less per call than a registered formula. The raw ops have it too, so that whoever calls
torch.ops.flash_attn_ext.forward can train as well.

Kernels compute results and gradients; derivatives beyond are in derivatives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import Function, forward_ad

from . import batching, derivatives, reference
from .errors import InputError
from .ops import OPTIONAL_TENSORS, ops

# Places among the arguments of the op forward: q, k, v, nine optional tensors, then numbers.
_BIAS, _SINKS, _FIRST_NUMBER = 3, 6, 12
_TENSORS = ("q", "k", "v", *OPTIONAL_TENSORS)
# What could learn but has no gradient, by place, and what has one instead.
_WITHOUT_GRADIENT = {
    5: ("alibi_slopes", "; slopes that learn can be added to the scores through bias, which has one"),
    16: ("softmax_scale", "; a scale that learns can multiply q instead, with softmax_scale=1"),
    17: ("softcap", ""),
    18: ("dropout_p", ""),
}


def run(function: type[Function], *args: Any) -> Any:
    """Applies `function` where autograd or torch.func has to see it, and else calls its op straight away."""
    if torch.compiler.is_compiling():
        from . import tracing

        return tracing.run(function, *args)
    differentiates = (
        torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and _any_requires_grad(args))
        or forward_ad._current_level >= 0
    )
    return function.apply(*args) if differentiates else function.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110 (a loop takes half the time of a generator in any())
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def refuse_derivatives(wanted: Sequence[Any]) -> None:
    """Where a derivative that attention does not have is wanted, an error rather than zero.

    wanted: for each argument of the op forward, whether its derivative is.
    """
    lines = [_refusal(*names) for place, names in _WITHOUT_GRADIENT.items() if wanted[place]]
    if lines:
        raise RuntimeError(str(InputError("forward", lines)))


def refused_gradients(arguments: Mapping[str, object]) -> list[str]:
    """What `refuse_derivatives` would say of the arguments, by name, of a call that did not get as far."""
    pairs = [(arguments.get(name), _refusal(name, instead)) for name, instead in _WITHOUT_GRADIENT.values()]
    return [line for x, line in pairs if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad]


def _refusal(name: str, instead: str) -> str:
    return f"{name} has no gradient, and must not require one: pass {name}.detach(){instead}"


def _call(op: Any, *args: Any) -> Any:
    """The op without its registered formula, which has nothing to do here and takes longer than a small call."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():  # a tenth of a small call
        ctx.save_for_forward(*tensors)


def _numbers(numbers: tuple[Any, ...]) -> derivatives.Numbers:
    """numbers: the arguments of the op forward from _FIRST_NUMBER on."""
    _, _, left, right, softmax_scale, softcap, dropout_p, *_ = numbers
    return derivatives.Numbers((left, right), softmax_scale, softcap, dropout_p)


def _derivatives_of(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]
) -> tuple[list[int], tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
    """Places of the floating-point tensors among the inputs, these tensors, and `function` as one of them alone."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]

    def of_variables(*variables: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for place, x in zip(places, variables, strict=True):
            given[place] = x
        return function(*given)

    return places, tuple(inputs[place] for place in places), of_variables


def _transposed(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...], cotangents: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """J^T cotangents, a result for each input."""
    places, variables, of_variables = _derivatives_of(function, inputs)
    found = derivatives.transposed(of_variables, variables, cotangents)
    results: list[Tensor | None] = [None] * len(inputs)
    for place, result in zip(places, found, strict=True):
        results[place] = result
    return tuple(results)


def _directional(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...], directions: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """J directions, a result for each output."""
    places, variables, of_variables = _derivatives_of(function, inputs)
    chosen = (directions[place] for place in places)
    given = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(variables, chosen, strict=True))
    return derivatives.directional(of_variables, variables, given)


class _Function(Function):
    """A Function whose arguments are those of its op, all of them, by place.

    torch's apply binds them to the signature of forward in every call: 20 of the 45 microseconds of a small one.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


class Attention(_Function):
    """(arguments of the op forward, deterministic) -> (out, lse)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _call(ops.forward.default, *args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        refuse_derivatives(ctx.needs_input_grad)
        _save(ctx, *output, *inputs[:_FIRST_NUMBER])
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
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], *directions: Tensor | None) -> tuple[Tensor, Tensor]:
        refuse_derivatives([direction is not None for direction in directions])
        out, lse, *tensors = saved
        given = dict(zip(_TENSORS, tensors, strict=True))
        along = dict(zip(_TENSORS, directions, strict=False))
        return derivatives.tangents(given, _numbers(ctx.numbers), out, lse, along)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.forward(partial(run, Attention), info, in_dims, *args)


class AttentionBackward(_Function):
    """(arguments of the op backward) -> (dq, dk, dv, dbias, dsinks)"""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call(ops.backward.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, *inputs[: _FIRST_NUMBER + 4])
        ctx.numbers = inputs[_FIRST_NUMBER + 4 :]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, *ctx.numbers)
        return _transposed(_attention_backward, inputs, cotangents)

    @staticmethod
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], *directions: Tensor | None) -> tuple[Tensor, ...]:
        return _directional(_attention_backward, (*saved, *ctx.numbers), directions)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.backward(partial(run, AttentionBackward), info, in_dims, *args)


def _attention_backward(*args: Any) -> tuple[Tensor, ...]:
    """The op backward, in torch's operations."""
    tensors, numbers = args[: _FIRST_NUMBER + 4], args[_FIRST_NUMBER + 4 :]
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", *OPTIONAL_TENSORS)
    given = dict(zip(names, tensors, strict=True))
    found = derivatives.gradients(given, _numbers(numbers))
    dbias = found["bias"] if numbers[-1] else given["q"].new_empty(0)
    return found["q"], found["k"], found["v"], dbias, found.get("sinks", given["lse"].new_empty(0))


class Merge(_Function):
    """(out_a, lse_a, out_b, lse_b) -> (out, lse)"""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, Tensor]:
        return _call(ops.merge.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, *inputs, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        return run(MergeBackward, dout, dlse, *ctx.saved_tensors)

    @staticmethod
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], *directions: Tensor | None) -> tuple[Tensor, ...]:
        return _directional(_merge, saved[:4], directions)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.merge(partial(run, Merge), info, in_dims, *args)


class MergeBackward(_Function):
    """(dout, dlse, out_a, lse_a, out_b, lse_b, out, lse) -> (dout_a, dlse_a, dout_b, dlse_b)"""

    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        return _call(ops.merge_backward.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return _transposed(_merge_backward, ctx.saved_tensors, cotangents)

    @staticmethod
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], *directions: Tensor | None) -> tuple[Tensor, ...]:
        return _directional(_merge_backward, saved, directions)

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> batching.Mapped:
        return batching.merge(partial(run, MergeBackward), info, in_dims, *args)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The op merge, in torch's operations."""
    out, lse = reference.merge(out_a, lse_a, out_b, lse_b)
    return out.to(out_a.dtype), lse


def _merge_backward(dout: Tensor, dlse: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The op merge_backward, in torch's operations. The result that it is given is one of its inputs, too."""
    return derivatives.transposed(_merge, tensors[:4], (dout, dlse))


class Softmax(_Function):
    """x -> y, softmax over the last dimension"""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _call(ops.softmax.default, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        _save(ctx, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return run(SoftmaxBackward, dy, y)

    @staticmethod
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], direction: Tensor) -> Tensor:
        (y,) = saved
        return run(SoftmaxBackward, direction, y)  # the Jacobian is symmetric

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, x: Tensor) -> tuple[Tensor, int]:
        return batching.softmax(partial(run, Softmax), info, in_dims, x)


class SoftmaxBackward(_Function):
    """(dy, y) -> dx = y (dy - sum(dy y))"""

    @staticmethod
    def forward(dy: Tensor, y: Tensor) -> Tensor:
        return _call(ops.softmax_backward.default, dy, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, Tensor]:
        dy, y = ctx.saved_tensors
        through_y = ddx * (dy - (dy * y).sum(-1, keepdim=True)) - dy * (ddx * y).sum(-1, keepdim=True)
        return run(SoftmaxBackward, ddx, y), through_y

    @staticmethod
    @derivatives.forward_mode
    def jvp(ctx: Any, saved: tuple[Tensor, ...], *directions: Tensor | None) -> Tensor:
        return _directional(_softmax_backward, saved, directions)[0]

    @staticmethod
    def vmap(info: Any, in_dims: batching.InDims, *args: Any) -> tuple[Tensor, int]:
        return batching.softmax(partial(run, SoftmaxBackward), info, in_dims, *args)


def _softmax_backward(dy: Tensor, y: Tensor) -> tuple[Tensor]:
    """The op softmax_backward, in torch's operations."""
    return (y * (dy - (dy * y).sum(-1, keepdim=True)),)


class _RawAttention(Attention):
    """For those who call the op forward itself, which has no argument `deterministic`: its backward always is."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _call(ops.forward.default, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Attention.setup_context(ctx, (*inputs, True), output)


def _autograd_kernel(op: Any, function: type[Function]) -> Callable[..., Any]:
    """What runs for the raw op before its kernel.

    torch.library.register_autograd would put the same formula there alone, which is of gradients only: it lets
    tangents fall without a word.
    """
    gradients_only = make_autograd_impl(op.default, Info(function.backward, function.setup_context))

    def kernel(keyset: Any, *args: Any) -> Any:
        if not _any_tangent(args):
            return gradients_only(keyset, *args)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.ops.{op}: torch.func's forward mode (jvp, jacfwd, hessian) does not reach through the op; "
                "call the functions of flash_attn_ext, or use dual numbers (torch.autograd.forward_ad)"
            )
        return function.apply(*args)

    return kernel


def _any_tangent(args: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    floating = (x for x in args if isinstance(x, Tensor) and x.is_floating_point())
    return any(forward_ad.unpack_dual(x).tangent is not None for x in floating)


_library = torch.library.Library("flash_attn_ext", "FRAGMENT")


def _register() -> None:
    for op, function, rule in (
        (ops.forward, _RawAttention, batching.forward),
        (ops.backward, AttentionBackward, batching.backward),
        (ops.merge, Merge, batching.merge),
        (ops.merge_backward, MergeBackward, batching.merge),
        (ops.softmax, Softmax, batching.softmax),
        (ops.softmax_backward, SoftmaxBackward, batching.softmax),
    ):
        _library.impl(op.default, _autograd_kernel(op, function), "Autograd", with_keyset=True)
        torch.library.register_vmap(op.default, partial(rule, op))


_register()
