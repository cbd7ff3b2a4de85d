"""Small live models for the tests of conversion, and what every one of them must still do."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from linearize.convert.linearize import linearize
from linearize.rewrite.graph import calls

VOCAB = 96


def llama(**changes: Any) -> nn.Module:
    """A decoder with two layers and grouped heads; weights large enough that mistakes show."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.BertModel(config).eval()


def bart(positions: int = 64) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=positions,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=1.0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def gptj() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=1,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPTJForCausalLM(config).eval()


class EagerAttention(nn.Module):
    """Attention as people write it: matmul, scale, masked_fill, softmax, matmul."""

    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        query, key, value = (
            p(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = query @ key.transpose(-1, -2) / (size // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.drop(self.o_proj((weights @ value).transpose(1, 2).reshape(batch, length, size)))


class PlainNet(nn.Module):
    """Two blocks of `EagerAttention`; nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([EagerAttention(), EagerAttention()])
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return F.gelu(x)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return PlainNet().eval()


def activations(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def wake(model: nn.Module) -> nn.Module:
    """Move the new parameters: at their initial values, half of the mechanism does nothing."""
    generator, scales = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("local_scale"):
                parameter.copy_(1 + torch.randn(parameter.shape, generator=scales) * 0.1)
            elif "linear_attention" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@cache
def _converted(name: str, given: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = globals()[name]()
    inputs = activations() if name == "plain" else None
    options = {"mechanism": "augmented_paper", **dict(given)}
    return wake(linearize(model, inputs, group_size=4, **options))


def converted(name: str, **options: Any) -> nn.Module:
    """A converted copy of one of the models above; the conversion itself is made once per test process."""
    return copy.deepcopy(_converted(name, tuple(sorted(options.items()))))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when a call fails: classes, parameters by identity, attributes, config values."""
    config = getattr(model, "config", None)
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        [id(getattr(module, "config", None)) for module in model.modules()],
        None if config is None else sorted((k, repr(v)) for k, v in vars(config).items()),
        [module.training for module in model.modules()],
    )


def recompute(model: nn.Module, ids: Tensor, steps: int, **inputs: Any) -> Tensor:
    """Greedy decoding by running the whole prefix again for every token: `[B, T]` -> `[B, T + steps]`."""
    mask = inputs.pop("attention_mask", None)
    for _ in range(steps):
        extra = dict(inputs)
        if mask is not None:
            extra |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(ids, use_cache=False, **extra).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def refuse_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of an owner can be traced on a state, as happens where one cannot be had."""
    real = calls.trace

    def only_with_keys(*args: Any) -> Any:
        if len(args[4]) == 1:
            raise RuntimeError("no state today")
        return real(*args)

    monkeypatch.setattr(calls, "trace", only_with_keys)
