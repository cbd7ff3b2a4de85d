"""Under autocast the mechanisms take query, key and value as SDPA does, and run in compiled code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linearize.kernels import cpu, dispatch
from torch import Tensor

import linearize as lz
from linearize import ops
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

NAMES = ("augmented", "augmented_paper", "softmax_window", "hedgehog")
needs_kernels = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, from nothing on: each kind of call is logged once in a process."""
    dispatch.say.cache_clear()
    caplog.set_level(logging.DEBUG, logger="linearize")
    return caplog


def build(name: str, causal: bool = True) -> Any:
    torch.manual_seed(0)
    return build_attention(SiteSpec(4, 2, 16, 16, causal=causal), LinearizeConfig(mechanism=name)).eval()


def mixed(length: int = 70) -> list[Tensor]:
    """What a model with float32 weights and rotary positions has under autocast: a rounded value alone."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
    return [query, key, value.bfloat16()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_are_cast_as_sdpa_casts_them(name: str, causal: bool) -> None:
    module, leaves = build(name, causal), [x.requires_grad_() for x in mixed()]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
        out = module(*leaves)
    assert out.dtype == theirs.dtype == torch.bfloat16
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    wanted = module(*rounded)
    assert torch.equal(out, wanted)
    found = torch.autograd.grad(out.float().sin().sum(), leaves)
    grads = torch.autograd.grad(wanted.float().sin().sum(), rounded)
    for ours, expected, leaf in zip(found, grads, leaves, strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.float(), expected.float(), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_after_a_state_are_the_whole(name: str) -> None:
    module, (query, key, value) = build(name), mixed()
    state = module.new_state(2, dtype=key.dtype, device=key.device)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = module(query, key, value)
        pieces = [
            module.extend(*(x[:, :, cut] for x in (query, key, value)), state)
            for cut in (slice(0, 50), slice(50, 51), slice(51, 52))
        ]
    out = torch.cat(pieces, 2)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, whole[:, :, :52], atol=1e-2, rtol=1e-2)


@needs_kernels
@pytest.mark.parametrize("name", ("augmented", "augmented_paper"))
def test_a_trainer_with_bf16_runs_in_compiled_code(
    name: str, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = lz.linearize(LlamaForCausalLM(config), mechanism=name)
    said.clear()
    dispatch.say.cache_clear()
    ids = torch.randint(0, 64, (4, 40))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    done = Trainer(model, arguments, train_dataset=data).train()
    assert done.training_loss < 10
    forms = {record.getMessage() for record in said.records if "attention runs" in record.getMessage()}
    assert forms and all("cpu form" in form for form in forms), forms


@needs_kernels
@pytest.mark.parametrize("name", ("augmented", "augmented_paper"))
def test_a_mixture_that_nothing_casts_runs_and_is_warned_of_once(
    name: str, said: pytest.LogCaptureFixture
) -> None:
    module = build(name)
    with torch.no_grad():
        out = [module(*mixed()) for _ in range(3)]
    assert out[0].dtype == torch.bfloat16
    warned = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    assert warned and len(warned) == len(set(warned))
    assert all("torch.float32, torch.float32 and torch.bfloat16" in message for message in warned)


def test_the_checked_operators_cast_too() -> None:
    query, key, value = mixed(20)
    tables: dict[str, Any] = dict(alpha=torch.ones(4), conv_weight=torch.ones(4, 3))
    rounded = [x.bfloat16() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        whole = ops.augmented_attention(query, key, value, **tables)
        state = ops.AttentionState.new(2, 2, 16, taps=3)
        out = ops.augmented_extend(query, key, value, state, **tables)
        assert ops.which(query, key, value).form == ops.which(*rounded).form
    assert torch.equal(whole, ops.augmented_attention(*rounded, **tables)) and torch.equal(whole, out)
