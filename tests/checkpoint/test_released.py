"""The paper's LLaMA checkpoints, against the formula of its section on attention written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_models import snapshot
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.errors import CheckpointError, InvalidModelError
from linearize.planning.state import state_of

HEADS, KV_HEADS, SIZE, LAYERS, KERNEL, GROUP = 4, 2, 8, 2, 63, 16
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=HEADS * SIZE,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=128,
    initializer_range=0.2,
)
IDS = torch.randint(0, 96, (2, 75), generator=torch.Generator().manual_seed(0))
Tensors = dict[str, Tensor]


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype).eval()


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def new_tensors(local: bool = False) -> Tensors:
    """What `fine-tune.py` adds to each layer, trained: the kernel's masked half has drifted off zero."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(1, 1, KERNEL, 1)
    mask[:, :, KERNEL // 2 + 1 :] = 0
    tensors: Tensors = {}
    for i in range(LAYERS):
        kernel = torch.randn(HEADS, 1, KERNEL, 1, generator=generator, dtype=torch.float64)
        tensors[f"{attention(i)}.dwconv.weight"] = kernel * 0.3
        tensors[f"{attention(i)}.conv_mask"] = mask.clone()
        tensors[f"{attention(i)}.global_factor"] = torch.tensor([0.4 - 0.9 * i], dtype=torch.float64)
        if local:
            tensors[f"{attention(i)}.local_factor"] = torch.tensor([1.7 - i], dtype=torch.float64)
    return tensors


def released(local: bool = False) -> Tensors:
    """A whole checkpoint: the LLaMA, the new tensors, and the table that old transformers stored."""
    tensors = {**llama().state_dict(), **new_tensors(local)}
    for i in range(LAYERS):
        tensors[f"{attention(i)}.rotary_emb.inv_freq"] = torch.ones(SIZE // 2)
    return tensors


# --- the reference, in float64 and independent of the package ---------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """RoPE of [B, H, T, d]; angles in float32, as transformers has them."""
    base = CONFIG.rope_parameters["rope_theta"]
    frequency = 1.0 / base ** (torch.arange(0, SIZE, 2).float() / SIZE)
    angle = torch.arange(x.shape[2]).float()[:, None] * frequency
    cos, sin = (torch.cat([f(angle), f(angle)], -1).double() for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def paper_attention(w: Tensors, path: str, x: Tensor, group: int, alpha: float | None) -> Tensor:
    """o_t = local L_t + alpha G_t + C_t, token by token: section 4.2 of the paper, its code's convolution."""
    length = x.shape[1]
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    q, k, v = (
        (x @ w[f"{path}.{n}_proj.weight"].T).unflatten(-1, (heads[n], SIZE)).transpose(1, 2) for n in "qkv"
    )
    q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    local = w.get(f"{path}.local_factor", torch.ones(1)).double()
    alpha = float(w[f"{path}.global_factor"]) if alpha is None else alpha
    out = torch.zeros_like(v)
    for t in range(length):
        start = t // group * group
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, t], k[:, :, : t + 1])
        inside = torch.einsum("bhj,bhjd->bhd", scores[..., start:].relu() ** 2, v[:, :, start : t + 1])
        before = torch.einsum("bhj,bhjd->bhd", scores[..., :start], v[:, :, :start])
        out[:, :, t] = local * inside + alpha * before
    if f"{path}.dwconv.weight" in w:
        kernel = w[f"{path}.dwconv.weight"].double() * w[f"{path}.conv_mask"]
        out = out + F.conv2d(v, kernel, padding=(KERNEL // 2, 0), groups=HEADS)
    return out.transpose(1, 2).flatten(2) @ w[f"{path}.o_proj.weight"].T


def reference(w: Tensors, ids: Tensor = IDS, group: int = GROUP, alpha: float | None = None) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        path = f"model.layers.{i}"
        h = norm(x, w[f"{path}.input_layernorm.weight"])
        x = x + paper_attention(w, attention(i), h, group, alpha)
        h = norm(x, w[f"{path}.post_attention_layernorm.weight"])
        gate, up, down = (w[f"{path}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@torch.no_grad()
def agrees(model: Any, wanted: Tensor) -> None:
    logits = model(IDS).logits
    assert wanted.abs().max() > 1  # the numbers are not all near zero
    # transformers computes the norms of a float64 model in float32, the reference does not.
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    # Decoding keeps a constant state instead: the same function, in two pieces.
    first = model(IDS[:, :30], use_cache=True)
    rest = model(IDS[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, wanted[:, 30:], atol=1e-5, rtol=1e-5)


# --- files ------------------------------------------------------------------------------------------------


def write(tensors: Tensors, folder: Path, form: str, config: bool = True) -> Path:
    folder.mkdir()
    if config:
        CONFIG.save_pretrained(folder)
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "old bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        kind = "bin" if form == "sharded bin" else "safetensors"
        stem = "pytorch_model" if kind == "bin" else "model"
        names = sorted(tensors)
        where = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-0000{number}-of-00002.{kind}"
            shard = {name: tensors[name] for name in part}
            torch.save(shard, folder / file) if kind == "bin" else save_file(shard, folder / file)
            where |= dict.fromkeys(part, file)
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "sharded bin", "sharded safetensors"])
def test_a_released_folder_computes_what_the_paper_says(form: str, tmp_path: Path) -> None:
    tensors = released()
    model = lz.load_released(write(tensors, tmp_path / "r", form), group_size=GROUP)
    assert model.dtype == torch.float64 and not model.training
    agrees(model, reference(tensors))


def test_it_is_an_ordinary_converted_model(tmp_path: Path) -> None:
    model = lz.load_released(write(released(), tmp_path / "r", "bin"), group_size=GROUP)
    config = state_of(model).config
    assert (config.mechanism, config.group_size, config.conv_taps) == ("augmented_paper", GROUP, 32)
    again = lz.load(lz.save(model, tmp_path / "m"))
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name in again.state_dict() if "dwconv" in name or "factor" in name]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.isfinite(model.generate(IDS[:1, :5], max_new_tokens=70, do_sample=False)).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_stays_so_or_is_widened(stored: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in released().items()}
    folder = write(tensors, tmp_path / "r", "sharded bin")
    wanted = reference({name: tensor.double() for name, tensor in tensors.items()})
    model = lz.load_released(folder, group_size=GROUP)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "linear_attention" in name else stored), name
    assert torch.isfinite(model(IDS).logits).all()
    wide = lz.load_released(folder, group_size=GROUP, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(wide(IDS).logits.double(), wanted, atol=1e-4, rtol=1e-3)


def test_a_given_base_is_converted_in_place() -> None:
    base, tensors = llama(torch.float32), released()
    model = lz.load_released(new_tensors(), base, group_size=GROUP)
    assert model is base
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits.double(), reference(tensors), atol=1e-4, rtol=1e-3)
    assert model.model.layers[0].self_attn.linear_attention.alpha.dtype == torch.float32


def test_a_base_folder_and_the_new_tensors_alone(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    torch.save(new_tensors(), tmp_path / "new.bin")
    agrees(lz.load_released(tmp_path / "new.bin", tmp_path / "base", group_size=GROUP), reference(released()))


def test_weights_of_the_checkpoint_win_over_those_of_the_base() -> None:
    torch.manual_seed(9)
    tensors = released()
    tensors["model.norm.weight"] = torch.rand(HEADS * SIZE, dtype=torch.float64)
    given = {**new_tensors(), "model.norm.weight": tensors["model.norm.weight"]}
    agrees(lz.load_released(given, llama(), group_size=GROUP), reference(tensors))


def test_the_group_size_is_the_users(tmp_path: Path) -> None:
    tensors = released()
    folder = write(tensors, tmp_path / "r", "safetensors")
    agrees(lz.load_released(folder), reference(tensors, group=64))
    assert (reference(tensors, group=64) - reference(tensors, group=GROUP)).abs().max() > 0.01


def test_a_local_factor_weighs_the_local_part() -> None:
    tensors = released(local=True)
    agrees(lz.load_released(new_tensors(local=True), llama(), group_size=GROUP), reference(tensors))


@pytest.mark.parametrize(("alpha", "mechanism"), [(0.0, "local"), (1.0, "augmented_paper")])
@pytest.mark.parametrize("convolution", [True, False])
def test_without_a_factor_the_user_says_what_it_was(alpha: float, mechanism: str, convolution: bool) -> None:
    parts = ("global_factor",) if convolution else ("global_factor", "dwconv", "conv_mask")

    def without(tensors: Tensors) -> Tensors:
        return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}

    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.global_factor is missing.*alpha=0.0"):
        lz.load_released(without(new_tensors()), llama())
    model = lz.load_released(without(new_tensors()), llama(), group_size=GROUP, alpha=alpha)
    assert state_of(model).config.mechanism == mechanism
    agrees(model, reference(without(released()), alpha=alpha))


# --- LoRA -------------------------------------------------------------------------------------------------


def adapter(folder: Path) -> Tensors:
    """A PEFT adapter of the paper's recipe in `folder`; returns the weights that it stands for."""
    import peft

    base = llama()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * 0.1)
    adapted.save_pretrained(folder)
    weights = dict(llama().state_dict())
    for name, matrix in adapted.state_dict().items():
        if "lora_B" in name:
            first = adapted.state_dict()[name.replace("lora_B", "lora_A")]
            target = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
            weights[target] = weights[target] + (16 / 8) * matrix @ first
    return weights


def test_a_lora_adapter_with_the_new_tensors_beside_it(tmp_path: Path) -> None:
    tensors = {**adapter(tmp_path / "a"), **new_tensors()}
    wrapped = {f"base_model.model.{name}": value for name, value in new_tensors().items()}
    model = lz.load_released(tmp_path / "a", llama(), extra=wrapped, group_size=GROUP)
    agrees(model, reference(tensors))
    assert not [name for name in model.state_dict() if "lora" in name]
    torch.save(wrapped, tmp_path / "a" / "trainable_params.bin")
    agrees(lz.load_released(tmp_path / "a", llama(), group_size=GROUP), reference(tensors))


def test_the_state_of_a_training_run_with_everything_in_it(tmp_path: Path) -> None:
    """What Trainer and DeepSpeed write: base, LoRA, embeddings and new tensors, all under PEFT's prefix."""
    from safetensors.torch import load_file

    tensors = {**adapter(tmp_path / "a"), **new_tensors()}
    lora = load_file(tmp_path / "a/adapter_model.safetensors")
    state = {f"base_model.model.{name}": value for name, value in released().items()}
    for name in [name for name in state if name.endswith(("q_proj.weight", "v_proj.weight"))]:
        state[name.replace(".weight", ".base_layer.weight")] = state.pop(name)
    state |= {name.replace(".weight", ".default.weight"): value for name, value in lora.items()}
    folder = write(state, tmp_path / "r", "bin")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        lz.load_released(folder, group_size=GROUP)
    (folder / "adapter_config.json").write_text((tmp_path / "a/adapter_config.json").read_text())
    agrees(lz.load_released(folder, group_size=GROUP), reference(tensors))


def test_an_adapter_alone_is_not_enough(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    base = llama()
    before, values = snapshot(base), {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(CheckpointError, match="LoRA adapter never holds them"):
        lz.load_released(tmp_path / "a", base)
    with pytest.raises(CheckpointError, match="config.json"):
        lz.load_released(tmp_path / "a", extra=new_tensors())
    assert snapshot(base) == before
    assert all(torch.equal(value, values[name]) for name, value in base.state_dict().items())


# --- faults -----------------------------------------------------------------------------------------------

FIRST, LAST = attention(0), attention(LAYERS - 1)
MASK = new_tensors()[f"{FIRST}.conv_mask"]
AHEAD = torch.zeros(HEADS, 1, KERNEL, 1)
AHEAD[2, 0, 40] = 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAST}.global_factor": None}, f"{LAST}.global_factor is missing"),
        ({f"{LAST}.dwconv.weight": None}, f"{LAST}.dwconv.weight is missing"),
        ({f"{FIRST}.conv_mask": None}, f"{FIRST}.conv_mask is missing"),
        ({f"{FIRST}.dwconv.weight": torch.ones(HEADS, KERNEL)}, f"{FIRST}.dwconv.weight must be"),
        ({f"{FIRST}.dwconv.weight": torch.ones(HEADS, 1, 62, 1)}, "odd number of taps"),
        (
            {f"{LAST}.dwconv.weight": torch.zeros(HEADS, 1, 5, 1), f"{LAST}.conv_mask": MASK[:, :, 29:34]},
            "5 taps",
        ),
        ({f"{FIRST}.dwconv.weight": torch.zeros(8, 1, KERNEL, 1)}, "is for 8 heads, the model has 4"),
        ({f"{FIRST}.dwconv.weight": torch.full((HEADS, 1, KERNEL, 1), torch.nan)}, "not finite|looks ahead"),
        (
            {f"{LAST}.dwconv.weight": AHEAD, f"{LAST}.conv_mask": torch.ones_like(MASK)},
            f"{LAST}.dwconv.weight looks",
        ),
        ({f"{LAST}.conv_mask": MASK * 0.5}, f"{LAST}.conv_mask must be zeros and ones"),
        ({f"{LAST}.conv_mask": MASK[:, :, :5]}, f"{LAST}.conv_mask must be zeros and ones"),
        ({f"{LAST}.global_factor": torch.ones(HEADS)}, f"{LAST}.global_factor must be one finite number"),
        ({f"{LAST}.global_factor": torch.tensor([torch.inf])}, "one finite number"),
        ({f"{FIRST}.local_factor": torch.ones(1)}, f"{LAST}.local_factor is missing"),
        (
            {"model.layers.7.self_attn.global_factor": torch.ones(1)},
            "layers.7.self_attn.global_factor: the model",
        ),
        ({f"{FIRST}.dwconv.bias": torch.ones(HEADS)}, f"{FIRST}.dwconv.bias is not a weight"),
        ({f"{FIRST}.alpha": torch.ones(1)}, f"{FIRST}.alpha is not a weight of LlamaForCausalLM, nor one of"),
        ({f"{FIRST}.q_proj.weight": torch.ones(3, 3)}, f"{FIRST}.q_proj.weight is .3, 3."),
        ({"model.embed_tokens.weight": torch.ones(97, 32)}, "resize_token_embeddings"),
        ({f"{FIRST}.q_proj.lora_A.weight": torch.ones(8, 32)}, "adapter_config.json"),
    ],
)
def test_a_fault_names_the_key_and_leaves_the_base_as_it_was(
    changes: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: value for name, value in {**new_tensors(), **changes}.items() if value is not None}
    tensors["model.norm.weight"] = torch.zeros(HEADS * SIZE)  # would be put in place first
    base = llama()
    before, values = snapshot(base), {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        lz.load_released(tensors, base)
    assert snapshot(base) == before
    assert all(torch.equal(value, values[name]) for name, value in base.state_dict().items())


def test_a_kernel_that_looks_ahead_without_a_mask_is_refused() -> None:
    tensors = {name: value for name, value in new_tensors().items() if "conv_mask" not in name}
    with pytest.raises(CheckpointError, match="looks ahead: its taps 32 to 62 must be zero .the conv_mask"):
        lz.load_released(tensors, llama())
    for name, value in tensors.items():
        if "dwconv" in name:
            value[:, :, KERNEL // 2 + 1 :] = 0
    agrees(lz.load_released(tensors, llama(), group_size=GROUP), reference(released()))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        lz.load_released(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        lz.load_released(tmp_path / "empty")
    folder = write(released(), tmp_path / "s", "sharded bin")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin is missing"):
        lz.load_released(folder)
    folder = write(released(), tmp_path / "cut", "bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        lz.load_released(folder)
    torch.save({"state_dict": released()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'state_dict' is a dict"):
        lz.load_released(folder)
    lost = released()
    del lost["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        lz.load_released(write(lost, tmp_path / "lost", "safetensors"))
    with pytest.raises(CheckpointError, match="twice, with different values"):
        lz.load_released(
            write(released(), tmp_path / "two", "bin"), extra={"lm_head.weight": torch.zeros(96, 32)}
        )


def test_a_pickle_of_anything_but_tensors_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"x": Trap()}, tmp_path / "new.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lz.load_released(tmp_path / "new.bin", llama())
    assert not (tmp_path / "sprung").exists()


def test_a_base_that_is_no_unconverted_llama_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InvalidModelError, match="already linearized"):
        lz.load_released(new_tensors(), lz.load_released(new_tensors(), llama()))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(InvalidModelError, match="no module named self_attn"):
        lz.load_released(new_tensors(), gpt2)
