"""What `architectures` cannot find by the names of configs' entries and of forward's arguments, one model a line.

Some it finds, but only after most of a minute, among other models, configs and larger images.

A model that is named here is built from its small config with these entries in place of its own, and run on these
inputs, where there are any.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ResNetConfig

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}  # expand * hidden_size = n_heads * d_head
WIDE = {"attention_hidden_size": 64, "attention_head_dim": 16}  # twice the hidden size
SAM_VISION = {
    "image_size": 64,
    "output_channels": 32,
    "window_size": 2,
    "global_attn_indexes": [1],
    "num_pos_feats": 16,
}
SAM_PROMPTS = {"image_size": 64, "image_embedding_size": 4}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
INKLING = {"swa_num_key_value_heads": 2, "rel_extent": 16}
LOOPED = {
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "n_layers_per_attn_res_block": 1,
}
CODEC = {"quantization_dim": 64}
CHAMELEON_WORDS = {"<image>": 8, **{f"IMGIMG{'ABCDEFGH'[i]}Z": 10 + i for i in range(8)}}
SHARED_LAYERS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [40] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
    **dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers", "num_key_value_heads"), 2),
    "num_attention_heads": 4,
    "vocab_size": 160,
    "layer_types": ["sliding_attention", "full_attention"],
}
ATOMS = {"num_spatial_rope_pairs_per_axis": 1, "num_uid_rope_pairs": 1}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "image_size": [128, 128],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "window_size_per_stage": [8, 4, 4, 4],
    "global_attention_blocks": [3],
}
SAM2_VISION = {
    "model_type": "sam2_vision_model",
    "backbone_config": HIERA,
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 32,
}
VIDEO = {
    "initializer_range": 0.3,  # outputs that stand out from rounding
    "image_size": 128,
    "memory_attention_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32,
    "prompt_encoder_config": {"image_size": 128},
}
RESAMPLER = {
    "perceiver_resampler_hidden_size": 64,
    "perceiver_resampler_attention_head_dim": 64,
    "perceiver_resampler_num_latents": 16,
    "perceiver_resampler_num_latents_2d": 16,
}
TOKENIZER = {"num_filters": 2, "depths": [1] * 7}
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


def image(height: int, width: int | None = None) -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, height, width or height)}


def ids_only() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def time_series() -> dict[str, Tensor]:
    past, future = 15, 8  # the context and its longest lag
    return {
        "past_values": noise(2, past),
        "past_time_features": noise(2, past, 1),
        "past_observed_mask": torch.ones(2, past),
        "future_values": noise(2, future),
        "future_time_features": noise(2, future, 1),
    }


TIME_SERIES = {
    "context_length": 8,
    "prediction_length": 8,
    "num_time_features": 1,
    "lags_sequence": [1, 2, 7],
    "feature_size": 6,
}


def points(size: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(1, 3, size, size), "input_points": size * torch.rand(1, 1, 2, 2)}


def molecule() -> dict[str, Any]:
    """Four residues of two atoms each."""
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs

    residues, zeros, token = torch.arange(4)[None], torch.zeros(1, 4, dtype=torch.int64), torch.arange(8)[None] // 2
    atoms = EsmFold2AtomInputs(
        ref_pos=noise(1, 8, 3),
        ref_charge=torch.zeros(1, 8),
        atom_attention_mask=torch.ones(1, 8, dtype=torch.bool),
        ref_element=torch.arange(1, 9)[None],
        ref_atom_name_chars=torch.arange(32).view(1, 8, 4),
        ref_space_uid=token,
        atom_to_token=token,
    )
    return {
        **dict.fromkeys(("token_index", "residue_index", "res_type"), residues),
        **dict.fromkeys(("asym_id", "sym_id", "entity_id", "mol_type"), zeros),
        "token_bonds": torch.zeros(1, 4, 4, 1),
        "attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "atom_inputs": atoms,
    }


def session(name: str, size: int) -> dict[str, Any]:
    """A video of two frames, and a point in the first one."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = next(value for key, value in vars(module).items() if key.endswith("VideoInferenceSession"))
    video = kind(video=noise(2, 3, size, size), video_height=size, video_width=size, dtype=torch.float32)
    point = {"point_coords": torch.full((1, 1, 1, 2), size / 3), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    video.add_point_inputs(video.obj_id_to_idx(1), 0, point)
    video.obj_with_new_inputs = [1]
    return {"inference_session": video, "frame_idx": 0}


def shared_keys(seqlen: int, **heads_and_dim: tuple[int, int]) -> dict[str, Any]:
    shared = {kind: (noise(2, heads, 12, dim),) * 2 for kind, (heads, dim) in heads_and_dim.items()}
    return {
        "inputs_embeds": noise(2, seqlen, 64),
        "position_ids": torch.arange(12 - seqlen, 12)[None],
        "attention_mask": mask(),
        "shared_kv_states": shared,
    }


OVERRIDES: dict[str, Override] = {
    "align": Override("AlignModel", inputs=lambda: text(**image(64))),
    "bamba": Override(config={**MAMBA, "attn_layer_indices": [1]}),
    "blip_2": Override("Blip2VisionModel", inputs=lambda: image(224)),
    "blt": Override("BltPatcher", inputs=text),
    "chameleon": Override(config={"vocabulary_map": CHAMELEON_WORDS, "vq_config": VQ}, inputs=text),
    "chmv2": Override(
        config={
            "backbone_config": {"num_hidden_layers": 4, "image_size": 64, "out_indices": [1, 2, 3, 4]},
            "post_process_channels": [8, 8, 16, 16],
        },
        inputs=lambda: {"pixel_values": noise(1, 3, 64, 64)},
    ),
    "cohere_compass": Override(
        "CohereCompassTextModel", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "d_fine": Override("DFineModel", inputs=lambda: image(128)),
    "dbrx": Override(config={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}),
    "deepseek_ocr2": Override("DeepseekOcr2TextModel", {"mlp_layer_types": ["dense", "sparse"], "n_group": 1}),
    "deformable_detr": Override(
        config={"backbone_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4).to_dict()}
    ),
    "deimv2": Override("Deimv2Model", inputs=lambda: image(128)),
    "dory": Override(
        config={
            **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    ),
    "edgetam": Override(
        config={"vision_config": SAM2_VISION, "prompt_encoder_config": {"image_size": 128}}, inputs=lambda: points(128)
    ),
    "edgetam_video": Override(
        config={
            **VIDEO,
            "vision_config": SAM2_VISION,
            **RESAMPLER,
        },
        inputs=lambda: session("edgetam_video", 128),
    ),
    "esmfold2": Override(
        config={
            "single_inputs_size": 99,  # the atoms' 32 beside two one-hot residues of 33 and one
            "atom_encoder": ATOMS,
            "structure_head": {"diffusion_module": {"atom_encoder": ATOMS}},
            "num_loops": 1,
            "atom_feature_dim": 389,
        },
        inputs=molecule,
    ),
    "gemma3n": Override("Gemma3nTextModel", {**SHARED_LAYERS, "hidden_size_per_layer_input": 8, "laurel_rank": 8}),
    "gemma4_assistant": Override(
        config={"text_config": GEMMA4, "backbone_hidden_size": 32},
        inputs=lambda: shared_keys(1, sliding_attention=(2, 8), full_attention=(2, 8)),
    ),
    "gemma4_unified_assistant": Override(
        inputs=lambda: shared_keys(12, sliding_attention=(2, 8), full_attention=(2, 512))
    ),
    "glm46v": Override(config={"text_config": {"rope_parameters": SECTIONS}}, inputs=text),
    "glm4v": Override("Glm4vTextModel", {"rope_parameters": SECTIONS}),
    "glm4v_moe": Override("Glm4vMoeTextModel", {"rope_parameters": SECTIONS}),
    "glm_image": Override("GlmImageTextModel", {"rope_parameters": SECTIONS}),
    "granite_speech5": Override(inputs=lambda: {"input_features": noise(2, 64, 320)}),
    "granitemoehybrid": Override(config={**MAMBA, "layer_types": ["linear_attention", "full_attention"]}),
    "hrm_text": Override(config={"num_hidden_layers": 2, "num_layers_per_stack": None}),
    "hunyuan_vl": Override(
        "HunYuanVLTextModel",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [1, 1, 1, 1]}},
    ),
    "idefics": Override(
        inputs=lambda: text(image_encoder_embeddings=noise(2, 1, 5, 32), image_attention_mask=ids()[..., None].sign())
    ),
    "informer": Override(config=TIME_SERIES, inputs=time_series),
    "inkling": Override("InklingTextModel", INKLING),
    "inkling2": Override("Inkling2TextModel", INKLING),
    "inkling2_loop": Override(
        "Inkling2LoopTextModel",
        {**INKLING, **LOOPED},
    ),
    "lfm2_moe": Override(config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "maskformer": Override("MaskFormerModel", inputs=lambda: image(64)),
    "mistral_large4": Override(
        "MistralLarge4TextModel",
        {"qk_rope_head_dim": 8, "index_topk": 4, "index_n_heads": 4, "indexer_types": ["full"] * 2},
    ),
    "muse_glimmer_assistant": Override(
        config={"target_layer_ids": [0, 1]},
        inputs=lambda: {"noise_embeds": noise(2, 6, 32), "context_hidden_states": noise(2, 9, 64)},
    ),
    "neucodec": Override(
        config=CODEC, inputs=lambda: {"input_values": noise(1, 1, 3200), "input_features": noise(1, 10, 32)}
    ),
    "patchtsmixer": Override(config={"self_attn": True, "self_attn_heads": 2}),
    "pi0": Override(
        "PI0Model",
        inputs=lambda: text(
            action_embeds=noise(2, 4, 32),
            pixel_values=noise(2, 1, 3, 224, 224),
            pixel_attention_mask=torch.ones(2, 1, dtype=torch.int64),
        ),
    ),
    "pix2struct": Override("Pix2StructTextModel", {"initializer_range": 0.02}),
    "pp_doclayout_v2": Override("PPDocLayoutV2Model", inputs=lambda: image(128)),
    "pp_doclayout_v3": Override("PPDocLayoutV3Model", inputs=lambda: image(128)),
    "pp_doclayout_v4": Override("PPDocLayoutV4Model", inputs=lambda: image(128)),
    "pp_ocrv5_mobile_rec": Override(inputs=lambda: {"pixel_values": noise(1, 3, 96, 64)}),
    "pp_ocrv5_server_rec": Override("PPOCRV5ServerRecForTextRecognition", inputs=lambda: image(48, 64)),
    "pp_ocrv6_small_rec": Override("PPOCRV6SmallRecForTextRecognition", inputs=lambda: image(48, 64)),
    "qwen4_exp": Override(
        "Qwen4ExpTextModel",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "rt_detr": Override("RTDetrModel", inputs=lambda: image(128)),
    "rt_detr_v2": Override("RTDetrV2Model", inputs=lambda: image(128)),
    "sam": Override(
        config={"vision_config": SAM_VISION, "prompt_encoder_config": SAM_PROMPTS}, inputs=lambda: points(64)
    ),
    "sam2": Override("Sam2VisionModel", inputs=lambda: image(64)),
    "sam_hq": Override(
        config={"vision_config": SAM_VISION, "prompt_encoder_config": SAM_PROMPTS}, inputs=lambda: points(64)
    ),
    "sam2_video": Override(config={**VIDEO, "vision_config": SAM2_VISION}, inputs=lambda: session("sam2_video", 128)),
    "sam3_tracker_video": Override(
        config={
            **VIDEO,
            "image_size": 112,
            "vision_config": {"backbone_config": SAM3_VIT, **LEVELS_OF_SAM3},
            "prompt_encoder_config": {"image_size": 112},
        },
        inputs=lambda: session("sam3_tracker_video", 112),
    ),
    "shieldgemma2": Override(config={"yes_token_index": 3, "no_token_index": 4}),
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
    "vibevoice": Override(config={"audio_config": TOKENIZER, "semantic_model_config": TOKENIZER}, inputs=ids_only),
    "vibevoice_asr": Override(
        config={"acoustic_tokenizer_encoder_config": TOKENIZER, "semantic_tokenizer_encoder_config": TOKENIZER},
        inputs=text,
    ),
    "videomt": Override(config={"image_size": 64}, inputs=lambda: {"pixel_values_videos": noise(1, 2, 3, 64, 64)}),
    "vjepa2": Override(
        config={"crop_size": 32, "frames_per_clip": 4}, inputs=lambda: {"pixel_values_videos": noise(2, 4, 3, 32, 32)}
    ),
    "wav2vec2_bert": Override(inputs=lambda: {"input_features": noise(2, 12, 32), "attention_mask": mask()}),
    "xcodec2": Override(
        config=CODEC, inputs=lambda: {"input_values": noise(1, 1, 3200), "input_features": noise(1, 10, 32)}
    ),
    "xmod": Override(config={"languages": ["en_XX"], "default_language": "en_XX"}),
    "zamba": Override(
        config={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_dt_rank": 4,
            **WIDE,
        }
    ),
    "zamba2": Override(
        config={
            **WIDE,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "hybrid_layer_ids": [1],
            "mamba_ngroups": 1,
            "adapter_rank": 8,
        }
    ),
}
