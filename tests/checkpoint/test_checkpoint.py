"""Saving and loading: bit for bit, whole or not at all, without searching a graph."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import linearize as lz
import linearize.convert.linearize
from linearize.errors import CheckpointError, InvalidModelError
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.config import LinearizeConfig
from linearize.planning.plan import Plan, SitePlan
from linearize.rewrite.apply import apply_plan

CONFIG = LinearizeConfig(mechanism="augmented_paper", group_size=4, conv_taps=3)


def tiny_llama(tie: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def llama_plan(model: PreTrainedModel) -> Plan:
    """The plan of a llama, by hand: these tests are about files, not about finding sites."""
    spec = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, causal=True)
    sites = [
        SitePlan(path=name, slot=0, route="interface", spec=spec, layer_index=i, mask="causal+padding")
        for i, name in enumerate(n for n, _ in model.named_modules() if n.endswith("self_attn"))
    ]
    return Plan(tuple(sites))


def shake(model: nn.Module) -> nn.Module:
    """Give the new parameters values, so that losing one shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attention" in name:
                parameter.normal_()
    return model


def converted(tie: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = tiny_llama(tie)
    # As from_pretrained does it: parameters in `dtype`, the table of rotary frequencies in float32.
    rotary = copy.deepcopy(model.model.rotary_emb)
    model.to(dtype).model.rotary_emb = rotary
    return shake(apply_plan(model, llama_plan(model), CONFIG))


def tokens() -> Tensor:
    return torch.arange(2 * 11).reshape(2, 11) % 96


@torch.no_grad()
def same(a: nn.Module, b: nn.Module) -> None:
    """The same tensors by name, bit for bit, and the same logits."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
    assert torch.equal(a(tokens())[0], b(tokens())[0])


def no_search(*args: object, **kwargs: object) -> None:
    raise AssertionError("a checkpoint is loaded without searching the graph")


@pytest.mark.parametrize("tie", [False, True])
def test_a_transformers_model_comes_back_bit_for_bit_without_a_search(
    tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(tie)
    monkeypatch.setattr("linearize.convert.linearize.find_attention", no_search)
    lz.save(model, tmp_path / "m")
    same(model, lz.load(tmp_path / "m"))
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "m"))


def test_save_pretrained_alone_is_enough_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["linearize"]["version"] == 1 and written["architectures"] == ["LlamaForCausalLM"]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    same(model, lz.load(tmp_path))


def test_a_loaded_model_looks_like_no_quantized_one_and_saves_again(tmp_path: Path) -> None:
    lz.save(converted(), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not hasattr(model, "is_quantized") and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    model.save_pretrained(tmp_path / "b")
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "b"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_half_precision_is_stored_and_restored_as_such(tmp_path: Path) -> None:
    model = converted(dtype=torch.bfloat16)
    lz.save(model, tmp_path / "m")
    same(model, lz.load(tmp_path / "m"))
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    wide = lz.load(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_float32_checkpoint_can_be_read_as_bfloat16(tmp_path: Path) -> None:
    lz.save(converted(), tmp_path / "m")
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        assert model.dtype == dtype and dtypes(model) == (dtype, torch.float32)
        same(model, converted(dtype=dtype))
        same(model, lz.load(tmp_path / "m", dtype=dtype))


def dtypes(model: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    """Of the model's own parameters, and of the new ones."""
    found: tuple[set[torch.dtype], set[torch.dtype]] = (set(), set())
    for name, parameter in model.named_parameters():
        found["linear_attention" in name].add(parameter.dtype)
    (own,), (new,) = found
    return own, new


def test_new_parameters_that_were_stored_in_half_precision_are_widened(tmp_path: Path) -> None:
    """As earlier releases stored them, or a user who said `model.bfloat16()`."""
    model = converted().bfloat16()
    lz.save(model, tmp_path / "m")
    again = lz.load(tmp_path / "m")
    assert dtypes(again) == (torch.bfloat16, torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(parameter.dtype)), name


def test_the_body_of_a_checkpoint_with_a_head_is_restored_converted(tmp_path: Path) -> None:
    model = converted()
    lz.save(model, tmp_path / "m")
    body = AutoModel.from_pretrained(tmp_path / "m")
    assert type(body).__name__ == "LlamaModel"
    with torch.no_grad():
        assert torch.equal(body(tokens())[0], model.model(tokens())[0])


def test_the_body_of_a_checkpoint_without_a_head_fits_under_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = LlamaModel(tiny_llama().config).eval()
    shake(apply_plan(body, llama_plan(body), CONFIG))
    lz.save(body, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(model.model(tokens())[0], body(tokens())[0])


def test_a_new_process_restores_the_model_after_import_linearize(tmp_path: Path) -> None:
    model = converted()
    lz.save(model, tmp_path / "m")
    code = (
        "import linearize, torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'm')!r})\n"
        "ids = torch.arange(22).reshape(2, 11) % 96\n"
        f"torch.save(m(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens()).logits)


def test_a_converted_model_can_still_be_copied_and_pickled(tmp_path: Path) -> None:
    model = converted()
    same(model, copy.deepcopy(model))
    again = pickle.loads(pickle.dumps(model))
    same(model, again)
    again.save_pretrained(tmp_path)
    same(model, lz.load(tmp_path))


class Plain(nn.Module):
    """Attention in plain PyTorch with a tied output projection: what has no `save_pretrained`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 96, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(width))

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x = self.embed(ids) + self.shift
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (self.head(x + y.transpose(1, 2).flatten(2)),)


def plain_converted() -> nn.Module:
    torch.manual_seed(0)
    return shake(lz.linearize(Plain(), {"ids": tokens()}, CONFIG))


def test_a_plain_module_comes_back_bit_for_bit_into_a_fresh_one(tmp_path: Path) -> None:
    model = plain_converted()
    lz.save(model, tmp_path / "m")
    fresh = Plain()
    assert lz.load(tmp_path / "m", model=fresh) is fresh
    same(model, fresh)
    assert fresh.head.weight is fresh.embed.weight


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_module_of_half_precision_takes_new_parameters_of_any_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = shake(lz.linearize(Plain().to(dtype), {"ids": tokens()}, CONFIG))
    assert dtypes(model) == (dtype, torch.float32)
    lz.save(model, tmp_path / "m")
    again = lz.load(tmp_path / "m", Plain().to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))
    lz.save(model.to(dtype), tmp_path / "all")  # as earlier releases stored them
    again = lz.load(tmp_path / "all", Plain().to(dtype))
    assert dtypes(again) == (dtype, torch.float32)
    with pytest.raises(CheckpointError, match="does not fit"):
        lz.load(tmp_path / "m", Plain())


@pytest.mark.parametrize("other", [lambda: Plain(32), lambda: nn.Linear(2, 2), lambda: Plain().double()])
def test_another_architecture_is_refused_and_left_alone(other, tmp_path: Path) -> None:
    lz.save(plain_converted(), tmp_path / "m")
    module = other()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError):
        lz.load(tmp_path / "m", model=module)
    unchanged(module, before)


def damaged(directory: Path, how: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    data = weights.read_bytes()
    record = json.loads(config.read_text())
    if how == "weights missing":
        weights.unlink()
    elif how == "weights cut":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "weights empty":
        weights.write_bytes(b"")
    elif how == "header damaged":
        weights.write_bytes(data[:8] + b"x" + data[9:])
    elif how == "config missing":
        config.unlink()
    elif how == "config cut":
        config.write_text(config.read_text()[:100])
    elif how == "newer":
        record["linearize"]["version"] = 99
    elif how == "newer plan":
        record["linearize"]["plan"]["version"] = 99
    elif how == "plan damaged":
        del record["linearize"]["plan"]["sites"][0]["spec"]
    elif how == "plan of another model":
        record["linearize"]["plan"]["sites"][0]["path"] = "model.layers.7.self_attn"
    elif how == "other sizes":
        record["linearize"]["config"]["conv_taps"] = 5
    elif how == "not converted":
        del record["linearize"]
    else:
        raise AssertionError(how)
    if config.exists() and not how.startswith("config"):
        config.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "how",
    [
        "weights missing",
        "weights cut",
        "weights empty",
        "header damaged",
        "config missing",
        "config cut",
        "newer",
        "newer plan",
        "plan damaged",
        "plan of another model",
        "other sizes",
        "not converted",
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(how: str, tmp_path: Path) -> None:
    lz.save(converted(), tmp_path / "m")
    damaged(tmp_path / "m", how)
    with pytest.raises(CheckpointError) as caught:
        lz.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_a_lost_tensor_is_an_error_not_a_fresh_value(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lz.save(converted(), tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["model.layers.1.self_attn.linear_attention.alpha"]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.self_attn.linear_attention.alpha"):
        lz.load(tmp_path / "m")


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        lz.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        lz.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        lz.save(converted(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot save"):
        lz.save(converted(), tmp_path / "file" / "below")
    lz.save(plain_converted(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="model="):
        lz.load(tmp_path / "plain")


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="not converted"):
        lz.save(tiny_llama(), tmp_path / "m")
    with pytest.raises(InvalidModelError, match="nn.Module"):
        lz.save("model", tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(InvalidModelError, match="wraps"):
        lz.save(torch.compile(converted()), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lz.save(converted(), tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    import transformers.modeling_utils

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        lz.save(converted(dtype=torch.bfloat16), tmp_path / "m")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert os.listdir(tmp_path) == ["m"]


def test_saving_over_a_directory_keeps_foreign_files_and_drops_stale_weights(tmp_path: Path) -> None:
    target = tmp_path / "m"
    model = converted()
    model.save_pretrained(target, max_shard_size="20KB")
    assert (target / "model.safetensors.index.json").exists()
    same(model, lz.load(target))
    (target / "tokenizer.json").write_text("{}")
    lz.save(model, target)
    assert (target / "tokenizer.json").exists()
    assert [p.name for p in target.glob("*.safetensors*")] == ["model.safetensors"]
    same(model, lz.load(target))


def tiny_bert() -> BertModel:
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config)


def tiny_falcon() -> FalconForCausalLM:
    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return FalconForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "route"), [(tiny_bert, "interface"), pytest.param(tiny_falcon, "graph", marks=pytest.mark.slow)]
)
def test_what_linearize_found_by_itself_comes_back_too(make, route: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake(lz.linearize(make().eval(), {"input_ids": tokens()}, CONFIG))
    assert {site.route for site in model._linearize.plan.sites} == {route}
    lz.save(model, tmp_path / "m")
    same(model, lz.load(tmp_path / "m"))
