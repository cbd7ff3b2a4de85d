"""Writes the checkpoints beside this file. They were written at commit e60cc89, by version 0.1.0:

    git worktree add /tmp/e60cc89 e60cc89
    cd /tmp/e60cc89 && PYTHONPATH=$PWD python .../tests/checkpoint/written_by_0_1/make.py

`test_older_checkpoints.py` loads them with the code of today, so do not write them again with it: a change
that cannot read them breaks the checkpoints of users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
OUTPUTS = "outputs.pt"
VOCABULARY = 24
"""Small settings everywhere: a checkpoint is a few kilobytes."""


class Block(nn.Module):
    """Causal attention of an ordinary module, which no transformers class stands behind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 16]` -> `[B, T, 16]`."""
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Tower(nn.Module):
    """Two blocks: `linearize` rewrites them by the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 16]` -> `[B, T, 16]`."""
        return self.blocks(x)


def ids(length: int = 13) -> Tensor:
    """Token ids `[2, length]`."""
    return (torch.arange(2 * length).reshape(2, length) * 7) % VOCABULARY


def features() -> Tensor:
    """Features `[2, 13, 16]`."""
    return torch.linspace(-1, 1, 2 * 13 * 16).reshape(2, 13, 16).sin()


def llama() -> nn.Module:
    """Rewritten through transformers' attention interface; two query heads share a key/value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )


def gptj() -> nn.Module:
    """A transformers model whose attention layers do not use the interface."""
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            rotary_dim=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def shaken(model: nn.Module) -> nn.Module:
    """The model with values in every parameter, the new ones too, so that losing one shows."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            size = parameter.numel()
            parameter.copy_(torch.linspace(0.3, 7.0 + index, size).reshape(parameter.shape).cos() * 0.2)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes of the fixed inputs: a forward pass and, for decoders, greedy tokens."""
    if isinstance(model, Tower):
        return {"hidden": model(features())}
    decoder: Any = model
    mask = torch.ones_like(ids())
    mask[1, :4] = 0
    return {
        "logits": decoder(input_ids=ids(), use_cache=False).logits,
        "padded": decoder(input_ids=ids(), attention_mask=mask, use_cache=False).logits[:, 4:],
        "tokens": decoder.generate(
            ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, do_sample=False, pad_token_id=0
        ),
    }


def main() -> None:
    import linearize as lz

    torch.manual_seed(0)
    small = dict(group_size=4, conv_taps=3)
    made = {
        "llama": lz.linearize(llama().eval(), **small),
        "llama_softmax_window": lz.linearize(llama().eval(), mechanism="softmax_window", layers=[1]),
        "gptj": lz.linearize(gptj().eval(), **small),
        "module": lz.linearize(Tower().eval(), (features(),), **small),
    }
    for name, model in made.items():
        lz.save(shaken(model), HERE / name)
        torch.save(outputs(model), HERE / name / OUTPUTS)
    lz.MedusaHeads(made["llama"], 2).save(HERE / "heads")


if __name__ == "__main__":
    main()
