"""Encoder-decoders: text to text, and speech to text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .entry import (
    ALTERNATE,
    EAGER,
    GROUPED,
    IDS,
    SEED,
    VOCAB,
    Entry,
    Inputs,
    ids,
    make_entry,
    noise,
    slow,
    tokens,
)

SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    use_cache=False,
)
T5: dict[str, Any] = dict(
    vocab_size=VOCAB,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    use_cache=False,
)
BART_SITES = {"full": 4, "causal": 2}  # encoder self and cross are full
T5_SITES = {"full+bias": 2, "causal+bias": 2, "full": 2}


def token_pairs(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """An encoder text of `length` and a shorter decoder text."""
    return {**tokens(entry, batch, length, padded), "decoder_input_ids": ids(batch, length - 3, SEED + 1)}


def seq2seq(
    name: str, sites: Mapping[str, int] = BART_SITES, model_type: str = "", base=SEQ2SEQ, **extra: Any
) -> Entry:
    return make_entry("encoder-decoder", name, sites, model_type, {**base, **extra}, inputs_of=token_pairs)


def mel(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Whisper: a spectrogram of fixed length, text that varies."""
    frames = 2 * entry.config["max_source_positions"]
    features = noise(batch, entry.config["num_mel_bins"], frames)
    return {"input_features": features, "decoder_input_ids": ids(batch, length)}


def frames(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Speech-to-text: 4 frames per position after two strided convolutions."""
    inputs = {"input_features": noise(batch, 4 * length, entry.config["input_feat_per_channel"])}
    if padded:
        keep = torch.ones(batch, 4 * length, dtype=torch.long)
        keep[1:, -8:] = 0
        inputs["attention_mask"] = keep
    return {**inputs, "decoder_input_ids": ids(batch, length - 3)}


ENCODER_DECODERS = (
    seq2seq("t5", T5_SITES, base=T5),
    seq2seq("bart"),
    seq2seq("pegasus"),
    seq2seq(
        "fsmt",
        {},
        refused={"capture": 1},
        why="its forward asks in Python whether any token is padding",
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
        langs=["en", "de"],
        implementations=EAGER,
    ),
    seq2seq(
        "whisper",
        inputs_of=mel,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        paddable=False,
    ),
    seq2seq(
        "speech_to_text",
        inputs_of=frames,
        input_feat_per_channel=8,
        num_conv_layers=2,
        conv_kernel_sizes=[3, 3],
        conv_channels=16,
        max_source_positions=128,
        max_target_positions=64,
        implementations=EAGER,
    ),
    # Further models with a spelling that stands above already.
    *slow(
        seq2seq("t5-gated", T5_SITES, "t5", base=T5, feed_forward_proj="gated-gelu"),
        seq2seq("mt5", T5_SITES, base=T5),
        seq2seq("umt5", T5_SITES, base=T5),
        seq2seq(
            "switch_transformers",
            {},
            refused={"capture": 1},
            why="its router replaces its own weights inside forward",
            base=T5,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            implementations=EAGER,
        ),
        seq2seq(
            "longt5",
            {"other": 2, "causal+bias": 2, "full": 2},
            padding_reaches=2,
            resizable=False,
            base=T5,
            local_radius=3,
            implementations=EAGER,
        ),
        seq2seq("mbart"),
        seq2seq("marian"),
        seq2seq("m2m_100"),
        seq2seq("blenderbot"),
        seq2seq("blenderbot-small"),
        seq2seq("plbart"),
        seq2seq(
            "nllb-moe",
            {},
            refused={"capture": 1},
            why="its router replaces its own weights inside forward",
            num_experts=4,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            implementations=EAGER,
        ),
        seq2seq(
            "led",
            {},
            refused={"capture": 1},
            why="torch.export cannot trace its data-dependent global attention",
            attention_window=4,
            implementations=EAGER,
        ),
        seq2seq(
            "prophetnet",
            {"full": 4, "other+bias": 4},
            padding_reaches=4,
            base=IDS,
            hidden_size=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            implementations=EAGER,
        ),
        seq2seq(
            "pegasus_x",
            {"full": 3, "causal": 2},
            refused={"weights-escape": 2},
            padding_reaches=3,
            resizable=False,
            why="the weights of a local block are split between local and global values",
            block_size=4,
            num_global_tokens=2,
            stagger_local_blocks=False,
            implementations=EAGER,
        ),
        seq2seq(
            "t5gemma",
            {},
            refused={"capture": 1},
            why="it returns a cache whatever its config says; lz.linearize captures it without one",
            base={"use_cache": False},
            encoder={**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ALTERNATE},
            decoder={**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ALTERNATE},
            implementations=EAGER,
        ),
        seq2seq(
            "moonshine",
            base=GROUPED,
            inputs_of=lambda e, b, n, p: {
                "input_values": noise(b, 400 * n + 127),
                "decoder_input_ids": ids(b, n),
            },
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            encoder_num_key_value_heads=4,
            decoder_num_key_value_heads=4,
            paddable=False,
        ),
    ),
)
