"""GGUF files: read as ordinary models, converted, saved and loaded, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.errors import CheckpointError, InvalidModelError, MissingExtraError

gguf = pytest.importorskip("gguf")

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 4, 2, 32, 48
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "th", "he", "the"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp has them: what rotates together lies together."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original()` as llama.cpp's tools would write it, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["t h", "h e", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = original().state_dict()

    def add(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(name, weight.contiguous().numpy())

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for layer in range(LAYERS):
        for theirs, ours in NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if ours == "attn_q" else KV_HEADS)
            add(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_the_model_that_was_written_and_converts_saves_and_loads(file: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 23)[None]
    model, tokenizer = lz.load_gguf(file.parent)
    assert tokenizer("the").input_ids[-1] == WORDS.index("the")
    expected = original()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    lz.linearize(model, mechanism="augmented")
    torch.testing.assert_close(model(ids).logits, expected)  # all of it fits into the window
    lz.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for loaded in (lz.load(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")):
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_what_transformers_reads_itself_is_refused_until_three_lines_have_mended_it(file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with pytest.raises(InvalidModelError, match="load_gguf") as refused:
        lz.linearize(model)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join(lines), {"model": model})
    lz.linearize(model)


def test_inspect_and_convert_take_a_file(run, file: Path, tmp_path: Path) -> None:
    shown = run("inspect", file)
    assert shown.code == 0 and "self_attn" in shown.out
    done = run("convert", file, tmp_path / "out")
    assert done.code == 0, done.err
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert lz.load(tmp_path / "out").config.hidden_size == WIDTH


def test_what_is_no_gguf_file_says_so(
    run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        lz.load_gguf(tmp_path / "missing.gguf")
    with pytest.raises(CheckpointError, match="holds none"):
        lz.load_gguf(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + file.read_bytes()[4:200])
    with pytest.raises(CheckpointError, match="cannot read"):
        lz.load_gguf(tmp_path / "broken.gguf")
    assert "no such file" in run("inspect", tmp_path / "missing.gguf").err
    monkeypatch.setattr("linearize.checkpoint.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"linearize\[gguf\]"):
        lz.load_gguf(file)
