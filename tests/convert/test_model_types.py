"""Model types of transformers from end to end, built without a row by hand; the whole is a benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_type_case import TOLERANCE, examine
from torch import Tensor
from zoo.model_types import build, types

import linearize as lz
from linearize.errors import RefusedError, VerificationError

OUTCOMES = {
    "bert": "converted",
    "detr": "not built",  # its backbone is in timm
    "fnet": "no attention",
    "llama": "converted",
    "opt": "converted",
    "t5": "kept",
    "vit": "converted",
}
"""What becomes of a type with the mechanism that is the default."""


@pytest.mark.parametrize("model_type", list(OUTCOMES))
def test_a_model_of_the_type_is_converted_or_refused_as_it_should_be(model_type: str) -> None:
    result = examine(model_type)
    assert result["outcome"] == OUTCOMES[model_type], result
    if result["outcome"] in ("converted", "kept", "refused"):
        # Exact softmax equals the original in outputs and in what it generates, or `examine` says "wrong".
        assert result["error"] <= TOLERANCE and not result["exact"]["kept"]
    if result["outcome"] == "kept":
        assert "bias" in result["why"] and result["left"] == {"bias-unsupported": 4}


def test_every_type_that_an_auto_class_knows_is_in_the_survey() -> None:
    known = types()
    assert len(known) > 550 and {"llama", "t5", "vit", "whisper", "swinv2", "lilt"} <= set(known)


@pytest.mark.parametrize("model_type", ["llama4_text", "inkling_text"])
def test_exact_softmax_is_causal_where_transformers_leaves_that_to_sdpa(model_type: str) -> None:
    # The padded example shows a mask that is not understood, and without padding there is no mask at all.
    model = build(model_type)
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = lz.linearize(model, mechanism="softmax")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


class _WritesIntoItsInputs(transformers.LlamaForCausalLM):
    """As BLIP: its `generate` begins with a token of its own, which it writes into what it is given."""

    def generate(self, input_ids: Tensor, **settings: Any) -> Any:
        input_ids[:, 0] = 1
        return super().generate(input_ids, **settings)


def test_a_model_whose_generate_writes_into_its_inputs_is_converted() -> None:
    model = build("llama")
    model.__class__ = _WritesIntoItsInputs
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    before = ids.clone()
    lz.linearize(model, {"input_ids": ids}, mechanism="softmax")
    assert torch.equal(ids, before)


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class _Taken(_Attention):
    """With a name of ours for something else, as PVT v2 has it."""

    linear_attention = False


class _Unwilling(_Attention):
    """Cannot be traced once it is an owner."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "linear_attention") or hasattr(self, "_linearize_owner"):
            raise ValueError("no graph of this")
        return super().forward(x)


def _twice(last: torch.nn.Module) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    return torch.nn.Sequential(_Attention(), last, _Attention()), torch.randn(2, 11, 16)


def test_an_attribute_of_the_name_of_the_new_child_is_refused_in_words() -> None:
    model, x = _twice(_Taken())
    with pytest.raises(RefusedError, match="linear_attention' of its own.*on_refusal='keep'"):
        lz.linearize(model, (x,))


def test_what_goes_by_neither_route_is_left_softmax_where_that_is_asked() -> None:
    model, x = _twice(_Unwilling())
    with torch.no_grad():
        wanted = model(x)
    with pytest.raises(VerificationError, match="^1: .*on_refusal='keep'"):
        lz.linearize(model, (x,), mechanism="softmax")
    lz.linearize(model, (x,), mechanism="softmax", on_refusal="keep")
    assert [hasattr(part, "linear_attention") for part in model.children()] == [True, False, True]
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
