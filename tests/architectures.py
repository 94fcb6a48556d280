"""The smallest model of every architecture in transformers whose attention goes through its attention interface.

`architectures` lists them, `smallest` builds one with inputs on which its eager attention runs. Sizes are found by the
names that configs share, and inputs by those of forward's arguments; `architecture_overrides` has what single models
need beside that. What cannot be built is reported with the error it ended in.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_overrides import OVERRIDES, Override
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 160
SEQLEN = 12
LARGEST = 130_000_000  # parameters

# A config's entries by pattern of their name, the first that fits: what a small model has there.
SMALL: tuple[tuple[str, int], ...] = (
    (r"(num_)?key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_key_value_heads_.*", 2),
    (r"num_key_value_groups", 2),
    (r".*(attention|attn)_heads|n_heads?|num_heads|.*num_(query_)?heads|decoder_heads|encoder_heads|nhead", 4),
    (r"(qk_rope|qk_nope|v|qk|kv)_head_dim|head_dim|d_kv|attention_head_dim|.*head_dim|attention_key_dim", 8),
    (r"(q|kv|o)_lora_rank|index_head_dim|lora_rank", 16),
    (r"(moe|expert).*intermediate_size|.*shared_expert_intermediate_size|expert_ffn_hidden_size", 16),
    (r".*(intermediate_size|ffn_dim|inner_dim|n_inner|ffn_hidden_size|dim_feedforward|d_ff).*", 40),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts|num_(text|vision)_experts", 4),
    (r"(num_experts_per_tok|moe_top_?k|moe_k|top_?k_experts|num_experts_per_token|router_top_k)", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|num_expert_group", 1),
    (r".*_layers|n_layers?|num_layers|.*num_blocks|depth|encoder_layers|decoder_layers|num_hidden_layers", 2),
    (r"max_(position_embeddings|sequence_length|seq_len)|n_positions|n_ctx|max_target_positions", 128),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|embed_size|hidden_dim|out_dim|dim)", 32),
    (r"image_size", 384),
    (r".*projection_(dim|size)|width|out_hidden_size|output_dim|cross_attention_dim", 32),
)
# Of these the default stays: they count something else, or are checked against tables.
KEEP = re.compile(
    r".*(conv|kernel|stride|rotary|rope|temporal|mrope|num_labels|mamba|ssm|linear_|window|first_k|rank_ratio).*"
)
# Entries that a config derives from others, or that name layers which a small model does not have.
DERIVED = (
    *("transformers_version", "architectures", "model_type", "torch_dtype", "dtype", "rope_scaling"),
    *("out_features", "out_indices", "stage_names", "qk_head_dim", "per_layer_config", "id2label", "label2id"),
)
TOKEN = re.compile(r".*token_(id|index)(_.*)?|.*_token_id|pad_token_id")


# What stands for None, in configs that cannot be built from their defaults.
FILL = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "prediction_length": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "num_experts": 4,
    "num_dense_layers": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Level:
    """How small."""

    layers: int = 2
    keep_head_dim: bool = False
    only_layers: bool = False


# Why a folder has no model to examine, if it is not the error that the first attempt ended in.
NOT_REACHED = "does not use the interface"

LEVELS = (Level(), Level(keep_head_dim=True), Level(layers=9), Level(only_layers=True))


@dataclass(frozen=True)
class Architecture:
    name: str
    """The folder in transformers.models."""
    model_class: type[PreTrainedModel]
    model: PreTrainedModel
    inputs: dict[str, Tensor]


def architectures() -> list[str]:
    """Folders of transformers.models whose code asks for an attention function, or is marked as able to use one."""
    marks = ("ALL_ATTENTION_FUNCTIONS", "_supports_attention_backend = True")
    models = Path(transformers.__file__).parent / "models"
    paths = models.glob("*/modeling_*.py")
    return sorted({path.parent.name for path in paths if any(mark in path.read_text() for mark in marks)})


def model_classes(name: str) -> list[type[PreTrainedModel]]:
    """The models that the folder defines: those without a head first."""
    folder = Path(transformers.__file__).parent / "models" / name
    files = sorted(path.stem for path in folder.glob("modeling_*.py"))
    modules = [importlib.import_module(f"transformers.models.{name}.{file}") for file in files]
    classes = [
        c
        for module in modules
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and c.config_class is not None
        and "PreTrained" not in c.__name__
        and c.forward is not PreTrainedModel.forward
    ]
    return sorted(classes, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))


def small(entries: dict[str, Any], level: Level) -> dict[str, Any]:
    """A config's entries with small sizes."""
    entries = {key: value for key, value in entries.items() if key not in DERIVED or key == "model_type"}
    result = {key: _small(key, value, level) for key, value in entries.items()}
    heads, heads_kv, hidden = "num_attention_heads", "num_key_value_heads", "hidden_size"
    if heads_kv in entries and entries[heads_kv] == entries.get(heads):
        result[heads_kv] = result[heads]
    if level.keep_head_dim:
        for size, count in ((hidden, heads), ("n_embd", "n_head"), ("d_model", "num_heads")):
            if isinstance(entries.get(size), int) and isinstance(entries.get(count), int):
                result[size] = result[count] * (entries[size] // entries[count])
    layers = next((result[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in result), None)
    count = layers if isinstance(layers, int) else level.layers
    before = entries.get("num_hidden_layers")
    for key, value in result.items():
        if isinstance(value, list) and len(value) == before and isinstance(value[0], (int, float)):  # one a layer
            result[key] = [_small(key, x, level) for x in value[:count]]
        if key.endswith(("layer_types", "layers_block_type", "mlp_layer_types")) and isinstance(value, list) and value:
            kinds = sorted(set(value), key=value.index)
            result[key] = [kinds[i % len(kinds)] for i in range(count)]
    return result


def _small(key: str, value: Any, level: Level) -> Any:
    if isinstance(value, dict):
        return small(value, level) if "model_type" in value or key.endswith("_config") else value
    if value is None and not level.keep_head_dim:
        return FILL.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r".*vocab_size.*", key):
        return min(value, VOCAB)
    if TOKEN.fullmatch(key):
        return value if 0 <= value < 20 else VOCAB - 1 - sum(map(ord, key)) % 60
    if KEEP.fullmatch(key) or (level.keep_head_dim and key.endswith(("head_dim", "_rank", "d_kv"))):
        return value
    for pattern, size in SMALL:
        if re.fullmatch(pattern, key):
            is_depth = size == 2 and ("layer" in key or key in ("depth", "num_blocks"))
            return min(value, level.layers) if is_depth else value if level.only_layers else min(value, size)
    return value


def configs(config_class: type[PreTrainedConfig], override: Mapping[str, Any]) -> Iterator[PreTrainedConfig]:
    """The smallest first; then with more of what the default has. With an override it alone."""
    if override:
        try:
            entries = config_class().to_dict()
        except Exception:  # the default itself is not valid
            entries = {}
        chosen = replaced(small(entries, LEVELS[0]), override)
        chosen.pop("model_type", None)
        yield config_class(**chosen)
        return
    entries = config_class().to_dict()
    for level in LEVELS:
        chosen = small(entries, level)
        chosen.pop("model_type", None)
        try:
            yield config_class(**chosen)
        except Exception:
            continue
    yield config_class()


def replaced(entries: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(entries)
    for key, value in override.items():
        nested = (
            isinstance(value, Mapping)
            and isinstance(result.get(key), dict)
            and "model_type" not in value
            and key != "rope_parameters"
        )
        result[key] = replaced(result[key], value) if nested else value
    return result


def inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Sets of arguments for forward, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def ids(seqlen: int = SEQLEN) -> Tensor:
        vocab = getattr(model.config, "vocab_size", None)
        end = min(90, vocab) if isinstance(vocab, int) else 90
        return torch.randint(min(21, end - 1), end, (2, seqlen), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        text["input_ids"] = ids()
        mask = torch.ones(2, SEQLEN, dtype=torch.int64)
        mask[1, -4:] = 0
        if "attention_mask" in parameters:
            text["attention_mask"] = mask
    if "decoder_input_ids" in parameters:
        text["decoder_input_ids"] = ids(7)
    if "bbox" in parameters:
        text["bbox"] = torch.zeros(2, SEQLEN, 4, dtype=torch.int64)

    config = model.config
    sources = [
        config,
        *(getattr(config, f"{k}_config", None) for k in ("vision", "audio", "encoder", "text", "backbone")),
    ]

    def first(*names: str, default: Any) -> Any:
        for source in sources:
            for entry in names:
                value = getattr(source, entry, None)
                if isinstance(value, int) or (isinstance(value, (list, tuple)) and "image_size" in names):
                    return value
        return default

    images = []
    if "pixel_values" in parameters:
        channels = first("num_channels", "in_channels", "in_chans", default=3)
        frames = first("num_frames", "frames_per_clip", default=2)
        for size in (first("image_size", "img_size", "input_size", "crop_size", default=64), 64, 224):
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            if isinstance(height, int) and height <= 384:
                images += [noise(2, channels, height, width), noise(1, channels, height, width)]
                images.append(noise(1, frames, channels, height, width))
    sounds = []
    if "input_features" in parameters:
        bins = first("num_mel_bins", "n_mels", "feature_size", "input_channels", "input_feat_per_channel", default=80)
        length = 2 * first("max_source_positions", default=100)
        sounds = [noise(2, bins, length), noise(2, 100, bins)]
    if "input_values" in parameters:
        sounds = [
            noise(2, 4000),
            noise(2, 1, 4000),
            noise(2, first("max_length", default=64), first("num_mel_bins", default=16)),
        ]

    sets: list[dict[str, Tensor]] = []
    for image in images:
        with_text = {key: value[: len(image)] for key, value in text.items()}
        sets += [{**with_text, "pixel_values": image}, {"pixel_values": image}]
    for name in ("input_features", "input_values"):
        if name in parameters:
            sets += [{**{k: v for k, v in text.items() if k.startswith("decoder")}, name: sound} for sound in sounds]
    if text:
        sets = [text, *sets] if images else [*sets, text]
    if "hidden_states" in parameters:
        width = first("hidden_size", "d_model", "embed_dim", default=32)
        sets += [{"hidden_states": noise(2, SEQLEN, width)}, {"hidden_states": noise(SEQLEN, width)}]
    if "inputs_embeds" in parameters:
        width = first("hidden_size", "d_model", "embed_dim", default=32)
        sets.append({"inputs_embeds": noise(2, SEQLEN, width)})
    if "past_values" in parameters:
        length, channels = first("context_length", default=32), first("num_input_channels", "input_size", default=1)
        sets.append({"past_values": noise(2, length, channels)})
    yield from sets


def smallest(name: str, reached: Any) -> Architecture:
    """Raises RuntimeError with a reason, if none of the folder's models runs.

    reached: called with a model and its inputs; whether its eager run asks for an attention function.
    """
    override = OVERRIDES.get(name, Override())
    errors: dict[str, str] = {}
    for model_class in model_classes(name):
        if override.model not in ("", model_class.__name__):
            continue
        try:
            candidates = list(configs(model_class.config_class, override.config))
        except Exception as error:
            errors[model_class.__name__] = one_line(error)
            continue
        for config in candidates:
            try:
                model = _build(model_class, config)
            except Exception as error:
                errors.setdefault(model_class.__name__, one_line(error))
                continue
            arguments = inspect.signature(model.forward).parameters.values()
            required = [x.name for x in arguments if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD]
            problem = f"needs {', '.join(required)}"
            for given in inputs(model) if override.inputs is None else [override.inputs()]:
                try:
                    if reached(model, given):
                        return Architecture(name, model_class, model, given)
                    errors[model_class.__name__] = NOT_REACHED
                except Exception as error:
                    problem = one_line(error)
            errors.setdefault(model_class.__name__, problem)
    if set(errors.values()) == {NOT_REACHED}:
        raise RuntimeError(NOT_REACHED)
    raise RuntimeError(next((error for error in errors.values() if error != NOT_REACHED), "defines no model"))


def _build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise RuntimeError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.numel() and x.abs().max() < 1e-3:  # gates and scales that start at zero would hide attention
                x.normal_(0, 0.02)
    return model


def one_line(error: Exception) -> str:
    """Its type and first sentence."""
    sentence = " ".join(str(error).split()).split(". ")[0]
    return textwrap.shorten(f"{type(error).__name__}: {sentence}", 120, placeholder=" ...")
