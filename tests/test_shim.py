"""`import flash_attn` after shim.install(), and nothing of it before and after."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import flash_attn_ext
from flash_attn_ext import flash_attn_passes, shim

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="another flash_attn is installed here"
)


@pytest.fixture
def installed() -> Iterator[None]:
    shim.install()
    yield
    shim.uninstall()


@pytest.mark.usefixtures("installed")
def test_modules_resolve_to_ours() -> None:
    import flash_attn
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import (
        _flash_attn_backward,
        _flash_attn_forward,
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
        flash_attn_varlen_func,
    )

    passes = (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward)
    assert all(vars(flash_attn_passes)[function.__name__] is function for function in passes)
    names = [name for name in flash_attn_ext.__all__ if name.startswith("flash_attn_")]
    assert len(names) == 6
    for name in names:
        assert getattr(flash_attn, name) is getattr(flash_attn_ext, name)
    assert flash_attn_varlen_func is flash_attn_ext.flash_attn_varlen_func
    assert pad_input is flash_attn_ext.pad_input
    assert unpad_input is flash_attn_ext.unpad_input
    q = torch.randn(1, 7, 2, 8)
    torch.testing.assert_close(
        flash_attn.flash_attn_func(q, q, q, causal=True), flash_attn_ext.attention(q, q, q, causal=True)
    )


@pytest.mark.usefixtures("installed")
def test_what_is_not_there() -> None:
    from flash_attn import flash_attn_with_kvcache

    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
        importlib.import_module("flash_attn.layers")
    for module, name in (("bert_padding", "IndexFirstAxis"), ("flash_attn_interface", "FlashAttnFunc")):
        with pytest.raises(ImportError, match=name):
            exec(f"from flash_attn.{module} import {name}")
    cache = torch.zeros(1, 4, 1, 8)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache"):
        flash_attn_with_kvcache(cache[:, :1], cache, cache, cache_seqlens=3)


@pytest.mark.usefixtures("installed")
def test_functions_of_bert_padding() -> None:
    from flash_attn.bert_padding import index_first_axis_residual, unpad_input_for_concatenated_sequences

    x = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert longest == 6
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    with pytest.raises(flash_attn_ext.InputError, match="attention_mask_in_length must have shape"):
        unpad_input_for_concatenated_sequences(x, lengths[:, :5])
    rows = x.flatten(0, 1)
    chosen, residual = index_first_axis_residual(rows, indices[:4])
    assert torch.equal(chosen, rows[:4])
    assert torch.equal(residual, rows)
    (gradient,) = torch.autograd.grad((chosen.sum(), residual.sum()), x)
    assert torch.equal(gradient.flatten(0, 1)[:, 0], torch.tensor([2.0] * 4 + [1.0] * 14, dtype=torch.float64))


@pytest.mark.usefixtures("installed")
def test_modules_have_a_file() -> None:
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"):
        assert inspect.getsourcefile(importlib.import_module(name)) == shim.__file__
        assert inspect.getsource(importlib.import_module(name))


@pytest.mark.usefixtures("installed")
def test_calls_are_counted_while_installed() -> None:
    q = torch.randn(1, 7, 2, 8)
    for _ in range(2):
        flash_attn_ext.flash_attn_func(q, q, q)
    compiled = torch.compile(flash_attn_ext.flash_attn_func, fullgraph=True, backend="aot_eager")
    compiled(q, q, q)
    compiled(q, q, q)
    shim.uninstall()
    flash_attn_ext.flash_attn_func(q, q, q)
    assert (shim.stats().attended, shim.stats().traced, shim.stats().returned) == (2, 1, {})
    shim.install()
    assert shim.stats().attended == 0


@pytest.mark.usefixtures("installed")
def test_index_functions() -> None:
    from flash_attn.bert_padding import index_first_axis, index_put_first_axis

    x, indices = torch.randn(6, 3), torch.tensor([1, 4, 5])
    back = index_put_first_axis(index_first_axis(x, indices), indices, 6)
    assert torch.equal(back[indices], x[indices])
    assert not back[[0, 2, 3]].any()


def test_metadata_and_removal() -> None:
    shim.install()
    shim.install()
    import flash_attn

    assert flash_attn.__version__ == shim.VERSION
    assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == shim.VERSION
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert torch.__version__.startswith(importlib.metadata.version("torch"))
    shim.uninstall()
    shim.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


def test_another_flash_attn_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(RuntimeError, match="replace=True"):
        shim.install()
    assert sys.modules["flash_attn"] is other
    shim.install(replace=True)
    assert importlib.import_module("flash_attn").flash_attn_func is flash_attn_ext.flash_attn_func
    shim.uninstall()
    assert sys.modules["flash_attn"] is other


def tiny_model(device: str, dtype: torch.dtype) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MistralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).to(device, dtype).eval()


def logits_of_three_batches(model: torch.nn.Module, device: str) -> list[torch.Tensor]:
    """Without padding, padded on the left, and packed; only rows of tokens."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = torch.tensor([[*range(5), *range(7)]], device=device)
    with torch.no_grad():
        return [
            model(ids).logits,
            model(ids, attention_mask=mask).logits[mask.bool()],
            model(ids[:1], position_ids=positions, use_cache=False).logits,
        ]


def test_transformers_flash_attention_2_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers wants a GPU for it; told that there is one, it runs ours, on the CPU."""
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    from transformers import modeling_flash_attention_utils as utils
    from transformers.utils import import_utils

    model = tiny_model("cpu", torch.float32)
    model.set_attn_implementation("eager")
    expected = logits_of_three_batches(model, "cpu")
    assert not import_utils.is_flash_attn_2_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    shim.install()
    try:
        assert import_utils.is_flash_attn_2_available()
        model.set_attn_implementation("flash_attention_2")
        actual = logits_of_three_batches(model, "cpu")
    finally:
        shim.uninstall()
    assert not import_utils.is_flash_attn_2_available()
    assert utils._flash_varlen_fn is flash_attn_ext.flash_attn_varlen_func
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5 * float(y.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transformers_flash_attention_2(dtype: torch.dtype) -> None:
    """No further from float32 than twice what eager attention in the same dtype is."""
    exact_model = tiny_model("cuda", torch.float32)
    exact_model.set_attn_implementation("eager")
    exact = logits_of_three_batches(exact_model, "cuda")
    model = tiny_model("cuda", dtype)
    model.set_attn_implementation("eager")
    eager = logits_of_three_batches(model, "cuda")
    model.set_attn_implementation("flash_attention_2")
    ours = logits_of_three_batches(model, "cuda")
    for x, y, z in zip(ours, eager, exact, strict=True):
        assert 0 < (x.float() - z).norm() <= 2 * (y.float() - z).norm()
