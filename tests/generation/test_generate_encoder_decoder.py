"""Encoder-decoders generate with a decoder state of one size and read the encoder's output once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, converted, tokens, wake
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache

from linearize.convert.linearize import linearize
from linearize.errors import InputError

STEPS = 10  # more than two groups of 4
GREEDY: dict[str, Any] = dict(
    max_new_tokens=STEPS, do_sample=False, eos_token_id=None, disable_compile=True, num_beams=1
)
MECHANISMS = ["augmented_paper", "local", "grouped", "relu", "performer", "hedgehog", "yoso", "flash_global"]
CASES = [*(("bart", mechanism) for mechanism in MECHANISMS), ("t5", "augmented_paper"), ("t5", "hedgehog")]


def build(name: str, mechanism: str = "augmented_paper") -> Any:
    options: dict[str, Any] = {"approximate": ("bias",)} if name == "t5" else {}
    return converted(name, mechanism=mechanism, **options)


def encoder_input(length: int = 13) -> dict[str, Tensor]:
    """A batch of two: one row padded on the right, one on the left and in its middle."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -4:] = 0
    mask[1, :3] = mask[1, 6] = 0
    return {"input_ids": tokens(2, length), "attention_mask": mask}


@torch.no_grad()
def recompute(
    model: Any, source: dict[str, Tensor], steps: int = STEPS, begin: Tensor | None = None
) -> Tensor:
    """Greedy decoding without any cache."""
    ids = torch.full((2, 1), model.config.decoder_start_token_id) if begin is None else begin
    for _ in range(steps):
        logits = model(**source, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@torch.no_grad()
def filled(model: Any, source: dict[str, Tensor], ids: Tensor) -> Any:
    return model(**source, decoder_input_ids=ids, use_cache=True)


def following(model: Any, source: dict[str, Tensor], ids: Tensor, out: Any, cache: Any) -> Tensor:
    """Logits of more decoder tokens, by the cache and the encoder's output."""
    encoded = transformers.modeling_outputs.BaseModelOutput(out.encoder_last_hidden_state)
    mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
    return model(
        encoder_outputs=encoded, **mask, decoder_input_ids=ids, past_key_values=cache, use_cache=True
    ).logits


@pytest.mark.parametrize(("name", "mechanism"), CASES)
def test_generation_equals_recomputing_every_prefix(name: str, mechanism: str) -> None:
    model, source = build(name, mechanism), encoder_input()
    wanted = recompute(model, source)
    out = model.generate(**source, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, wanted)
    with torch.no_grad():
        whole = model(**source, decoder_input_ids=wanted[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=2e-5, rtol=1e-4)
    assert torch.equal(model.generate(**source, **GREEDY, cache_implementation="static"), wanted)


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("mechanism", ["augmented_paper", "hedgehog"])
def test_beams_with_a_cache_equal_beams_without(name: str, mechanism: str) -> None:
    model, source = build(name, mechanism), encoder_input()
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7}
    with_cache = model.generate(**source, **settings)
    assert torch.equal(with_cache, model.generate(**source, **settings, use_cache=False))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_of_the_encoder_never_changes_a_row(name: str) -> None:
    model, source = build(name), encoder_input()
    source["attention_mask"][1, 6] = 1  # models count positions across a gap
    if name == "bart":
        source["attention_mask"][1, :3] = 1  # and from the left
    out = model.generate(**source, **GREEDY)
    for row, keep in enumerate(source["attention_mask"].bool()):
        alone = model.generate(source["input_ids"][row : row + 1, keep], **GREEDY)
        assert torch.equal(out[row : row + 1], alone)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_decoder_keeps_a_state_of_one_size(name: str) -> None:
    model, sizes = build(name), []
    for steps in (4, 50):
        settings = {**GREEDY, "max_new_tokens": steps, "return_dict_in_generate": True}
        cache = model.generate(**encoder_input(), **settings).past_key_values
        assert cache.get_seq_length() == steps
        layers = cache.self_attention_cache.layers
        assert {type(layer).__name__ for layer in layers} == {"StateLayer"}
        sizes.append(len(pickle.dumps([layer.states.tensors() for layer in layers])))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("name", "mechanism"), [("bart", "augmented_paper"), ("bart", "relu"), ("t5", "hedgehog")]
)
def test_a_step_costs_the_same_after_any_length_of_encoder_input(name: str, mechanism: str) -> None:
    model, products = build(name, mechanism), []
    for length in (16, 60):
        source = encoder_input(length)
        with torch.no_grad():
            out = filled(model, source, tokens(2, 3))
            with FlopCounterMode(display=False) as counter:
                following(model, source, tokens(2, 1), out, out.past_key_values)
        products.append(counter.get_total_flops())
    assert products[0] == products[1] > 0


@pytest.mark.parametrize("mechanism", ["augmented_paper", "relu", "hedgehog", "linformer"])
def test_decoding_goes_on_from_a_cache_in_steps_of_any_size(mechanism: str) -> None:
    # linformer has no causal form.
    options = {"on_refusal": "keep"} if mechanism == "linformer" else {}
    model: Any = converted("bart", mechanism=mechanism, **options)
    ids = tokens(2, 14)
    for source in (encoder_input(), {"input_ids": tokens(2, 6)}):  # the second is shorter than what follows
        with torch.no_grad():
            whole = model(**source, decoder_input_ids=ids, use_cache=False).logits
            out = filled(model, source, ids[:, :3])
            pieces = [out.logits]
            for piece in ids[:, 3:].split([3, 1, 6, 1], 1):
                pieces.append(following(model, source, piece, out, out.past_key_values))
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)


def test_generate_goes_on_from_a_returned_cache() -> None:
    model, source = build("bart"), encoder_input()
    first = model.generate(**source, **GREEDY, return_dict_in_generate=True)
    more = model.generate(
        **source,
        **GREEDY,
        decoder_input_ids=first.sequences,
        decoder_attention_mask=torch.ones_like(first.sequences),  # what transformers counts new tokens by
        past_key_values=first.past_key_values,
    )
    assert torch.equal(more, recompute(model, source, 2 * STEPS))


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_a_cache_can_be_repeated_selected_reordered_and_copied(masked: bool) -> None:
    model, source, ids = build("bart", "hedgehog"), encoder_input(), tokens(2, 9)
    if not masked:
        del source["attention_mask"]
    out = filled(model, source, ids[:, :6])

    def check(cache: Any, rows: list[int]) -> None:
        chosen = {name: x[rows] for name, x in source.items()}
        with torch.no_grad():
            whole = model(**chosen, decoder_input_ids=ids[rows], use_cache=False).logits[:, 6:]
            encoded = copy.copy(out)
            encoded.encoder_last_hidden_state = out.encoder_last_hidden_state[rows]
            found = following(model, chosen, ids[rows, 6:], encoded, cache)
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)

    caches = [copy.deepcopy(out.past_key_values) for _ in range(3)]
    caches[0].batch_repeat_interleave(2)
    caches[1].batch_select_indices(torch.tensor([1]))
    caches[2].reorder_cache(torch.tensor([1, 0]))
    check(caches[0], [0, 0, 1, 1])
    check(caches[1], [1])
    check(caches[2], [1, 0])
    check(pickle.loads(pickle.dumps(out.past_key_values)), [0, 1])
    check(out.past_key_values, [0, 1])


def test_a_cache_that_was_reset_takes_another_encoder_input() -> None:
    model, ids = build("t5"), tokens(2, 5)
    first, second = encoder_input(), encoder_input()
    second["input_ids"] = second["input_ids"].flip(1)
    cache = filled(model, first, ids).past_key_values
    cache.reset()
    with torch.no_grad():
        model(**second, decoder_input_ids=ids[:, :2], past_key_values=cache)
        found = model(**second, decoder_input_ids=ids[:, 2:], past_key_values=cache).logits
        whole = model(**second, decoder_input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, whole[:, 2:], atol=2e-5, rtol=1e-4)


def test_another_mask_of_the_same_encoder_output_is_followed() -> None:
    model, source, ids = build("bart"), encoder_input(), tokens(2, 8)
    out = filled(model, source, ids[:, :5])
    other = {"attention_mask": torch.ones_like(source["attention_mask"])}
    plain = EncoderDecoderCache(DynamicCache(), DynamicCache())
    encoded = transformers.modeling_outputs.BaseModelOutput(out.encoder_last_hidden_state)
    with torch.no_grad():
        found = following(model, other, ids[:, 5:], out, out.past_key_values)
        # The first tokens' decoder states depend on the first mask.
        model(
            encoder_outputs=encoded,
            attention_mask=source["attention_mask"],
            decoder_input_ids=ids[:, :5],
            past_key_values=plain,
        )
        for index in range(len(plain.cross_attention_cache.layers)):
            plain.is_updated[index] = False  # computed again, so nothing is known of the first mask
        plain.cross_attention_cache.reset()
        wanted = following(model, other, ids[:, 5:], out, plain)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_a_call_that_needs_gradients_has_them_for_the_encoder() -> None:
    model, source, ids = build("bart"), encoder_input(), tokens(2, 6)
    out = model(**source, decoder_input_ids=ids, use_cache=True)
    out.logits.sum().backward()
    assert model.model.decoder.layers[0].encoder_attn.k_proj.weight.grad.any()
    assert model.model.encoder.layers[0].fc1.weight.grad.any()


def test_compiled_steps_are_one_graph_for_all_tokens_and_equal_eager_ones() -> None:
    model, source = build("bart"), encoder_input()
    settings = {**GREEDY, "max_new_tokens": 12, "cache_implementation": "static"}
    eager = model.generate(**source, **settings)
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    counters.clear()
    out = model.generate(**source, **{**settings, "disable_compile": False}, compile_config=how)
    assert torch.equal(out, eager)
    assert counters["stats"]["unique_graphs"] == 1


def test_whisper_generates_by_its_own_generate() -> None:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=64,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    sound = {"input_features": torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(1))}
    model: Any = transformers.WhisperForConditionalGeneration(config).eval()
    wake(
        linearize(
            model, {**sound, "decoder_input_ids": tokens(2, 5)}, mechanism="augmented_paper", group_size=4
        )
    )
    out = model.generate(**sound, **GREEDY)
    assert torch.equal(out, recompute(model, sound)[:, 1:])
    # It takes a returned cache apart by rows; what is left of it has no state, and is refused.
    again = model.generate(**sound, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(again.sequences[:, 1:], out)
    with torch.no_grad(), pytest.raises(InputError, match="start from an empty cache"):
        model(**sound, decoder_input_ids=tokens(2, 1), past_key_values=again.past_key_values)
