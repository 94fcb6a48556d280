"""The error that every public function raises for arguments it cannot take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NoReturn

import torch

_PREFIX = "flash_attn_ext."
_BULLET = "- "

# What an argument may be, by the word that tables of arguments use for it; "?" after the word allows None too.
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "tensor": ("a torch.Tensor", (torch.Tensor,)),
    "number": ("a number", (Real, torch.SymFloat, torch.SymInt)),
    "integer": ("an integer", (int, torch.SymInt)),
}


class InputError(ValueError, TypeError):
    """Arguments that a function does not accept.

    The message lists every unmet constraint, each with what was given and what would be accepted; `constraints` holds
    these lines. It is both a ValueError and a TypeError, because one call can be wrong in both ways at once.
    """

    def __init__(self, function: str, constraints: Sequence[str]) -> None:
        self.function = function
        self.constraints = tuple(constraints)
        count = "1 constraint is" if len(self.constraints) == 1 else f"{len(self.constraints)} constraints are"
        super().__init__("\n".join([f"{_PREFIX}{function}: {count} not met", *(_BULLET + c for c in self.constraints)]))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, tuple[str, ...]]]:
        return InputError, (self.function, self.constraints)


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
    constraints = [*unmet, *(constraints_of(error) or _wrong_kinds(arguments, kinds))]
    if not constraints or isinstance(error, InputError):
        raise error
    raise InputError(function, constraints) from None


def constraints_of(error: Exception) -> list[str]:
    """The unmet constraints that an op's own check found; none if `error` is of another kind."""
    first, *lines = str(error).splitlines() or [""]
    return [line.removeprefix(_BULLET) for line in lines] if first.startswith(_PREFIX) else []


def _wrong_kinds(arguments: Mapping[str, object], kinds: Mapping[str, str]) -> list[str]:
    lines = []
    for name, kind in kinds.items():
        words, types = _KINDS[kind.removesuffix("?")]
        if name not in arguments:
            continue
        value = arguments[name]
        optional = kind.endswith("?")
        if not isinstance(value, types) and not (optional and value is None):
            text = repr(value)
            kind_given = type(value).__name__
            given = text if value is None else f"{kind_given} {text}" if len(text) <= 60 else f"a {kind_given}"
            lines.append(f"{name} must be {words}{' or None' if optional else ''}, got {given}")
    return lines
