"""Generation by transformers' models with our attention: the same tokens as with eager attention, and logits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="4.57", reason="transformers is not installed")

import transformers
from test_transformers import (
    DECODERS,
    GROUPED,
    MIXED,
    MODELS,
    SEQLEN,
    TEXT_TO_TEXT,
    VERSION_5,
    WINDOW,
    build,
    calls,
    prompt,
    set_attention,
    token_ids,
)
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from flash_attn_ext.integrations import transformers as fa_ext

GENERATORS = [*DECODERS, *TEXT_TO_TEXT, "whisper"]
CACHED = ["llama", "mistral", "gemma2", "gpt_oss"]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 3},
}


def generate(model: Any, implementation: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    set_attention(model, implementation)
    before = calls()
    result = model.generate(
        **inputs,
        min_new_tokens=10,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert (calls() > before) == (implementation == fa_ext.NAME)
    return result.sequences, torch.stack(result.logits)


def assert_generates_the_same(model: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    expected, expected_logits = generate(model, "eager", inputs, **options)
    actual, logits = generate(model, fa_ext.NAME, inputs, **options)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-5 * float(expected_logits.abs().max()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_what_eager_does(name: str, options: dict[str, Any]) -> None:
    """Prompts of several lengths, padded on the left."""
    assert_generates_the_same(build(name), prompt(name), **options)


@pytest.mark.parametrize("name", GENERATORS)
def test_static_cache_without_padding(name: str) -> None:
    assert_generates_the_same(build(name), prompt(name, "none"), cache_implementation="static")


@pytest.mark.parametrize("name", CACHED)
def test_whole_cache(name: str) -> None:
    """By default the cache of layers with a window keeps no more than the window; this one keeps everything."""
    model = build(name)
    results = []
    for implementation in ("eager", fa_ext.NAME):
        cache = transformers.DynamicCache()
        results.append(generate(model, implementation, prompt(name), past_key_values=cache)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", DECODERS)
def test_continues_from_a_cache_with_several_tokens(name: str) -> None:
    model = build(name)
    results = []
    for implementation in ("eager", fa_ext.NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(token_ids(2, 11), use_cache=True).past_key_values
            results.append(model(token_ids(2, 6, seed=1), past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5 * float(results[0].abs().max()))


@pytest.mark.parametrize("assisted", [True, False], ids=["assistant", "lookup"])
@pytest.mark.parametrize("name", DECODERS)
def test_assisted_generation(name: str, assisted: bool) -> None:
    """Several tokens a step, of which the cache forgets those that were guessed wrong: as eager greedy generation."""
    model, assistant = build(name), build(name)
    with torch.no_grad():
        head = assistant.get_output_embeddings().weight
        head.add_(0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    assistant.set_attn_implementation(fa_ext.NAME)
    given = {"assistant_model": assistant} if assisted else {"prompt_lookup_num_tokens": 2}
    ids = token_ids(1, SEQLEN).repeat(1, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.set_attn_implementation("eager")
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    model.set_attn_implementation(fa_ext.NAME)
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False, **given), expected)


def eager_with_empty_rows_of_zeros(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    out, _ = sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **others)
    if mask is not None:
        sees_nothing = (mask[..., : key.shape[-2]] == torch.finfo(mask.dtype).min).all(-1)
        out = out.masked_fill(sees_nothing.transpose(1, 2)[..., None], 0)
    return out, None


@pytest.mark.skipif(not VERSION_5, reason="transformers 4 shows eager attention more keys")
@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_the_right(name: str) -> None:
    """The first token comes from a row of padding then. Where all that its window or chunk holds is padding, it is 0
    with ours, and the mean of all values with eager attention; there is no other difference.
    """
    AttentionInterface.register("zeros", eager_with_empty_rows_of_zeros)
    AttentionMaskInterface.register("zeros", masking_utils.eager_mask)
    model, inputs = build(name), prompt(name, "right")
    (expected, expected_logits), (actual, logits) = (generate(model, kind, inputs) for kind in ("zeros", fa_ext.NAME))
    assert torch.equal(actual, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-5 * float(expected_logits.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("backend", ["fp8", "quanto"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi"])  # the library quantises full attention only
def test_quantised_cache(
    name: str, backend: str, side: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one layer, whose keys and values do not depend on attention: else a difference in rounding could take a number
    to the next step of four or eight bits, by chance."""
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        cache = {"backend": backend, "nbits": 4, "q_group_size": 8, "residual_length": 4}
    elif hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        cache = {"backend": backend}
    else:
        pytest.skip("this transformers has no fp8 cache")
    if options and not VERSION_5:
        pytest.skip("transformers 4 fails to reorder a quantised cache, with eager attention too")
    model_class, arguments = MODELS[name]
    monkeypatch.setitem(MODELS, name, (model_class, {**arguments, "num_hidden_layers": 1}))
    options = {**options, "cache_implementation": "quantized", "cache_config": cache}
    model = build(name)
    assert_generates_the_same(model, prompt(name, side), **options)
    tokens, logits = generate(model, fa_ext.NAME, prompt(name, side))
    coarse_tokens, coarse = generate(model, fa_ext.NAME, prompt(name, side), **options)
    assert not (torch.equal(coarse_tokens, tokens) and torch.equal(coarse, logits))  # the cache was coarse indeed


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="transformers has no Gemma 4")
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks_that_are_cut_to_the_last_row(options: dict[str, Any], side: str) -> None:
    """Gemma 4 does so in layers that share keys, where only the last token's logits are needed."""
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED * 2, "sliding_window": WINDOW}
    config = transformers.Gemma4TextConfig(**{**GROUPED, **sizes, **layers})
    model = transformers.Gemma4ForCausalLM(config).eval()
    assert_generates_the_same(model, prompt("llama", side), **options)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_with_a_compiled_forward(name: str) -> None:
    model = build(name)
    expected, _ = generate(model, fa_ext.NAME, prompt(name), cache_implementation="static")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    actual, _ = generate(model, fa_ext.NAME, prompt(name), cache_implementation="static")
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", CACHED)
def test_generation_on_a_gpu(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs = {key: x.cuda() for key, x in prompt(name).items()}
    options: dict[str, Any] = {"cache_implementation": cache}
    waits = "prefetch_stream.wait_stream" in inspect.getsource(transformers.Cache.update)
    if cache.startswith("offloaded") and not waits:
        pytest.skip("this transformers loads keys while it still stores them: what they are is chance")
    if cache == "offloaded_static":
        if name == "mistral":
            pytest.skip("all layers have a window, and transformers finds none to load, with eager attention either")
        options["disable_compile"] = True  # torch's compiler crashes on the cache's streams, with eager attention, too
    assert_generates_the_same(build(name).cuda(), inputs, **options)
