"""Attention of other packages, where they can be imported: FlashAttention 2, 3 and 4, xformers."""

import functools
import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from candidate import Attention, Candidate, Inputs
from suites import Case
from torch import Tensor

FA2, FA4 = ["flash_attn"], ["flash_attn.cute", "flash_attn.cute.interface"]
FA3 = ["flash_attn_interface", "flash_attn_3", "flash_attn_3.flash_attn_interface"]


def take_fa3_from(folder: Path) -> None:
    """Lets FlashAttention 3 be any module of a folder, or the package that the folder is."""
    folder = folder.resolve()
    if (folder / "__init__.py").exists():
        folder, names = folder.parent, [folder.name]
    else:
        names = [module.name for module in pkgutil.iter_modules([str(folder)]) if module.name != "flash_attn"]
    # At the end: the folder may hold its own copies of torch or numpy.
    sys.path.append(str(folder))
    # The usual names come first: a folder can hold whatever else the package needs, which need not be imported.
    FA3.extend(name for name in names if name not in FA3)
    found.cache_clear()


@functools.cache
def found(names: tuple[str, ...], function: str) -> tuple[ModuleType | None, str]:
    """The first of the modules that can be imported and has the function, or why there is none."""
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a broken package raises whatever it likes: OSError, AssertionError
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if hasattr(module, function):
            return module, ""
        reasons.append(f"{name} has no {function}")
    return None, "; ".join(dict.fromkeys(reasons))


def only_output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # some versions also return lse


class FlashAttention(Candidate):
    """The interface that FlashAttention's versions share, on (batch, row, head, dim) or packed (row, head, dim).

    Only its backward can be deterministic; in the forward there is nothing to measure again.
    """

    takes = frozenset({"dense", "packed", "softcap"})

    def __init__(self, name: str, modules: list[str], deterministic: bool = False):
        self.name = name + ("_deterministic" if deterministic else "")
        self._modules, self._deterministic = modules, deterministic
        if deterministic:
            self.directions = ("backward",)

    def why_not(self, case: Case, device: str) -> str:
        return super().why_not(case, device) or self._find(case)[1]

    def _find(self, case: Case) -> tuple[Any, str]:
        function = "flash_attn_varlen_func" if case.lengths else "flash_attn_func"
        module, reason = found(tuple(self._modules), function)
        return getattr(module, function, None), reason

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        function, _ = self._find(case)
        options: dict[str, Any] = {"causal": case.causal}
        if case.window is not None:
            options["window_size"] = (case.window, 0)
        if self._deterministic:
            options["deterministic"] = True
        if case.softcap:
            options["softcap"] = case.softcap
        if case.lengths:
            options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), inputs.cu_seqlens)
            options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), case.seqlen_q)
        return lambda q, k, v: only_output(function(q, k, v, **options))


class XFormers(Candidate):
    """memory_efficient_attention with whatever it dispatches to; packed sequences are a batch of one with a mask."""

    name = "xformers"
    takes = frozenset({"dense", "packed", "bias"})

    def why_not(self, case: Case, device: str) -> str:
        return super().why_not(case, device) or found(("xformers.ops",), "memory_efficient_attention")[1]

    def to_native(self, x: Tensor, packed: bool) -> Tensor:
        return x

    def from_native(self, x: Tensor, packed: bool) -> Tensor:
        return x

    def attention(self, case: Case, inputs: Inputs) -> Attention:
        import xformers.ops  # type: ignore[import-not-found]

        fmha, masks = xformers.ops, xformers.ops.fmha.attn_bias
        constant = None
        if case.lengths:
            constant = masks.BlockDiagonalMask.from_seqlens(list(case.lengths))
            constant = constant.make_causal() if case.causal else constant
        elif case.window is not None:
            constant = masks.LowerTriangularFromBottomRightLocalAttentionMask(case.window + 1)
        elif case.causal:
            constant = masks.LowerTriangularFromBottomRightMask()
        group = case.heads // case.heads_kv

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            added = constant if bias is None else bias.expand(case.batch, -1, -1, -1)
            if group == 1:
                return fmha.memory_efficient_attention(q, k, v, added)
            k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
            return fmha.memory_efficient_attention(q.unflatten(2, (-1, group)), k, v, added).flatten(2, 3)

        return attend


PACKAGE_CANDIDATES: tuple[Candidate, ...] = (
    *(
        FlashAttention(name, modules, deterministic)
        for name, modules in (("fa2", FA2), ("fa3", FA3), ("fa4", FA4))
        for deterministic in (False, True)
    ),
    XFormers(),
)
