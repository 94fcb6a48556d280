"""Models made of torch.nn.MultiheadAttention, nn.TransformerEncoder and nn.TransformerDecoder among them: `swap` makes
each such module this package's `MultiheadAttention`, `unswap` makes it torch's again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor, nn

from .. import counts
from ..counts import Stats
from ..modules import MultiheadAttention

_TURNED_OFF = "_flash_attn_ext_turned_off_nested_tensors"  # a mark that `swap` leaves on an nn.TransformerEncoder

_NAME = "nn.MultiheadAttention"  # in counts
_NEEDS_WEIGHTS = "need_weights=True, the default"


class SwappedMultiheadAttention(MultiheadAttention):
    """An nn.MultiheadAttention after `swap`: the same object, its parameters, hooks and buffers untouched."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """nn.TransformerEncoderLayer asks this before it computes attention itself, from the parameters, without
        calling the module (in eval mode, without gradients). False is the answer that makes it call."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """That of MultiheadAttention, counted."""
        given = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        results = super().forward(query, key, value, *given)
        counts.count(_NAME, _NEEDS_WEIGHTS if need_weights else None)
        return results

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies, which are swapped like the module that they are copies of."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _swapped.add(self)

    def _reset_parameters(self) -> None:
        """Torch's, which asks the same to learn which parameters there are: it is asked as torch's own module."""
        module = cast(nn.Module, self)
        module.__class__ = nn.MultiheadAttention
        try:
            module._reset_parameters()  # type: ignore[operator]
        finally:
            module.__class__ = SwappedMultiheadAttention


_swapped: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Swapped:
    """What `swap` did; str() of it reads well."""

    swapped: tuple[str, ...] = ()
    """Names of the modules that are now this package's, as in `named_modules`; "" is the model itself."""
    left: dict[str, str] = field(default_factory=dict)
    """Names of modules derived from nn.MultiheadAttention that were left as they are, and why."""
    called_directly: tuple[str, ...] = ()
    """Names of swapped modules that are not in an nn.TransformerEncoderLayer or nn.TransformerDecoderLayer, which call
    them with need_weights=False. Called without it they compute the matrix of weights, as its default is True."""

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} nn.MultiheadAttention", *(f"  {_shown(name)}" for name in self.swapped)]
        if self.called_directly:
            names = ", ".join(_shown(name) for name in self.called_directly)
            lines.append(f"computing the matrix of weights unless called with need_weights=False: {names}")
        return "\n".join([*lines, *(f"left {_shown(name)}: {why}" for name, why in self.left.items())])


def _shown(name: str) -> str:
    return name or "(the model itself)"


def swap(model: nn.Module) -> Swapped:
    """Replaces every torch.nn.MultiheadAttention inside `model` (or `model` itself), in place.

    Modules keep their identity, parameters, state dict, hooks and places, so optimizers, checkpoints and wrappers go on
    working. Results are those of `flash_attn_ext.MultiheadAttention`, whose docstring lists what differs; calls with
    need_weights=True, which ask for the matrix of weights, get it from torch's operations. nn.TransformerEncoder turns
    padded batches into nested tensors in eval mode; swapped ones do not, and a nested tensor raises. torch.jit.script
    takes no swapped model: `unswap` it before.

    Returns:
        What was swapped, and which modules derived from nn.MultiheadAttention were not, with the reason.
    """
    names, left = [], {}
    of_layers = {
        id(module)
        for layer in model.modules()
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        for module in layer.children()
    }
    directly = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = SwappedMultiheadAttention
            _swapped.add(module)
            names.append(name)
            if id(module) not in of_layers:
                directly.append(name)
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
            left[name] = f"{type(module).__module__}.{type(module).__qualname__} may have a forward of its own"
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor and _holds_swapped(encoder):
            encoder.use_nested_tensor = False
            setattr(encoder, _TURNED_OFF, True)
    counts.start(_NAME)
    return Swapped(tuple(names), left, tuple(directly))


def stats() -> Stats:
    """Calls of swapped modules since the first `swap`; `returned` has those that asked for the matrix of weights."""
    return counts.stats(_NAME)


def active() -> tuple[str, ...]:
    """How many modules are swapped at present, in all models; nothing where none is."""
    return (f"{len(_swapped)} nn.MultiheadAttention",) if _swapped else ()


def _holds_swapped(model: nn.Module) -> bool:
    return any(type(module) is SwappedMultiheadAttention for module in model.modules())


def unswap(model: nn.Module) -> tuple[str, ...]:
    """Makes every module that `swap` has changed torch's again. Returns their names."""
    names = []
    for name, module in model.named_modules():
        if type(module) is SwappedMultiheadAttention:
            cast(nn.Module, module).__class__ = nn.MultiheadAttention
            _swapped.discard(module)
            names.append(name)
        elif hasattr(module, _TURNED_OFF):
            delattr(module, _TURNED_OFF)
            module.use_nested_tensor = True
    return tuple(names)
