"""A tiny random model of any model type of transformers, from its config class alone.

A config is shrunk by the names of its fields, its parts likewise. `ROWS` holds the few fields of those that
need help, because a size must divide another or a default is no value at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .entry import SEED, randomise

MOST = 100_000_000
"""Parameters of a model that is still called small."""
VOCABULARY = 64

SIZES: dict[str, int] = {
    r"(.*_)?vocab_size(_.*)?|encoder_hash_byte_group_vocab": VOCABULARY,
    r"(.*_)?n_group|topk_group|num_expert_groups?": 1,
    r"num_kv_shared_layers": 0,
    r"rotary_dim": 4,
    r"hidden_size_per_layer_input": 8,
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|projection_dim|embedding_size|emb_dim)": 32,
    r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|d_inner|mlp_dim|ffn_hidden_size)": 48,
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth)": 2,
    r"(.*_)?(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads)": 4,
    r"(.*_)?(num_key_value_heads|n_kv_heads)": 2,
    r"mamba_(d_head|head_dim)": 16,
    r"(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|d_head|head_size)": 16,
    r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len)": 128,
    r"(.*_)?(num_local_experts|num_experts|n_routed_experts)": 4,
    r"(.*_)?(num_experts_per_tok|top_k)|moe_k": 2,
    r"d_latents|output_channels|intra_bottleneck_size|upsample_groups": 32,
    r"sliding_window": 8,
    r"image_size": 32,
    r"patch_size": 8,
}
"""The most that a whole number may be, by a pattern of the field's name; the first that fits counts."""

_SECTIONS = {"rope_parameters": {"mrope_section": [1, 1, 2]}}
_HALF = {"rope_parameters": {"mrope_section": [1, 1, 0]}}
_SWIN = dict(embed_dim=24, depths=[1, 1], num_heads=[2, 4], hidden_size=48, num_layers=2, window_size=4)

ROWS: dict[str, dict[str, Any]] = {
    "deepseek_v2": dict(num_experts_per_tok=2),
    "donut-swin": _SWIN,
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1),
    "esm": dict(vocab_size=VOCABULARY, pad_token_id=1, mask_token_id=3),
    "glm4v": dict(text_config=_SECTIONS),
    "glm46v": dict(text_config=_SECTIONS),
    "glm4v_moe": dict(text_config=_HALF),
    "glm4v_moe_text": _HALF,
    "glm4v_text": _SECTIONS,
    "glm_image": dict(text_config=_SECTIONS),
    "glm_image_text": _SECTIONS,
    "glm_ocr": dict(text_config=_SECTIONS),
    "glm_ocr_text": _SECTIONS,
    "glmga": dict(text_config=_SECTIONS),
    "llama4": dict(pad_token_id=0),
    "maskformer-swin": _SWIN,
    "mobilebert": dict(true_hidden_size=32, intra_bottleneck_size=32),
    "swin2sr": {**_SWIN, "num_heads": [2, 2]},
    "swinv2": _SWIN,
}
"""Fields of the config of types whose defaults, shrunk, do not fit together."""


class NotBuilt(Exception):
    """Why there is no tiny model of a type."""


def types() -> list[str]:
    """Every model type of which some auto class knows a model; the others are parts of those."""
    return [name for name in sorted(CONFIG_MAPPING.keys()) if class_names(name)]


def class_names(model_type: str) -> list[str]:
    """The classes of the type: those that generate, then the bare model."""
    found = []
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        if model_type in names:
            name = names[model_type]
            found += [name] if isinstance(name, str) else list(name)[:1]
    return found


def shrunk(config: Any) -> Any:
    """A config of the same class with small sizes: whole numbers are smaller where they were too large.

    Of lists with an entry for each layer two entries stay, of layers of unlike types where there are such.
    What a class derives from its fields it derives anew, where it takes the fields that it has.
    """
    small: dict[str, Any] = {}
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            small[name] = shrunk(part)
    layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:2] if isinstance(kinds, list) else []
    kept = kept if len(kept) == 2 else [0, 1]
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers and layers > 2:
            small[name] = [value[index] for index in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            token = re.search(r"token_(id|index)$", name) and value >= VOCABULARY
            if token or (most is not None and value > most):
                small[name] = 3 if token else most
    own = vars(config)
    if "num_key_value_heads" in small and own["num_key_value_heads"] == own.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    head = small.get("head_dim") or getattr(config, "head_dim", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(head, int) and "mrope_section" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": _sections(rope, head)}
    try:
        return type(config)(**{name: value for name, value in small.items() if not name.startswith("_")})
    except Exception:  # fields that do not fit together in the class's own eyes, or are none of its own
        set_fields(config, small)
        return config


def _sections(rope: Mapping[str, Any], head_dim: int) -> list[int]:
    """The sections of a rotary embedding in proportion, so that they fill half of the rotated features."""
    whole = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    old = rope["mrope_section"]
    new = [max(1, whole * part // sum(old)) for part in old]
    new[0] += whole - sum(new)
    return new


def set_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of a config; a dict for a field that is a config or a dict sets fields of that."""
    for name, value in fields.items():
        part = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(part, transformers.PretrainedConfig):
            set_fields(part, value)
        elif isinstance(value, Mapping) and isinstance(part, Mapping):
            setattr(config, name, {**part, **value})
        else:
            setattr(config, name, value)


def build(model_type: str) -> nn.Module:
    """A tiny model of the type in eval mode, with weights in which a wrong mask or scale shows.

    Raises NotBuilt, which says why.
    """
    names = class_names(model_type)
    if not names:
        raise NotBuilt("a part of other models")
    problem = ""
    for name in names:
        try:
            return _built(model_type, name)
        except Exception as error:  # whatever a config class or a model raises is the reason
            problem += f"{type(error).__name__}: {' '.join(str(error).split())[:160]} "
    raise NotBuilt(problem.strip())


def _built(model_type: str, name: str) -> nn.Module:
    config = shrunk(CONFIG_MAPPING[model_type]())
    cls: Any = getattr(transformers, name)
    if hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = cls.can_generate()  # the language model of an encoder is a decoder
    if getattr(config, "decoder_start_token_id", 0) is None:
        config.decoder_start_token_id = 1
    for part in (config, config.get_text_config()):
        if vars(part).get("head_dim", 0) is None:
            part.head_dim = part.hidden_size // part.num_attention_heads
        if vars(part).get("num_key_value_heads", 0) is None:
            part.num_key_value_heads = part.num_attention_heads
    set_fields(config, ROWS.get(model_type, {}))
    if hasattr(config, "validate"):
        config.validate()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
    if count > MOST:
        raise NotBuilt(f"it has {count / 1e6:.0f} million parameters however small its fields are")
    torch.manual_seed(SEED)
    model: nn.Module = cls._from_config(config)
    randomise(model)
    return model.eval()
