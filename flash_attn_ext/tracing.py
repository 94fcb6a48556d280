"""What torch.compile needs to be told while it traces. Imported by then only: it brings in torch._dynamo, which takes
longer to import than all the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function, forward_ad


def run(function: type[Function], *args: Any) -> Any:
    """autograd.run, traced: the op, which carries the same formula as `function`.

    Not `function` itself, as Dynamo takes no autograd.Function with one tensor in two places, like attention(x, x, x).
    torch.func.grad, jvp and dual numbers do not know that formula, and would leave directions out without a word: code
    that uses them inside torch.compile is left to Python.
    """
    differentiates = forward_ad._current_level >= 0 or _transforms_differentiate()
    return in_python(function.apply, *args) if differentiates else function.forward(*args)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


in_python: Callable[..., Any] = torch.compiler.disable(
    _call, reason="torch.func.grad, jvp or dual numbers with flash_attn_ext inside torch.compile"
)


def _any_transform_differentiates() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() != torch._C._functorch.TransformType.Vmap for interpreter in stack)


_transforms_differentiate: Callable[[], bool] = torch.compiler.assume_constant_result(_any_transform_differentiates)
