"""Converted checkpoints and what their own `generate` says.

They are made before any engine: vLLM changes transformers' classes in the process that it runs in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize import AttentionModule

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

NEW = 60
"""Tokens that each sequence is continued by."""


@dataclass
class Case:
    """A checkpoint, prompts, their greedy continuations, and the log-probabilities of every token there."""

    folder: Path
    prompts: list[list[int]]
    wanted: list[list[int]]
    scores: list[torch.Tensor]


def tiny(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=96, hidden_size=128, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=65536)
    config = LlamaConfig(**{**sizes, **heads, "eos_token_id": None, "bos_token_id": 0, **options})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # greedy choices that rounding does not turn
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
    return model


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """With parts that are zero until they are fitted."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AttentionModule):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def prompts_of(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=source).tolist() for n in lengths]


def continued(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    tokens = torch.tensor([prompt])
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count)
    options |= dict(return_dict_in_generate=True, output_logits=True, pad_token_id=1)
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits).log_softmax(-1)


def case_of(model: Any, folder: Path, lengths: list[int], count: int = NEW) -> Case:
    model.save_pretrained(folder)
    prompts = prompts_of(lengths, model.config.vocab_size)
    wanted, scores = zip(*(continued(model, prompt, count) for prompt in prompts), strict=True)
    return Case(folder, prompts, list(wanted), list(scores))
