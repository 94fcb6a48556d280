"""What `architectures` cannot find by the names of configs' entries and of forward's arguments, one model a line.

A model that is named here is built from its small config with these entries in place of its own, and run on these
inputs, where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ResNetConfig

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}  # expand * hidden_size = n_heads * d_head
SAM_VISION = {"image_size": 64, "output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16}
SAM_PROMPTS = {"image_size": 64, "image_embedding_size": 4}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CHAMELEON_WORDS = {"<image>": 8, **{f"IMGIMG{'ABCDEFGH'[i]}Z": 10 + i for i in range(8)}}
VQ = {"num_embeddings": 8, "base_channels": 32, "latent_channels": 32, "resolution": 32, "channel_multiplier": [1, 1]}
LEVELS_OF_SAM3 = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
SAM3_VIT = {"image_size": 112, "pretrain_image_size": 112, "window_size": 4, "global_attn_indexes": [1]}


@dataclass(frozen=True)
class Override:
    model: str = ""
    """The class to build; empty: the first of the folder that works."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries, those of nested configs nested."""
    inputs: Callable[[], dict[str, Any]] | None = None


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ids(seqlen: int = 12) -> Tensor:
    return torch.randint(21, 60, (2, seqlen), generator=torch.Generator().manual_seed(0))


def mask(seqlen: int = 12) -> Tensor:
    return torch.ones(2, seqlen, dtype=torch.int64).index_fill(1, torch.tensor(seqlen - 1), 0)


def text(**others: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids(), "attention_mask": mask(), **others}


def time_series() -> dict[str, Tensor]:
    past, future = 15, 8  # the context and its longest lag
    return {
        "past_values": noise(2, past),
        "past_time_features": noise(2, past, 1),
        "past_observed_mask": torch.ones(2, past),
        "future_values": noise(2, future),
        "future_time_features": noise(2, future, 1),
    }


TIME_SERIES = {"context_length": 8, "prediction_length": 8, "num_time_features": 1, "lags_sequence": [1, 2, 7]}


def points(size: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(1, 3, size, size), "input_points": size * torch.rand(1, 1, 2, 2)}


OVERRIDES: dict[str, Override] = {
    "bamba": Override(config={**MAMBA, "attn_layer_indices": [1]}),
    "chameleon": Override(config={"vocabulary_map": CHAMELEON_WORDS, "vq_config": VQ}, inputs=text),
    "cohere_compass": Override(
        "CohereCompassTextModel", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "dbrx": Override(config={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}),
    "deepseek_ocr2": Override("DeepseekOcr2TextModel", {"mlp_layer_types": ["dense", "sparse"], "n_group": 1}),
    "deformable_detr": Override(
        config={"backbone_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4).to_dict()}
    ),
    "dory": Override(config={"num_hidden_layers": 6, "layer_types": ["sliding_attention", "mlp", "full_attention"] * 2}),
    "gemma3n": Override("Gemma3nTextModel", {"hidden_size_per_layer_input": 8, "laurel_rank": 8}),
    "glm4v": Override("Glm4vTextModel", {"rope_parameters": SECTIONS}),
    "glm4v_moe": Override("Glm4vMoeTextModel", {"rope_parameters": SECTIONS}),
    "glm_image": Override("GlmImageTextModel", {"rope_parameters": SECTIONS}),
    "granite_speech5": Override(inputs=lambda: {"input_features": noise(2, 64, 160)}),
    "granitemoehybrid": Override(config={**MAMBA, "layer_types": ["linear_attention", "full_attention"]}),
    "hrm_text": Override(config={"num_hidden_layers": 2, "num_layers_per_stack": None}),
    "hunyuan_vl": Override("HunYuanVLTextModel", {"rope_parameters": {**SECTIONS, "xdrope_section": [1, 1, 1, 1]}}),
    "idefics": Override(inputs=lambda: text(image_encoder_embeddings=noise(2, 1, 5, 32), image_attention_mask=ids()[..., None].sign())),
    "informer": Override(config=TIME_SERIES, inputs=time_series),
    "inkling": Override("InklingTextModel", {"swa_num_key_value_heads": 2, "rel_extent": 16}),
    "inkling2": Override("Inkling2TextModel", {"swa_num_key_value_heads": 2, "rel_extent": 16}),
    "inkling2_loop": Override(
        "Inkling2LoopTextModel",
        {"swa_num_key_value_heads": 2, "rel_extent": 16, "loop_layer_index_start": 0, "loop_layer_index_end": 1},
    ),
    "lfm2_moe": Override(config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mistral_large4": Override(
        "MistralLarge4TextModel", {"qk_rope_head_dim": 8, "index_topk": 4, "index_n_heads": 4, "indexer_types": ["full"] * 2}
    ),
    "muse_glimmer_assistant": Override(
        config={"target_layer_ids": [0, 1]},
        inputs=lambda: {"noise_embeds": noise(2, 6, 32), "context_hidden_states": noise(2, 9, 64)},
    ),
    "neucodec": Override(inputs=lambda: {"input_values": noise(1, 1, 3200), "input_features": noise(1, 10, 32)}),
    "patchtsmixer": Override(config={"self_attn": True, "self_attn_heads": 2}),
    "pix2struct": Override("Pix2StructTextModel", {"initializer_range": 0.02}),
    "pp_ocrv5_mobile_rec": Override(inputs=lambda: {"pixel_values": noise(1, 3, 48, 64)}),
    "qwen4_exp": Override(
        "Qwen4ExpTextModel",
        {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
    "sam": Override(
        config={"vision_config": SAM_VISION, "prompt_encoder_config": SAM_PROMPTS}, inputs=lambda: points(64)
    ),
    "sam_hq": Override(
        config={"vision_config": SAM_VISION, "prompt_encoder_config": SAM_PROMPTS}, inputs=lambda: points(64)
    ),
    "sam3_tracker": Override(
        config={
            "vision_config": {"backbone_config": SAM3_VIT, **LEVELS_OF_SAM3},
            "prompt_encoder_config": {"image_size": 112},
        },
        inputs=lambda: points(112),
    ),
    "time_series_transformer": Override(config=TIME_SERIES, inputs=time_series),
    "timesfm": Override(
        "TimesFmModel",
        inputs=lambda: {
            "past_values": noise(2, 160),
            "past_values_padding": torch.zeros(2, 160, dtype=torch.int64),
            "freq": torch.zeros(2, 1, dtype=torch.int64),
        },
    ),
    "timesfm2_5": Override("TimesFm2_5Model", inputs=lambda: {"past_values": noise(2, 160)}),
    "videomt": Override(config={"image_size": 64}, inputs=lambda: {"pixel_values_videos": noise(1, 2, 3, 64, 64)}),
    "vjepa2": Override(
        config={"crop_size": 32, "frames_per_clip": 4}, inputs=lambda: {"pixel_values_videos": noise(2, 4, 3, 32, 32)}
    ),
    "wav2vec2_bert": Override(inputs=lambda: {"input_features": noise(2, 12, 32), "attention_mask": mask()}),
    "xcodec2": Override(inputs=lambda: {"input_values": noise(1, 1, 3200), "input_features": noise(1, 10, 32)}),
    "xmod": Override(config={"languages": ["en_XX"], "default_language": "en_XX"}),
    "zamba": Override(config={"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 4}),
    "zamba2": Override(config={"mamba_headdim": 8, "mamba_d_state": 8, "chunk_size": 8, "hybrid_layer_ids": [1], "mamba_ngroups": 1, "adapter_rank": 8}),
}
