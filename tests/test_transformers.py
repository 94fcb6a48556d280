"""transformers' models with our attention against their own eager attention: outputs and gradients.

Small random models from the library's configs. In float32 both sides round differently in every layer: differences stay
below 2e-5 of the largest value, where a single wrong mask element shows as 1e-2 and more. In float64, for models whose
eager attention does not go through float32, below 1e-11.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="4.57", reason="transformers is not installed")

import transformers

from flash_attn_ext.integrations import sdpa
from flash_attn_ext.integrations import transformers as fa_ext
from flash_attn_ext.integrations.masks import Band

fa_ext.register()

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
VOCAB = 99
SEQLEN = 13
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "pad_token_id": 0,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
WINDOW = 5
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SCALES = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}

# By name: the model class and its config's arguments.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED, "attn_logit_softcapping": 0.5},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED}),
    "phi": ("PhiForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_scales": ("GPT2LMHeadModel", {**GPT2, **GPT2_SCALES}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED, "num_local_experts": 4},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "intermediate_size_mlp": 40,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "pad_token_id": 0}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**SIZES, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    ),
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
TEXT_TO_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", {**SEQ2SEQ, "max_position_embeddings": 64}),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"text_config": {**SIZES, "eos_token_id": 98}, "vision_config": VISION, "projection_dim": 16}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
WHISPER |= {"begin_suppress_tokens": None, "suppress_tokens": None}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "vit": ("ViTModel", VISION),
    "clip": ("CLIPModel", CLIP),
}
MODELS = {**DECODERS, **ENCODERS, **TEXT_TO_TEXT, **OTHERS}
# Models whose eager attention has a softmax in the model's own dtype.
EXACT = ("bert", "roberta", "distilbert", "gpt2", "t5", "bart", "whisper", "llama4")

# Models that have attention classes of their own, in transformers 4 and, T5, some versions of 5.
MAY_LACK_INTERFACE = ("bert", "roberta", "modernbert", "distilbert", "qwen2_moe", "t5")

# Models that do not divide their scores by the root of the head dim.
UNSCALED = ("t5", "gpt2_scales")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name in MAY_LACK_INTERFACE and not has_interface(name):
        pytest.skip("in this version of transformers it asks for no attention function")
    model = model_of(name, "eager")
    set_attention(model, "eager")
    if name not in UNSCALED:  # larger scores than those of a new model, so that a wrong one shows
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.to(dtype).eval()


def set_attention(model: Any, implementation: str) -> None:
    """Also in parts whose copy of the configuration some versions of transformers 5 forget: those of T5."""
    model.set_attn_implementation(implementation)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config._attn_implementation = implementation


def has_interface(name: str) -> bool:
    """Whether the code of the model asks for an attention function."""
    return bool(getattr(transformers, MODELS[name][0])._can_set_attn_implementation())


def model_of(name: str, implementation: str) -> Any:
    class_name, arguments = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(
        model_class.config_class(**arguments, **({} if name == "clip" else {"attn_implementation": implementation}))
    )


def calls() -> int:
    """Of our attention function, by models that run or are compiled."""
    stats = fa_ext.stats()
    return stats.attended + stats.traced


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padding(side: str) -> Tensor:
    mask = torch.ones(3, SEQLEN, dtype=torch.int64)
    if side == "right":
        mask[1, -4:] = mask[2, -9:] = 0
    elif side == "left":
        mask[1, :4] = mask[2, :9] = 0
    return mask


def inputs_of(name: str, side: str, dtype: torch.dtype) -> dict[str, Tensor]:
    ids, mask = token_ids(3, SEQLEN), padding(side)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": torch.cat([ids, ids.new_full((3, 1), 98)], 1), "pixel_values": pixels}
    if name == "whisper":
        features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if name in TEXT_TO_TEXT:
        decoder_mask = padding("right" if side == "right" else "none")[:, :9]
        inputs |= {"decoder_input_ids": token_ids(3, 9, seed=1), "decoder_attention_mask": decoder_mask}
    return inputs


def step(model: Any, implementation: str, inputs: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
    """Outputs at places that are tokens, and the gradients of all parameters."""
    set_attention(model, implementation)
    model.zero_grad()
    before = calls()
    outputs = model(**inputs)
    assert (calls() > before) == (implementation == fa_ext.NAME)
    results = {}
    for key in ("logits", "last_hidden_state", "image_embeds", "text_embeds"):
        if getattr(outputs, key, None) is not None:
            results[key] = outputs[key] if valid is None else outputs[key][valid]
    loss = 0
    for seed, result in enumerate(results.values()):
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result)
        loss = loss + (result * weights).sum()
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {**{key: result.detach() for key, result in results.items()}, **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    # A gradient that is zero but for rounding, like that of a bias of keys, is measured by the others.
    scale = max(x.abs().max() for x in expected.values())
    for key, x in expected.items():
        largest = max(x.abs().max(), 1e-2 * scale)
        assert (actual[key] - x).abs().max() <= tolerance * largest, key


def assert_same(model: Any, inputs: dict[str, Tensor], valid: Tensor | None = None, tolerance: float = 2e-5) -> None:
    """Eager attention and ours give the same outputs and gradients."""
    assert_close(step(model, fa_ext.NAME, inputs, valid), step(model, "eager", inputs, valid), tolerance)


def valid_places(inputs: dict[str, Tensor]) -> Tensor | None:
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return None if mask is None else mask.bool()


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, side: str) -> None:
    if name in OTHERS and side != "none":
        pytest.skip("takes no padding mask")
    inputs = inputs_of(name, side, torch.float32)
    assert_same(build(name), inputs, valid_places(inputs))


@pytest.mark.parametrize("name", EXACT)
def test_float64_is_exact(name: str) -> None:
    inputs = inputs_of(name, "right", torch.float64)
    assert_same(build(name, torch.float64), inputs, valid_places(inputs), tolerance=1e-11)


def prompt(name: str, side: str = "left") -> dict[str, Tensor]:
    inputs = inputs_of(name, side, torch.float32)
    return {key: x for key, x in inputs.items() if not key.startswith("decoder")}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_packed_sequences(name: str) -> None:
    """position_ids that restart: as eager attention, and for models that pass them on, as if sequences were alone."""
    model, lengths = build(name), (5, 11, 8)
    ids = token_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_same(model, inputs)
    if name in ("llama", "mistral", "gemma2"):
        model.set_attn_implementation(fa_ext.NAME)
        together = model(**inputs).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-5 * float(alone.detach().abs().max()))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_masks_of_four_dimensions(name: str) -> None:
    visible = torch.rand(3, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(0)) < 0.6
    visible |= torch.eye(SEQLEN, dtype=torch.bool)
    if name == "bert" and not VERSION_5:
        pytest.skip("BERT of transformers 4 takes no such mask")
    if name == "gpt2" and not VERSION_5:  # whose eager attention is causal in any case
        visible = visible.tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = build(name)
    inputs = {"input_ids": token_ids(3, SEQLEN), "attention_mask": mask}
    assert_same(model, inputs)
    model.set_attn_implementation(fa_ext.NAME)
    with torch.no_grad():
        added = model(**inputs).logits
        torch.testing.assert_close(model(**{**inputs, "attention_mask": visible}).logits, added)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "bert", "modernbert", "bart"])
def test_no_mask_is_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    model.set_attn_implementation(fa_ext.NAME)

    def fail(band: Band) -> Tensor:
        raise AssertionError(f"{band} was written out")

    monkeypatch.setattr(Band, "dense", fail)
    for side in ("none", "right", "left"):
        model(**inputs_of(name, side, torch.float32))
    if name in DECODERS:
        for cache in ("dynamic", "static"):
            model.generate(**prompt(name), max_new_tokens=3, do_sample=False, cache_implementation=cache)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_compiled(name: str, side: str) -> None:
    model = build(name)
    model.set_attn_implementation(fa_ext.NAME)
    inputs = inputs_of(name, side, torch.float32)
    valid = inputs["attention_mask"].bool()
    if side == "none":
        del inputs["attention_mask"]
    expected = model(**inputs).logits[valid]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(**inputs).logits[valid], expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


def test_a_graph_break_before_attention_keeps_causal_order() -> None:
    """The mask function is traced, and the attention function is not."""
    model = build("llama")
    model.set_attn_implementation(fa_ext.NAME)
    ids = token_ids(2, SEQLEN)
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
        layer.self_attn.forward = torch._dynamo.disable(layer.self_attn.forward)
    actual = torch.compile(model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MAY_LACK_INTERFACE)
def test_models_without_the_interface(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """They stay as they are, and say so; with torch's function they run here by integrations.sdpa, but for T5."""
    if has_interface(name):
        pytest.skip("in this version of transformers it asks for an attention function")
    model, inputs = model_of(name, "eager").eval(), inputs_of(name, "none", torch.float32)
    transformers.logging.enable_propagation()
    model.set_attn_implementation(fa_ext.NAME)
    transformers.logging.disable_propagation()
    assert "does not support setting its attention implementation" in caplog.text
    assert model.config._attn_implementation == "eager"
    if name == "t5":
        return
    expected = model(**inputs).logits
    with sdpa.enable():
        actual = model_of(name, "sdpa").eval()(**inputs).logits
        assert sdpa.stats().attended == 2  # layers
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_calls_are_counted() -> None:
    model, ids = build("llama"), token_ids(2, SEQLEN)
    model.set_attn_implementation(fa_ext.NAME)
    before = fa_ext.stats()
    model(ids)
    assert fa_ext.stats().attended == before.attended + 2  # layers
    torch._dynamo.reset()  # its limit of compilations counts those of other tests
    torch.compile(model, backend="aot_eager")(ids)
    assert fa_ext.stats().attended == before.attended + 2
    assert fa_ext.stats().traced == before.traced + 2
    torch._dynamo.reset()


@pytest.mark.skipif(not VERSION_5, reason="transformers 4 gives None and does not ask")
@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "t5", "whisper"])
def test_output_attentions_raises(name: str) -> None:
    model, inputs = build(name), inputs_of(name, "none", torch.float32)
    set_attention(model, fa_ext.NAME)
    with pytest.raises((ValueError, TypeError), match="output_attentions must not be given"):
        model(**inputs, output_attentions=True)
    model(**inputs, output_hidden_states=True)


def test_is_asked_for_when_loading(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=fa_ext.NAME)
    assert model.config._attn_implementation == fa_ext.NAME
    assert_same(model, {"input_ids": token_ids(2, SEQLEN)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert", "t5", "vit"])
def test_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float32 on the CPU than twice (gradients: three times) what eager attention in this dtype is."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs = inputs_of(name, "right", torch.float32)
    valid = valid_places(inputs)
    exact = step(build(name), "eager", inputs, valid)
    moved = {key: x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for key, x in inputs.items()}
    valid = None if valid is None else valid.cuda()
    model = build(name, dtype).cuda()
    eager, ours = (step(model, implementation, moved, valid) for implementation in ("eager", fa_ext.NAME))

    def error(result: dict[str, Tensor], key: str) -> float:
        return float((result[key].cpu().float() - exact[key]).norm())

    for key, x in exact.items():
        factor = 2 if key in ("logits", "last_hidden_state") else 3
        assert error(ours, key) <= factor * error(eager, key) + 1e-5 * float(x.norm()), key
