"""What torch.compile needs to be told while it traces. Imported by then only: it brings in torch._dynamo, which takes
longer to import than all the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function, forward_ad

from . import counts


def run(function: type[Function], *args: Any) -> Any:
    """autograd.run, traced: the op, which carries the same formula as `function`.

    Not `function` itself, as Dynamo takes no autograd.Function with one tensor in two places, like attention(x, x, x).
    torch.func.grad, jvp and dual numbers do not know that formula, and would leave directions out without a word: code
    that uses them inside torch.compile is left to Python.
    """
    differentiates = forward_ad._current_level >= 0 or _transforms_differentiate()
    return in_python(function.apply, *args) if differentiates else function.forward(*args)


def _outside_graphs(reason: str) -> Callable[..., Any]:
    """What calls the function that it is given, with its arguments, as Python does."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    outside: Callable[..., Any] = torch.compiler.disable(call, reason=reason)
    return outside


in_python = _outside_graphs("torch.func.grad, jvp or dual numbers with flash_attn_ext inside torch.compile")
with_message = _outside_graphs("an error of flash_attn_ext")
with_numbers = _outside_graphs("a tensor as softmax_scale, softcap or dropout_p; pass a number, or multiply q by it")


def _any_transform_differentiates() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() != torch._C._functorch.TransformType.Vmap for interpreter in stack)


_transforms_differentiate: Callable[[], bool] = torch.compiler.assume_constant_result(_any_transform_differentiates)


def _count(name: str, reason: str | None) -> int:
    counts.add(name, "traced", None if reason is None else f"{reason} (in a compiled graph)")
    return 0


# Runs when torch.compile traces, not in the graph, where the result is a constant.
count: Callable[[str, str | None], int] = torch.compiler.assume_constant_result(_count)
