"""The traps on the way through transformers' attention interface, one test each."""

from __future__ import annotations

import copy
from typing import Any

import accelerate.hooks
import pytest
import torch
import transformers
from live_models import VOCAB, bert, converted, llama, recompute, tokens

from linearize.convert.linearize import linearize
from linearize.errors import InputError, InvalidModelError, RefusedError
from linearize.mechanisms.module import AttentionModule
from linearize.rewrite.interface import NAME
from linearize.rewrite.masks import compact_mask, key_mask_of, visible


def padded(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -4:] = 0
    return mask


def test_padding_reaches_the_rewritten_attention() -> None:
    model: Any = converted("bert")
    ids, mask = tokens(2, 11), padded(2, 11)
    with_padding = model(ids, attention_mask=mask).last_hidden_state
    alone = model(ids[:1, :-4]).last_hidden_state
    torch.testing.assert_close(with_padding[:1, :-4], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_reaches_it_when_only_some_layers_are_rewritten(implementation: str) -> None:
    model: Any = linearize(
        llama(attn_implementation=implementation), layers=(0,), mechanism="augmented_paper", group_size=4
    )
    assert not model._linearize.plan.compact_masks
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = model(ids[:1, 4:], use_cache=False).logits
    torch.testing.assert_close(both[:1, 4:], alone, atol=1e-5, rtol=1e-4)


def test_no_square_mask_is_made_when_every_layer_is_rewritten() -> None:
    model: Any = converted("llama")
    seen: list[Any] = []
    owner = model.model.layers[0].self_attn
    owner.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
    ids = tokens(2, 11)
    model(ids, use_cache=False)
    model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model(ids, attention_mask=padded(2, 11), use_cache=False)
    assert seen[0] is None and seen[1] is None
    assert seen[2].shape == (2, 1, 1, 11) and seen[2].dtype == torch.bool


def test_packed_sequences_are_followed_where_some_layers_keep_their_square_masks() -> None:
    original: Any = llama()
    model: Any = linearize(
        copy.deepcopy(original), layers=(0,), mechanism="softmax_window", options={"window": 64}
    )
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [original(part, use_cache=False).logits for part in ids.split([4, 5], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_a_mask_made_by_hand_is_an_error_not_a_wrong_answer() -> None:
    model: Any = converted("llama")
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, :4, :4] = True  # a prefix that sees itself
    with pytest.raises(InputError, match="model.layers.0.self_attn.*not a causal mask"):
        model(tokens(1, 9), attention_mask=mask, use_cache=False)
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    out = model(tokens(1, 9), attention_mask=causal, use_cache=False).logits
    torch.testing.assert_close(out, model(tokens(1, 9), use_cache=False).logits)


def test_hooks_of_accelerate_attached_before_conversion_do_not_bypass_it() -> None:
    hooked: Any = llama()
    for layer in hooked.model.layers:
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.ModelHook())
    linearize(hooked, mechanism="augmented_paper", group_size=4)
    reference: Any = linearize(llama(), mechanism="augmented_paper", group_size=4)
    ids = tokens(2, 9)
    assert torch.equal(hooked(ids).logits, reference(ids).logits)
    settings: dict[str, Any] = dict(
        max_new_tokens=6, do_sample=False, eos_token_id=None, disable_compile=True
    )
    out = hooked.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **settings)
    assert torch.equal(out, recompute(reference, ids, 6))


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model: Any = llama()
    owner = model.model.layers[1].self_attn
    owner.forward = lambda *args, **kwargs: type(owner).forward(owner, *args, **kwargs)
    with pytest.raises(InvalidModelError, match="replaced on the instance"):
        linearize(model)
    assert not any(isinstance(m, AttentionModule) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_layers_shared_by_one_owner_are_rewritten_together() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        embedding_size=16,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model: Any = linearize(transformers.AlbertModel(config).eval())
    (site,) = model._linearize.plan.sites
    assert site.calls == 3
    assert torch.isfinite(model(tokens(2, 9)).last_hidden_state).all()


def test_an_owner_that_takes_its_eager_branch_on_an_unknown_name_is_rewritten_all_the_same() -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    original = transformers.FalconForCausalLM(config).eval()
    model: Any = linearize(copy.deepcopy(original), mechanism="augmented_paper", group_size=4)
    assert model._linearize.plan.sites[0].route == "graph"
    ids = tokens(2, 9)
    assert (model(ids).logits - original(ids).logits).abs().max() > 1e-3
    settings: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(out, recompute(model, ids, 5))


def test_changing_the_implementation_of_a_converted_model_does_not_bring_softmax_back() -> None:
    model: Any = converted("llama")
    ids, mask = tokens(2, 9), padded(2, 9)
    before = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    after = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(after[0, :-4], before[0, :-4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-4)


def test_a_model_that_was_not_converted_says_so_when_given_our_implementation() -> None:
    converted("llama")  # registers the name
    other: Any = bert()
    other.config._attn_implementation_internal = NAME
    with pytest.raises(InvalidModelError, match="was not rewritten"):
        other(tokens(2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_masks_of_every_dtype_are_read(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[0.0, torch.finfo(dtype).min, float("-inf"), -1.5, -1e4]], dtype=dtype)
    assert visible(hidden).tolist() == [[True, False, False, True, False]]


def test_the_key_mask_of_a_square_mask_is_its_real_keys() -> None:
    real = torch.tensor([[False, True, True, True], [True, True, True, False]])
    square = torch.ones(4, 4, dtype=torch.bool).tril()[None, None] & real[:, None, None, :]
    assert torch.equal(key_mask_of(square, 2, 4), real)  # type: ignore[arg-type]
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~square, torch.finfo(torch.float32).min)
    assert torch.equal(key_mask_of(additive, 2, 4), real)  # type: ignore[arg-type]
    assert key_mask_of(None, 2, 4) is None


def test_the_compact_mask_covers_the_empty_slots_of_a_static_cache() -> None:
    seen = torch.tensor([[False, True, True]])
    mask = compact_mask(1, 1, 5, q_offset=2, attention_mask=seen)
    assert mask is not None and mask.tolist() == [[[[False, True, True, False, False]]]]
    assert compact_mask(1, 3, 3, attention_mask=torch.ones(1, 3, dtype=torch.bool)) is None
    assert compact_mask(1, 3, 3) is None


def test_a_bias_inside_the_mask_is_not_taken_for_a_padding_mask() -> None:
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        use_relative_position_bias=True,
        initializer_range=0.2,
    )
    original = transformers.BeitModel(config).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "relative_position_bias" in name:
                parameter.normal_()
    pixels = torch.randn(2, 3, 16, 16)
    expected = original(pixels).last_hidden_state
    with pytest.raises(RefusedError, match="bias"):
        linearize(original)
    exact = linearize(copy.deepcopy(original), mechanism="softmax")
    torch.testing.assert_close(exact(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    assert (
        linearize(original, approximate=("bias",))(pixels).last_hidden_state - expected
    ).abs().max() > 1e-3
