"""All integrations together: nothing happens on import, and `status` lists what is in force."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from flash_attn_ext import shim
from flash_attn_ext.counts import Stats
from flash_attn_ext.integrations import modules, sdpa, status

# What others have before and after our modules are imported, and after each of the calls that change it.
IMPORTS = """
import importlib, pkgutil, sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
import torch, torch._dynamo, torch.distributed.tensor, torch.nn.functional  # the compiler swaps torch.manual_seed
from torch.distributed.tensor import DTensor
try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_utils
except ImportError:
    transformers = None

THEIRS = [torch, torch.nn, torch.nn.functional, torch.nn.attention, torch.nn.MultiheadAttention, torch.Tensor]
THEIRS += [] if transformers is None else [masking_utils, modeling_utils, modeling_utils.PreTrainedModel]
KERNELS = ("_flash_attention_forward", "_scaled_dot_product_flash_attention_for_cpu")
layer = torch.nn.MultiheadAttention(4, 2)


def values():
    names = {f"{owner.__name__}.{name}": id(x) for owner in THEIRS for name, x in vars(owner).items()}
    return {key: x for key, x in names.items() if key in known}


def parts():
    propagator = DTensor._op_dispatcher.sharding_propagator
    found = {
        "names": values(),
        "finders": list(sys.meta_path),
        "flash_attn": (find_spec("flash_attn"), "flash_attn" in packages_distributions()),
        "kernels": [torch._C._dispatch_dump(f"aten::{name}") for name in KERNELS],
        "implementations": (torch.nn.attention.list_flash_attention_impls(), torch.backends.mha.get_fastpath_enabled()),
        "layer": type(layer),
        "dtensor": {name: list(map(str, x)) for name, x in vars(propagator).items() if isinstance(x, dict)},
    }
    if transformers is not None:
        interfaces = (AttentionInterface, AttentionMaskInterface)
        found["transformers"] = [sorted(interface().keys()) for interface in interfaces]
    return found


known = {f"{owner.__name__}.{name}" for owner in THEIRS for name in vars(owner)}
before = parts()
import flash_attn_ext
from flash_attn_ext import integrations
for module in pkgutil.walk_packages(flash_attn_ext.__path__, "flash_attn_ext."):
    if not module.name.startswith(("flash_attn_ext.demo", "flash_attn_ext.lib", "flash_attn_ext.__main__")):
        if transformers is not None or not module.name.endswith((".transformers", ".mask_patterns")):
            importlib.import_module(module.name)
assert "flash_attn" not in sys.modules
assert parts() == before, {name for name, x in parts().items() if x != before[name]}
assert str(integrations.status()) == "nothing is swapped"


def changed(call):
    global before
    call()
    now = parts()
    names = {name for name in now if now[name] != before[name]}
    before = now
    return names


from flash_attn_ext import shim
from flash_attn_ext.integrations import dtensor, modules, sdpa
assert changed(sdpa.enable) == {"names", "kernels", "implementations"}
assert changed(lambda: modules.swap(layer)) == {"layer"}
assert changed(shim.install) == {"finders", "flash_attn"}
assert changed(dtensor.register) == {"dtensor"}
if transformers is not None:
    from flash_attn_ext.integrations import transformers as fa_ext
    assert changed(fa_ext.register) == {"transformers"}
print(*integrations.status().active)
"""


def test_import_leaves_the_compiler_out() -> None:
    """torch._dynamo takes as long to import as torch, and few programs need it."""
    code = "import sys, flash_attn_ext; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_happens_on_import() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parts = result.stdout.split()
    assert set(parts) - {"integrations.transformers"} == {
        "integrations.sdpa",
        "integrations.modules",
        "integrations.dtensor",
        "shim",
    }


def test_status_lists_what_is_in_force() -> None:
    q = torch.randn(1, 2, 5, 8)
    with sdpa.enable():
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(*[torch.randn(1, 1, 3, 600)] * 3)
        found = status()
    enabled = found.active["integrations.sdpa"]
    assert enabled.what[:2] == ("torch.nn.functional.scaled_dot_product_attention", "torch's flash kernels on CPU")
    assert enabled.stats.attended == 1
    assert "integrations.sdpa: torch.nn.functional.scaled_dot_product_attention, torch's flash" in str(found)
    assert "  1 calls ran here, 0 were compiled, 0 came as kernels\n  1 went back to torch: a head" in str(found)
    assert "integrations.sdpa" not in status().active
    assert sdpa.stats() == enabled.stats  # still to be read


def test_calls_are_counted_as_long_as_the_swap_is_in_force() -> None:
    q = torch.randn(1, 2, 5, 8)
    with sdpa.enable():
        held = F.scaled_dot_product_attention
    held(q, q, q)
    assert sdpa.stats() == Stats(0, {}, 0, 0)


def test_status_of_modules_follows_copies() -> None:
    def swapped() -> int:
        found = status().active.get("integrations.modules")
        return int(found.what[0].split()[0]) if found else 0

    before = swapped()  # of other tests
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    modules.swap(model)
    assert swapped() == before + 3
    average = copy.deepcopy(model)
    assert swapped() == before + 6
    modules.unswap(model)
    assert swapped() == before + 3
    del average
    assert swapped() == before


def test_status_of_the_shim() -> None:
    shim.install()
    try:
        assert status().active["shim"].what[:2] == ("flash_attn", "flash_attn.flash_attn_interface")
    finally:
        shim.uninstall()
    assert "shim" not in status().active


def test_an_import_that_fails_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flash_attn_ext.integrations.transformers", raising=False)
    with pytest.raises(ImportError, match=r"needs transformers 4\.57 or newer: ") as raised:
        importlib.import_module("flash_attn_ext.integrations.transformers")
    assert isinstance(raised.value.__cause__, ImportError)


def test_status_of_transformers() -> None:
    fa_ext = pytest.importorskip("flash_attn_ext.integrations.transformers", exc_type=ImportError)
    fa_ext.register("another_name")
    active = status().active["integrations.transformers"]
    assert "the attention implementation 'another_name'" in active.what
    assert active.stats == fa_ext.stats()
