"""Images, video, sound, and models that read text beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .entry import (
    BOTH,
    CAUSAL,
    CONTENT,
    EAGER,
    FULL,
    TEXT,
    VOCAB,
    Entry,
    Inputs,
    make_entry,
    noise,
    slow,
    tokens,
)


def pixels(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    return {"pixel_values": noise(batch, 3, 16, 16)}


PATCHES = 16  # of a 16 x 16 image with patches of 4


def pixels_and_order(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """The masked autoencoder draws a random patch order unless it is given one."""
    return {**pixels(entry, batch, length, padded), "noise": noise(batch, PATCHES)}


def video(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    return {"pixel_values": noise(batch, 2, 3, 16, 16)}


IMAGE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    num_channels=3,
)


WINDOWED: dict[str, Any] = dict(
    image_size=16, patch_size=2, num_channels=3, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2
)


def big_pixels(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    size = entry.config["image_size"]
    size = size[0] if isinstance(size, list) else size
    return {"pixel_values": noise(batch, 3, size, size)}


def vision(
    name: str, sites: Mapping[str, int] = FULL, model_type: str = "", base=IMAGE, **extra: Any
) -> Entry:
    return make_entry(
        "vision",
        name,
        sites,
        model_type,
        {**base, **extra},
        inputs_of=pixels,
        paddable=False,
        resizable=False,
    )


VISION = (
    vision("vit"),
    vision("dinov2"),
    vision("vit_mae", mask_ratio=0.0, inputs_of=pixels_and_order),
    vision("beit", {"full+bias": 2}, use_relative_position_bias=True),
    vision("swin", {"full+bias": 4}, base=WINDOWED),
    vision("clip_vision_model", FULL),
    vision("siglip_vision_model", {"full": 3}),
    vision(
        "segformer",
        {"full": 2},
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    vision(
        "pvt",
        {"full": 2},
        implementations=EAGER,
        depths=[1, 1],
        num_encoder_blocks=2,
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    vision("dinov3_vit"),
    vision(
        "cvt",
        {"full": 3},
        base={},
        embed_dim=[16, 32],
        num_heads=[2, 4],
        depth=[1, 2],
        patch_sizes=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
        implementations=EAGER,
    ),
    vision(
        "levit",
        {"full+bias": 5},
        base={},
        image_size=128,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 4, 6],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        implementations=EAGER,
        inputs_of=big_pixels,
    ),
    vision("timesformer", {"full": 4}, num_frames=2, inputs_of=video, implementations=EAGER),
    vision(
        "hiera",
        base={},
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        inputs_of=big_pixels,
        implementations=EAGER,
    ),
    vision(
        "poolformer", {}, base={}, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], implementations=EAGER
    ),
    vision("sam_vision_model", CONTENT),
    # Further models with a spelling that stands above already.
    *slow(
        vision("deit"),
        vision("dinov2_with_registers"),
        vision("ijepa"),
        vision("vit_msn"),
        vision("beit-plain", FULL, "beit"),
        vision("data2vec-vision", {"full+bias": 2}, use_relative_position_bias=True),
        vision("swinv2", {"full+bias": 4}, base=WINDOWED, implementations=EAGER),
        vision("yolos", image_size=(16, 16), num_detection_tokens=3),
        vision("videomae", num_frames=2, tubelet_size=1, inputs_of=video),
        vision("vivit", num_frames=2, tubelet_size=[1, 4, 4], inputs_of=video),
        vision("vitdet", pretrain_image_size=16, implementations=EAGER),
        vision("dpt"),
        vision("aimv2_vision_model", {"full": 3}),
        vision("mlcd_vision_model"),
    ),
)


def waveform(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    samples = 8 * length + 10
    inputs = {"input_values": noise(batch, samples)}
    if padded:
        keep = torch.ones(batch, samples, dtype=torch.long)
        keep[1:, -24:] = 0
        inputs["attention_mask"] = keep
    return inputs


WAVE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    conv_dim=[16, 16],
    conv_kernel=[5, 3],
    conv_stride=[4, 2],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
    feat_proj_dropout=0.0,
)


def features(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    inputs = {"input_features": noise(batch, 2 * length, 8)}
    if padded:
        keep = torch.ones(batch, 2 * length, dtype=torch.long)
        keep[1:, -6:] = 0
        inputs["attention_mask"] = keep
    return inputs


def audio(name: str, sites: Mapping[str, int] = FULL, model_type: str = "", base=WAVE, **extra: Any) -> Entry:
    return make_entry("audio", name, sites, model_type, {**base, **extra}, inputs_of=waveform)


AUDIO = (
    audio("wav2vec2"),
    audio("wavlm", CONTENT, padding_reaches=0, implementations=EAGER),
    audio("sew-d", CONTENT, padding_reaches=0, squeeze_factor=1, implementations=EAGER),
    audio("data2vec-audio", conv_pos_kernel_size=3),
    audio("wav2vec2-conformer", CONTENT, padding_reaches=0),
    audio("wav2vec2-bert", CONTENT, padding_reaches=0, feature_projection_input_dim=8, inputs_of=features),
    audio(
        "audio-spectrogram-transformer",
        base={**IMAGE, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 4, "time_stride": 4},
        inputs_of=lambda e, b, n, p: {"input_values": noise(b, 24, 16)},
        paddable=False,
        resizable=False,
    ),
    audio(
        "parakeet_encoder",
        CONTENT,
        padding_reaches=0,
        subsampling_factor=2,
        subsampling_conv_channels=8,
        num_mel_bins=8,
        inputs_of=features,
        implementations=BOTH,
    ),
    # Further models with a spelling that stands above already.
    *slow(
        audio("wav2vec2-stable", FULL, "wav2vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
        audio("hubert"),
        audio("unispeech"),
        audio("unispeech-sat"),
        audio("sew", squeeze_factor=1),
    ),
)


def text_and_pixels(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    return {**tokens(entry, batch, length, padded), "pixel_values": noise(batch, 3, 16, 16)}


def text_and_regions(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Text beside five image regions with their boxes."""
    regions = {"visual_feats": noise(batch, 5, 8), "visual_pos": noise(batch, 5, 4)}
    return {**tokens(entry, batch, length, padded), **regions}


def multimodal(name: str, sites: Mapping[str, int], model_type: str = "", **extra: Any) -> Entry:
    return make_entry("multimodal", name, sites, model_type, extra, inputs_of=text_and_pixels)


MULTIMODAL = (
    multimodal(
        "clip",
        {"causal": 2, "full": 2},
        padding_reaches=2,
        text_config=TEXT,
        vision_config=IMAGE,
        projection_dim=16,
    ),
    multimodal(
        "blip",
        {"full": 4},
        padding_reaches=2,
        implementations=EAGER,
        text_config={**TEXT, "is_decoder": False},
        vision_config=IMAGE,
        projection_dim=16,
        image_text_hidden_size=16,
    ),
    multimodal(
        "vilt",
        {},
        refused={"capture": 1},
        why="it chooses image patches by the values of its pixel mask",
        implementations=EAGER,
        **TEXT,
        **{k: IMAGE[k] for k in ("image_size", "patch_size", "num_channels")},
    ),
    multimodal(
        "lxmert",
        {"full": 8},
        padding_reaches=4,
        **TEXT,
        l_layers=2,
        x_layers=1,
        r_layers=2,
        visual_feat_dim=8,
        inputs_of=text_and_regions,
        implementations=EAGER,
    ),
    multimodal("clip_text_model", CAUSAL, inputs_of=tokens, **TEXT),
    # Further models with a spelling that stands above already.
    *slow(
        multimodal("siglip", {"full": 5}, padding_reaches=2, text_config=TEXT, vision_config=IMAGE),
        multimodal(
            "chinese_clip",
            {"full": 4},
            padding_reaches=2,
            text_config=TEXT,
            vision_config=IMAGE,
            projection_dim=16,
        ),
        multimodal(
            "owlvit",
            {"causal": 2, "full": 2},
            padding_reaches=2,
            text_config=TEXT,
            vision_config=IMAGE,
            projection_dim=16,
        ),
        multimodal(
            "flava",
            {"full": 6},
            padding_reaches=4,
            implementations=EAGER,
            text_config=TEXT,
            image_config=IMAGE,
            multimodal_config=TEXT,
        ),
        multimodal(
            "visual_bert", FULL, **TEXT, visual_embedding_dim=8, inputs_of=tokens, implementations=EAGER
        ),
        multimodal("siglip_text_model", FULL, inputs_of=tokens, auto="SiglipTextModel", **TEXT),
        multimodal(
            "align_text_model", FULL, inputs_of=tokens, auto="AlignTextModel", implementations=EAGER, **TEXT
        ),
    ),
)
