"""The error that every public function raises for arguments it cannot take."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch

_PREFIX = "flash_attn_ext."
_BULLET = "- "


def _is_dense(x: object) -> bool:
    return isinstance(x, torch.Tensor) and not x.is_nested and x.layout == torch.strided and not x.is_quantized


def is_number(x: object) -> bool:
    if not isinstance(x, (Real, torch.Tensor)):
        return isinstance(x, (torch.SymFloat, torch.SymInt))
    try:
        float(x)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # too large, or a tensor of several
        return False
    return True


def _is_integer(x: object) -> bool:
    return isinstance(x, torch.SymInt) or ((n := as_integer(x)) is not None and -(2**63) <= n < 2**63)


def as_integer(x: Any) -> int | None:
    """An int from whatever stands for one, such as numpy's; None where nothing does."""
    if isinstance(x, int):
        return x
    try:
        return operator.index(x)
    except TypeError:
        return None


def _is_flag(x: object) -> bool:
    if isinstance(x, (bool, torch.SymBool)):
        return True
    return type(x).__name__ in ("bool", "bool_") or as_integer(x) in (0, 1)  # numpy's names


# What an argument may be, by the word that tables of arguments use for it; "?" after the word allows None too.
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "tensor": ("a torch.Tensor", _is_dense),
    "number": ("a number", is_number),
    "integer": ("an integer", _is_integer),
    "flag": ("True or False", _is_flag),
}


class InputError(ValueError, TypeError):
    """Arguments that a function does not accept.

    The message lists every unmet constraint, each with what was given and what would be accepted; `constraints` holds
    these lines. It is both a ValueError and a TypeError, because one call can be wrong in both ways at once.
    """

    def __init__(self, function: str, constraints: Sequence[str]) -> None:
        self.function = function
        self.constraints = tuple(constraints)
        if torch.compiler.is_dynamo_compiling():  # in whole graphs, the only message that reaches the caller
            torch._dynamo.graph_break(msg="; ".join(constraints))
        count = "1 constraint is" if len(self.constraints) == 1 else f"{len(self.constraints)} constraints are"
        super().__init__("\n".join([f"{_PREFIX}{function}: {count} not met", *(_BULLET + c for c in self.constraints)]))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, tuple[str, ...]]]:
        return InputError, (self.function, self.constraints)


def _raise(function: str, constraints: Sequence[str]) -> NoReturn:
    raise InputError(function, constraints)


def refuse(function: str, constraints: Sequence[str]) -> NoReturn:
    """Raises an InputError outside of graphs: torch 2.11 loses the message of one that it has traced."""
    if torch.compiler.is_dynamo_compiling():
        from . import tracing

        torch._dynamo.graph_break(msg="; ".join(constraints))
        tracing.with_message(_raise, function, constraints)
    _raise(function, constraints)


def raise_input_error(
    function: str,
    error: Exception,
    arguments: Mapping[str, object],
    kinds: Mapping[str, str],
    unmet: Sequence[str] = (),
) -> NoReturn:
    """Raises `error`, which came up in `function`, as an InputError if its arguments caused it, else as it is.

    kinds: for each argument that has one, its kind. unmet: constraints that are known to be unmet already.
    """
    constraints = [*unmet, *(constraints_of(error) or wrong_kinds(arguments, kinds).values())]
    if not constraints or isinstance(error, InputError):
        raise error
    raise InputError(function, constraints) from None


def constraints_of(error: Exception) -> list[str]:
    """The unmet constraints that an op's own check found; none if `error` is of another kind."""
    first, *lines = str(error).splitlines() or [""]
    return [line.removeprefix(_BULLET) for line in lines] if first.startswith(_PREFIX) else []


def wrong_kinds(arguments: Mapping[str, object], kinds: Mapping[str, str]) -> dict[str, str]:
    """The arguments that are not of their kind, each with the constraint that it does not meet."""
    lines = {}
    for name, kind in kinds.items():
        words, is_kind = _KINDS[kind.removesuffix("?")]
        if name not in arguments:
            continue
        value = arguments[name]
        optional = kind.endswith("?")
        if not is_kind(value) and not (optional and value is None):
            lines[name] = f"{name} must be {words}{' or None' if optional else ''}, got {shown(value)}"
    return lines


def wrong_flags(**flags: object) -> list[str]:
    """The constraints that those do not meet which are neither True nor False."""
    if all(type(x) is bool for x in flags.values()):  # of nearly every call; small ones feel the rest
        return []
    return list(wrong_kinds(flags, dict.fromkeys(flags, "flag")).values())


def shown(value: object) -> str:
    """A value of the wrong kind, in the words of an error."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "a nested tensor (sequences of different lengths: attention_varlen)"
    if isinstance(value, torch.Tensor) and value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    if isinstance(value, torch.Tensor) and value.is_quantized:
        return f"a quantized tensor of {value.dtype}"
    kind, text = type(value).__name__, repr(value)
    if isinstance(value, int) and not _is_integer(value):
        return f"{kind} {text}, more than 64 bits hold" if len(text) <= 60 else f"{kind} of more than 64 bits"
    return text if value is None else f"{kind} {text}" if len(text) <= 60 else f"a {kind}"
