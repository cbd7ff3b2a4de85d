"""The model zoo: tiny random transformers models and what is true of their attention.

Every entry is built from its config class: two layers, a few heads, random weights large enough that a wrong
mask, scale or head shows far above 1e-5. `sites` is written by hand from each architecture's definition, so
it is a second opinion on the matcher, not a record of it. Nothing here imports the package under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TRACED = (2, 12)
"""(batch, length in tokens) of the example that is captured."""
OTHERS = ((3, 9), (4, 17))
"""Sizes that are not traced; a window of 4 tokens is narrower than every length."""

VOCAB = 64
SEED = 7
BOTH = ("eager", "sdpa")
EAGER = ("eager",)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)
IDS = {k: TEXT[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache")}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}

Inputs = dict[str, Tensor]
MakeInputs = Callable[["Entry", int, int, bool], Inputs]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    name: unique. kind: decoder, encoder, encoder-decoder, vision, audio or multimodal. model_type: key of the
    config class. auto: the class that builds the model. sites: mask label without its padding part -> number
    of attention calls. inputs_of: makes keyword inputs for (batch, length, padded). implementations: those
    that transformers has. paddable: takes a padding mask. resizable: length changes the inputs.
    refused: reason code -> number of refusals ("capture" where the whole model is beyond torch.export);
    why: one sentence on them. slow: not among the models that the default test run builds.
    padding_reaches: sites whose mask depends on the padding mask, where `padded` guesses wrong.
    masked_sites: `sites` where the graph is captured with a padding mask, if that changes them.
    """

    name: str
    kind: str
    model_type: str
    config: Mapping[str, Any]
    sites: Mapping[str, int]
    inputs_of: MakeInputs
    auto: str = "AutoModel"
    implementations: tuple[str, ...] = BOTH
    paddable: bool = True
    resizable: bool = True
    refused: Mapping[str, int] = field(default_factory=dict)
    why: str = ""
    slow: bool = False
    padding_reaches: int | None = None
    masked_sites: Mapping[str, int] | None = None

    def build(self, attn_implementation: str) -> nn.Module:
        """The model in eval mode, float32, with the same weights for every implementation."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        torch.manual_seed(SEED)
        # AutoModel does not know every config class; where it does not, `auto` names the class itself.
        cls = getattr(transformers, self.auto)
        if self.auto.startswith("Auto"):
            model = cls.from_config(config, attn_implementation=attn_implementation)
        else:
            model = cls._from_config(config, attn_implementation=attn_implementation)
        randomise(model)
        return model.eval()

    def inputs(self, batch: int, length: int, padded: bool = False) -> Inputs:
        """Keyword inputs of `length` tokens; `padded` adds a mask that switches keys off on both sides."""
        return self.inputs_of(self, batch, length, padded)

    def expected(self, masked: bool) -> Mapping[str, int]:
        """Mask label -> attention calls, in a graph captured with or without a padding mask."""
        return self.masked_sites if masked and self.masked_sites is not None else self.sites

    @property
    def total(self) -> int:
        """Attention calls."""
        return sum(self.sites.values())

    @property
    def padded(self) -> int:
        """Attention calls whose mask depends on the padding mask; decoder tokens are never padded here."""
        if self.padding_reaches is not None:
            return self.padding_reaches
        if self.kind == "encoder-decoder":
            return sum(n for label, n in self.sites.items() if not label.startswith(("causal", "window")))
        return self.total


def randomise(model: nn.Module) -> None:
    """Weights of std 0.3, biases and gains of std 0.1 around their initial value."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)


def padding_mask(batch: int, length: int) -> Tensor:
    """[B, T] of 0 and 1: the first row whole, then in turn two tokens off on the left, three on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, :2] = 0
    mask[2::2, -3:] = 0
    return mask


def _ids(batch: int, length: int, seed: int = SEED) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def tokens(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    inputs = {"input_ids": _ids(batch, length)}
    if padded:
        inputs["attention_mask"] = padding_mask(batch, length)
    return inputs


def token_pairs(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """An encoder text of `length` and a shorter decoder text."""
    return {**tokens(entry, batch, length, padded), "decoder_input_ids": _ids(batch, length - 3, SEED + 1)}


def pixels(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    return {"pixel_values": _noise(batch, 3, 16, 16)}


def entry(
    kind: str, name: str, sites: Mapping[str, int], model_type: str, config: dict[str, Any], **options: Any
) -> Entry:
    """An entry whose `config` may also hold entry fields (`slow=True`), which win over `options`."""
    own = {k: config.pop(k) for k in list(config) if k in Entry.__dataclass_fields__}
    return Entry(name, kind, model_type or name, config, sites, **{**options, **own})


def slow(*entries: Entry) -> tuple[Entry, ...]:
    return tuple(replace(entry, slow=True) for entry in entries)


def causal_lm(name: str, sites: Mapping[str, int], model_type: str = "", base=GROUPED, **extra: Any) -> Entry:
    return entry(
        "decoder", name, sites, model_type, {**base, **extra}, inputs_of=tokens, auto="AutoModelForCausalLM"
    )


def encoder(name: str, sites: Mapping[str, int], model_type: str = "", base=TEXT, **extra: Any) -> Entry:
    return entry("encoder", name, sites, model_type, {**base, **extra}, inputs_of=tokens)


CAUSAL = {"causal": 2}
WINDOW = {"window(4)": 2}
FULL = {"full": 2}
CONTENT = {"other+bias": 2}  # the bias is computed from the tokens: no mask class can be read off it
ALTERNATE = ["sliding_attention", "full_attention"]
HALF = {"window(4)": 1, "causal": 1}
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
)
LATENT: dict[str, Any] = dict(
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    head_dim=4,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)

DECODERS = (
    causal_lm("llama", CAUSAL),
    causal_lm("mistral", WINDOW, sliding_window=4),
    causal_lm("qwen2", CAUSAL),
    causal_lm(
        "qwen2-window", HALF, "qwen2", use_sliding_window=True, sliding_window=4, layer_types=ALTERNATE
    ),
    causal_lm(
        "gemma2",
        HALF,
        sliding_window=4,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        layer_types=ALTERNATE,
        implementations=EAGER,
    ),
    causal_lm("gemma3_text", HALF, sliding_window=4, query_pre_attn_scalar=8, layer_types=ALTERNATE),
    causal_lm("phi3", WINDOW, sliding_window=4),
    causal_lm("gpt2", CAUSAL),
    causal_lm("openai-gpt", CAUSAL, implementations=EAGER),
    causal_lm(
        "gpt_neo", HALF, attention_types=[[["global", "local"], 1]], window_size=4, implementations=EAGER
    ),
    causal_lm("gptj", CAUSAL, rotary_dim=4, implementations=EAGER),
    causal_lm("gpt_neox", CAUSAL),
    causal_lm("opt", CAUSAL, ffn_dim=48, word_embed_proj_dim=32),
    causal_lm("bloom", {"causal+bias": 2}, implementations=EAGER),
    causal_lm("mpt", {"causal+bias": 2}, expansion_ratio=2, max_seq_len=64, implementations=EAGER),
    causal_lm("falcon-mqa", CAUSAL, "falcon", base=TEXT),
    causal_lm("falcon-gqa", CAUSAL, "falcon", base=TEXT, new_decoder_architecture=True, num_kv_heads=2),
    causal_lm("falcon-alibi", {"causal+bias": 2}, "falcon", base=TEXT, alibi=True, multi_query=False),
    causal_lm("codegen", CAUSAL, rotary_dim=4, implementations=EAGER),
    causal_lm("stablelm", CAUSAL),
    causal_lm("olmo2", CAUSAL),
    causal_lm("cohere2", HALF, sliding_window=4, layer_types=ALTERNATE),
    causal_lm("gpt_bigcode", CAUSAL),
    causal_lm("persimmon", CAUSAL),
    causal_lm("xglm", CAUSAL, ffn_dim=48, implementations=EAGER),
    causal_lm("biogpt", CAUSAL),
    causal_lm("ctrl", CAUSAL, dff=48, implementations=EAGER),
    causal_lm(
        "gpt_oss",
        HALF,
        sliding_window=4,
        layer_types=ALTERNATE,
        num_local_experts=4,
        num_experts_per_tok=2,
        implementations=EAGER,
    ),
    causal_lm("deepseek_v3", CAUSAL, **LATENT),
    causal_lm("diffllama", {"causal": 4}),
    causal_lm(
        "llama4_text",
        {"chunk(4)": 1, "causal": 1},
        masked_sites={"other": 1, "causal": 1},  # left padding moves the borders of the chunks
        padding_reaches=1,
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=4,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 0],
    ),
    causal_lm(
        "modernbert-decoder", {"causal": 1, "window(4)": 1}, local_attention=8, global_attn_every_n_layers=2
    ),
    # Further models with a spelling that stands above already.
    *slow(
        causal_lm("mixtral", CAUSAL, sliding_window=None, num_local_experts=4),
        causal_lm("qwen2_moe", CAUSAL, shared_expert_intermediate_size=24, **EXPERTS),
        causal_lm("qwen3", CAUSAL),
        causal_lm("qwen3_moe", CAUSAL, **EXPERTS),
        causal_lm(
            "qwen3_next",
            {"causal": 1},
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=24,
            **EXPERTS,
        ),
        causal_lm("gemma", CAUSAL),
        causal_lm("phi", CAUSAL),
        causal_lm("phimoe", CAUSAL, num_local_experts=4, sliding_window=None),
        causal_lm("gpt_neox_japanese", CAUSAL, intermediate_multiple_size=2, implementations=EAGER),
        causal_lm("olmo", CAUSAL),
        causal_lm("olmo3", HALF, sliding_window=4, layer_types=ALTERNATE),
        causal_lm("olmoe", CAUSAL, **EXPERTS),
        causal_lm("cohere", CAUSAL),
        causal_lm("starcoder2", WINDOW, sliding_window=4),
        causal_lm("granite", CAUSAL, attention_multiplier=0.3),
        causal_lm("granitemoe", CAUSAL, attention_multiplier=0.3, num_local_experts=4),
        causal_lm("deepseek_v2", CAUSAL, **LATENT),
        causal_lm("smollm3", CAUSAL, no_rope_layers=[1, 0]),
        causal_lm("ernie4_5", CAUSAL),
        causal_lm("glm", CAUSAL),
        causal_lm("glm4", CAUSAL),
        causal_lm("nemotron", CAUSAL),
        causal_lm("helium", CAUSAL),
        causal_lm("exaone4", HALF, sliding_window=4, layer_types=ALTERNATE),
        causal_lm("arcee", CAUSAL),
        causal_lm("apertus", CAUSAL),
        causal_lm("seed_oss", CAUSAL),
        causal_lm("hunyuan_v1_dense", CAUSAL),
        causal_lm("jetmoe", CAUSAL, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
        causal_lm(
            "minimax",
            {"causal": 1},
            layer_types=["linear_attention", "full_attention"],
            num_local_experts=4,
            block_size=4,
        ),
        causal_lm("bitnet", CAUSAL),
        causal_lm("lfm2", {"causal": 1}, layer_types=["conv", "full_attention"]),
        causal_lm("imagegpt", CAUSAL, implementations=EAGER, auto="AutoModel"),
        causal_lm(
            "dbrx",
            CAUSAL,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        ),
    ),
)

ENCODERS = (
    encoder("bert", FULL),
    encoder("roberta", FULL),
    encoder("distilbert", FULL),
    encoder("albert", FULL, embedding_size=16),
    encoder(
        "deberta-relative",
        CONTENT,
        "deberta",
        padding_reaches=0,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=16,
        implementations=EAGER,
    ),
    encoder(
        "deberta-v2",
        CONTENT,
        padding_reaches=0,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        implementations=EAGER,
    ),
    encoder("mpnet", {"full+bias": 2}, implementations=EAGER),
    encoder("esm", FULL, position_embedding_type="rotary", mask_token_id=3),
    encoder("modernbert", {"full": 1, "band(4)": 1}, local_attention=8, global_attn_every_n_layers=2),
    encoder("squeezebert", FULL, embedding_size=32, implementations=EAGER),
    encoder(
        "convbert",
        FULL,
        refused={"not-attention": 2},
        why="the span convolution's softmaxed kernel",
        embedding_size=32,
        head_ratio=2,
        conv_kernel_size=3,
        implementations=EAGER,
    ),
    encoder(
        "xlnet",
        CONTENT,
        padding_reaches=0,
        base=IDS,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=48,
        use_mems_eval=False,
        implementations=EAGER,
    ),
    encoder(
        "longformer",
        {},
        attention_window=[4, 4],
        implementations=EAGER,
        refused={"capture": 1},
        why="torch.export cannot trace its data-dependent global attention",
    ),
    encoder("big_bird", FULL, attention_type="original_full", implementations=EAGER),
    encoder(
        "big_bird-sparse",
        FULL,
        "big_bird",
        attention_type="block_sparse",
        slow=True,
        block_size=2,
        num_random_blocks=1,
        implementations=EAGER,
    ),
    encoder("nystromformer", FULL, num_landmarks=12, segment_means_seq_len=12, implementations=EAGER),
    encoder("mobilebert", FULL, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16),
    encoder("roformer", FULL, embedding_size=32, implementations=EAGER),
    encoder(
        "lilt",
        {"other+bias": 1},
        padding_reaches=0,
        refused={"weights-escape": 2},
        why="two attentions share their scores; one stands alone where the last layer drops its layout half",
        base={**TEXT, "hidden_size": 48},
        channel_shrink_ratio=2,
        implementations=EAGER,
    ),
    encoder("fnet", {}, implementations=EAGER, paddable=False),
    encoder("bert-decoder", CAUSAL, "bert", is_decoder=True),
    # Further models with a spelling that stands above already.
    *slow(
        encoder("electra", FULL, embedding_size=16),
        encoder("deberta", FULL, implementations=EAGER),
        encoder("camembert", FULL),
        encoder("xlm-roberta", FULL),
        encoder("xlm-roberta-xl", FULL),
        encoder("roberta-prelayernorm", FULL),
        encoder("data2vec-text", FULL),
        encoder("ernie", FULL),
        encoder("megatron-bert", FULL, implementations=EAGER),
        encoder(
            "funnel",
            {"full+bias": 4},
            base=IDS,
            auto="FunnelModel",
            d_model=32,
            n_head=4,
            d_inner=48,
            d_head=8,
            block_sizes=[1, 1],
            num_decoder_layers=2,
            implementations=EAGER,
            resizable=False,
        ),
        encoder("rembert", FULL, input_embedding_size=16, output_embedding_size=16, implementations=EAGER),
        encoder("layoutlm", FULL),
        encoder("splinter", FULL, implementations=EAGER),
        encoder("luke", FULL, entity_vocab_size=8, entity_emb_size=16, implementations=EAGER),
        encoder("markuplm", FULL, implementations=EAGER),
        encoder("xlm", FULL, emb_dim=32, n_layers=2, n_heads=4, implementations=EAGER),
        encoder("flaubert", FULL, emb_dim=32, n_layers=2, n_heads=4, implementations=EAGER),
        encoder("nomic_bert", FULL),
        encoder("eurobert", FULL, base=GROUPED),
        encoder("xmod", FULL, languages=["en"], default_language="en"),
        encoder("ibert", FULL, quant_mode=False, implementations=EAGER),
    ),
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


def seq2seq(
    name: str, sites: Mapping[str, int] = BART_SITES, model_type: str = "", base=SEQ2SEQ, **extra: Any
) -> Entry:
    return entry("encoder-decoder", name, sites, model_type, {**base, **extra}, inputs_of=token_pairs)


def mel(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Whisper: a spectrogram of fixed length, text that varies."""
    frames = 2 * entry.config["max_source_positions"]
    features = _noise(batch, entry.config["num_mel_bins"], frames)
    return {"input_features": features, "decoder_input_ids": _ids(batch, length)}


def frames(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Speech-to-text: 4 frames per position after two strided convolutions."""
    inputs = {"input_features": _noise(batch, 4 * length, entry.config["input_feat_per_channel"])}
    if padded:
        keep = torch.ones(batch, 4 * length, dtype=torch.long)
        keep[1:, -8:] = 0
        inputs["attention_mask"] = keep
    return {**inputs, "decoder_input_ids": _ids(batch, length - 3)}


ENCODER_DECODERS = (
    seq2seq("t5", T5_SITES, base=T5),
    seq2seq("bart"),
    seq2seq("pegasus"),
    seq2seq("fsmt", src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, langs=["en", "de"], implementations=EAGER),
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
            T5_SITES,
            base=T5,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            implementations=EAGER,
        ),
        seq2seq(
            "longt5",
            {"other+bias": 2, "causal+bias": 2, "full": 2},
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
            "nllb-moe", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, implementations=EAGER
        ),
        seq2seq("led", attention_window=4, implementations=EAGER),
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
            {"full": 4, "causal": 2},
            base={},
            encoder={**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ALTERNATE},
            decoder={**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ALTERNATE},
            implementations=EAGER,
        ),
        seq2seq(
            "moonshine",
            base=GROUPED,
            inputs_of=lambda e, b, n, p: {
                "input_values": _noise(b, 400 * n + 127),
                "decoder_input_ids": _ids(b, n),
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

PATCHES = 16  # of a 16 x 16 image with patches of 4


def pixels_and_order(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """The masked autoencoder draws a random patch order unless it is given one."""
    return {**pixels(entry, batch, length, padded), "noise": _noise(batch, PATCHES)}


def video(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    return {"pixel_values": _noise(batch, 2, 3, 16, 16)}


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
    return {"pixel_values": _noise(batch, 3, size, size)}


def vision(
    name: str, sites: Mapping[str, int] = FULL, model_type: str = "", base=IMAGE, **extra: Any
) -> Entry:
    return entry(
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
        vision(
            "mobilevit",
            {"full": 9},
            image_size=32,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
            inputs_of=big_pixels,
            implementations=EAGER,
        ),
        vision("videomae", num_frames=2, tubelet_size=1, inputs_of=video),
        vision("vivit", num_frames=2, tubelet_size=[1, 4, 4], inputs_of=video),
        vision("vitdet", pretrain_image_size=16, implementations=EAGER),
        vision("dpt"),
        vision("aimv2_vision_model"),
        vision("mlcd_vision_model"),
    ),
)


def waveform(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    samples = 8 * length + 10
    inputs = {"input_values": _noise(batch, samples)}
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
    inputs = {"input_features": _noise(batch, 2 * length, 8)}
    if padded:
        keep = torch.ones(batch, 2 * length, dtype=torch.long)
        keep[1:, -6:] = 0
        inputs["attention_mask"] = keep
    return inputs


def audio(name: str, sites: Mapping[str, int] = FULL, model_type: str = "", base=WAVE, **extra: Any) -> Entry:
    return entry("audio", name, sites, model_type, {**base, **extra}, inputs_of=waveform)


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
        inputs_of=lambda e, b, n, p: {"input_values": _noise(b, 24, 16)},
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
    return {**tokens(entry, batch, length, padded), "pixel_values": _noise(batch, 3, 16, 16)}


def text_and_regions(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    """Text beside five image regions with their boxes."""
    regions = {"visual_feats": _noise(batch, 5, 8), "visual_pos": _noise(batch, 5, 4)}
    return {**tokens(entry, batch, length, padded), **regions}


def multimodal(name: str, sites: Mapping[str, int], model_type: str = "", **extra: Any) -> Entry:
    return entry("multimodal", name, sites, model_type, extra, inputs_of=text_and_pixels)


MULTIMODAL = (
    multimodal("clip", {"causal": 2, "full": 2}, text_config=TEXT, vision_config=IMAGE, projection_dim=16),
    multimodal(
        "blip",
        {"full": 4},
        implementations=EAGER,
        text_config={**TEXT, "is_decoder": False},
        vision_config=IMAGE,
        projection_dim=16,
        image_text_hidden_size=16,
    ),
    multimodal(
        "vilt",
        FULL,
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
        multimodal("siglip", {"full": 5}, text_config=TEXT, vision_config=IMAGE),
        multimodal("chinese_clip", {"full": 4}, text_config=TEXT, vision_config=IMAGE, projection_dim=16),
        multimodal(
            "owlvit", {"causal": 2, "full": 2}, text_config=TEXT, vision_config=IMAGE, projection_dim=16
        ),
        multimodal(
            "flava",
            {"full": 6},
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

ENTRIES = DECODERS + ENCODERS + ENCODER_DECODERS + VISION + AUDIO + MULTIMODAL
BY_NAME = {entry.name: entry for entry in ENTRIES}
