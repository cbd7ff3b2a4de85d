"""Which model types of transformers build as tiny random models from their config class, no row by hand.

    python benchmarks/model_types.py                every type that an auto class knows
    python benchmarks/model_types.py --only llama t5

A config is shrunk by the names of its fields, its parts likewise. Models are built on the meta device:
this is the first step of a survey of all types, and says how far it would reach.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MOST = 60_000_000
"""Parameters of a model that is still called small."""

SIZES: dict[str, int] = {
    r"vocab_size": 64,
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|projection_dim|embedding_size|emb_dim)": 32,
    r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|d_inner|mlp_dim|ffn_hidden_size)": 48,
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth)": 2,
    r"(.*_)?(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads)": 4,
    r"(.*_)?(num_key_value_heads|n_kv_heads)": 2,
    r"(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|d_head|head_size)": 8,
    r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len)": 128,
    r"(.*_)?(num_local_experts|num_experts|n_routed_experts)": 4,
    r"(.*_)?(num_experts_per_tok|top_k)": 2,
    r"image_size": 32,
    r"patch_size": 8,
}
"""The most that a whole number may be, by a pattern of the field's name."""


def shrunk(config: Any) -> Any:
    """The config with small sizes, in place: whole numbers become smaller where they are too large."""
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            shrunk(part)
    for name, value in list(vars(config).items()):
        if name == "layer_types" and isinstance(value, list):
            config.layer_types = list(dict.fromkeys(value))[:2] if len(set(value)) > 1 else value[:2]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            token = re.search(r"token_(id|index)$", name) and value >= SIZES["vocab_size"]
            if token or (most is not None and value > most):
                setattr(config, name, 3 if token else most)
    return config


def model_class(model_type: str) -> Any | None:
    """The class that generates, or else the bare model; None where no auto class knows the type."""
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        if model_type in names:
            name = names[model_type]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    return None


def outcome(model_type: str) -> str:
    """`built` with the number of parameters, or in a few words why not."""
    try:
        found = model_class(model_type)
        if found is None:
            return "part: a part of other models"
        config = shrunk(CONFIG_MAPPING[model_type]())
        with torch.device("meta"):
            model = found._from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        return f"{'built' if count <= MOST else 'large'}: {count / 1e6:.2f} million"
    except Exception as error:  # anything that a config class or a model raises is a row of the table
        return f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found = {name: outcome(name) for name in options.only or sorted(CONFIG_MAPPING.keys())}
    for name, text in found.items():
        if options.only or not text.startswith(("built", "part")):
            print(f"{name:36} {text}")
    print(len(found), "types:", dict(Counter(text.split(":")[0] for text in found.values())))


if __name__ == "__main__":
    main()
