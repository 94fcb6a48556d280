"""`import flash_attn` means this package: for code written for FlashAttention 2 that cannot be changed.

    from flash_attn_ext import shim
    shim.install()                                  # before the code that imports flash_attn
    from flash_attn import flash_attn_func          # flash_attn_ext.flash_attn_func
    shim.uninstall()

Nothing happens without `install`, and `uninstall` undoes all of it. There are the modules flash_attn,
flash_attn.flash_attn_interface and flash_attn.bert_padding; others, such as flash_attn.layers, do not exist. Code that
asks importlib.metadata for the version of the distribution flash-attn, as transformers does, is told VERSION.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, packages_distributions
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from . import counts
from . import flash_attn as functions
from . import flash_attn_passes as passes
from .counts import Stats
from .padding import pad_input, unpad_input, unpad_input_for_concatenated_sequences

VERSION = "2.8.3"
"""The version of flash-attn whose functions and signatures there are."""

_PACKAGE = "flash_attn"


def install(*, replace: bool = False) -> None:
    """Makes `import flash_attn` and its modules give ours, in this process. A second call changes nothing.

    Args:
        replace: also where another flash_attn has been imported already. What was imported from it stays as it is;
            `uninstall` puts the modules back.

    Raises:
        RuntimeError: another flash_attn has been imported, and replace is not set.
    """
    if _finder in sys.meta_path:
        return
    imported = _imported()
    if imported and not replace:
        raise RuntimeError(
            f"flash_attn_ext.shim.install: {_PACKAGE} was imported already, from "
            f"{getattr(imported[_PACKAGE], '__file__', None)}; install the shim before that, or pass replace=True"
        )
    _finder.replaced = imported
    for name in imported:
        del sys.modules[name]
    sys.meta_path.insert(0, _finder)
    counts.start(_PACKAGE)
    _forget_availability()


def uninstall() -> None:
    """Undoes `install`; nothing where the shim is not installed."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    counts.stop(_PACKAGE)
    for name in _imported():
        del sys.modules[name]
    sys.modules.update(_finder.replaced)
    _finder.replaced = {}
    _forget_availability()


def active() -> tuple[str, ...]:
    """The modules that are ours for who imports them at present; none, unless installed."""
    return tuple(_MODULES) if _finder in sys.meta_path else ()


def stats() -> Stats:
    """Calls of the attention functions since the last `install`. None goes back: what cannot be taken raises."""
    return counts.stats(_PACKAGE)


def _imported() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _PACKAGE}


def _forget_availability() -> None:
    """transformers asks once which attention packages there are; if it has asked, it has to ask again."""
    importlib.invalidate_caches()
    asked = sys.modules.get("transformers.utils.import_utils")
    for name in ("_package_distribution_mapping", "is_flash_attn_2_available"):
        getattr(getattr(asked, name, None), "cache_clear", lambda: None)()
    mapping = getattr(asked, "PACKAGE_DISTRIBUTION_MAPPING", None)  # of versions that ask when they are imported
    if mapping is not None:
        mapping.clear()
        mapping.update(packages_distributions())


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **__: Any) -> NoReturn:
    """There to be imported. Raises NotImplementedError when it is called."""
    raise NotImplementedError("flash_attn_ext has no flash_attn_with_kvcache: attention that updates a cache of keys")


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x: (total, ...), indices: (n,) -> (n, ...)."""
    return x[indices]


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """x: (total, ...), indices: (n,) -> (n, ...), and x, for a residual path."""
    return x[indices], x.view_as(x)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values: (n, ...), indices: (n,) -> (first_axis_dim, ...), zero where no index points to."""
    return pad_input(values, indices, 1, first_axis_dim)[0]


_INTERFACE = {
    **{name: value for name, value in vars(functions).items() if name.startswith("flash_attn_")},
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
}
_PASSES = {name: value for name, value in vars(passes).items() if name.startswith("_flash_attn_")}
_MODULES: dict[str, dict[str, Any]] = {
    _PACKAGE: {"__version__": VERSION, "__path__": [], **_INTERFACE},
    f"{_PACKAGE}.flash_attn_interface": {**_INTERFACE, **_PASSES},
    f"{_PACKAGE}.bert_padding": {
        "pad_input": pad_input,
        "unpad_input": unpad_input,
        "unpad_input_for_concatenated_sequences": unpad_input_for_concatenated_sequences,
        "index_first_axis": index_first_axis,
        "index_first_axis_residual": index_first_axis_residual,
        "index_put_first_axis": index_put_first_axis,
    },
}


class _Distribution(Distribution):
    """What importlib.metadata tells of flash-attn."""

    def read_text(self, filename: str) -> str | None:
        metadata = Message()
        metadata["Metadata-Version"], metadata["Name"], metadata["Version"] = "2.1", "flash-attn", VERSION
        return {"METADATA": metadata.as_string(), "top_level.txt": _PACKAGE}.get(filename)

    def locate_file(self, path: Any) -> NoReturn:
        raise FileNotFoundError(f"{path}: the shim of flash_attn_ext has no files")


class _Finder(MetaPathFinder, Loader):
    replaced: dict[str, ModuleType] = {}  # noqa: RUF012 (there is one finder)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=name == _PACKAGE, origin=__file__) if name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_MODULES[module.__name__], __file__=__file__)  # inspect asks where a module comes from

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Distribution]:
        asked = context.name
        return [_Distribution()] if asked is None or asked.lower().replace("_", "-") == "flash-attn" else []


_finder = _Finder()
