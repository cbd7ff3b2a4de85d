"""After `linearize(model)` it is still the user's model; after an error it is the model it was."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from live_models import (
    EagerAttention,
    activations,
    bart,
    bert,
    converted,
    llama,
    plain,
    snapshot,
    tokens,
)
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from linearize.convert.linearize import linearize
from linearize.convert.linearize import planned as make_plan
from linearize.errors import (
    ConfigError,
    InputError,
    InvalidModelError,
    NoAttentionError,
    RefusedError,
    VerificationError,
)
from linearize.planning.config import LinearizeConfig
from linearize.planning.plan import Plan
from linearize.planning.state import LinearizeState
from linearize.rewrite.apply import apply_plan

CONVERTED = ["llama", "bert", "bart", "t5", "plain", "gptj"]


def options(name: str) -> dict[str, Any]:
    return {"approximate": ("bias",)} if name == "t5" else {}


def run(name: str, model: Any, size: int = 2) -> torch.Tensor:
    if name == "plain":
        return model(activations(size, 11))
    if name in ("bart", "t5"):
        return model(input_ids=tokens(size, 11), decoder_input_ids=tokens(size, 7)).logits
    out = model(tokens(size, 11))
    return out[0]


# --- the exact mechanism


@pytest.mark.parametrize("name", CONVERTED)
def test_with_the_softmax_mechanism_the_model_computes_what_it_did(name: str) -> None:
    import live_models

    original = getattr(live_models, name)()
    exact = converted(name, mechanism="softmax")
    torch.testing.assert_close(run(name, exact, 3), run(name, original, 3), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONVERTED)
def test_the_augmented_mechanism_computes_something_else(name: str) -> None:
    import live_models

    original, linear = getattr(live_models, name)(), converted(name, **options(name))
    result = run(name, linear)
    assert torch.isfinite(result).all()
    assert (result - run(name, original)).abs().max() > 1e-3


# --- still the user's model


@pytest.mark.parametrize("name", CONVERTED)
def test_only_children_named_linear_attention_are_added(name: str) -> None:
    import live_models

    before, model = getattr(live_models, name)(), converted(name, **options(name))
    assert type(before) in type(model).__mro__ and isinstance(model, type(before))
    old, new = set(before.state_dict()), set(model.state_dict())
    assert old <= new and all(".linear_attention." in f".{key}" for key in new - old)
    assert [n for n, _ in before.named_modules()] == [
        n for n, _ in model.named_modules() if "linear_attention" not in n
    ]
    assert inspect.signature(model.forward) == inspect.signature(before.forward)


def test_owners_are_still_what_they_were() -> None:
    model: Any = converted("llama")
    owner = model.model.layers[0].self_attn
    assert isinstance(owner, LlamaAttention) and type(owner).__name__ == "LlamaAttention"
    assert type(owner).__module__ == LlamaAttention.__module__
    assert type(owner.q_proj) is nn.Linear
    assert inspect.signature(owner.forward) == inspect.signature(LlamaAttention(model.config, 0).forward)
    assert isinstance(model, LlamaForCausalLM)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_deep_copy_is_independent_and_equal(name: str) -> None:
    model = converted(name, **options(name))
    twin = copy.deepcopy(model)
    expected = run(name, model)
    assert torch.equal(run(name, twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(run(name, model), expected)
    assert not torch.equal(run(name, twin), expected)


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_pickle_and_torch_save_restore_the_model(name: str) -> None:
    model = converted(name)
    expected = run(name, model)
    assert torch.equal(run(name, pickle.loads(pickle.dumps(model))), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(run(name, torch.load(buffer, weights_only=False)), expected)


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_moving_to_bfloat16_and_back_works(name: str) -> None:
    model = converted(name)
    before = run(name, model)
    half = copy.deepcopy(model).bfloat16()
    inputs = activations(2, 11).bfloat16() if name == "plain" else tokens(2, 11)
    result = half(inputs)[0] if name != "plain" else half(inputs)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), before, atol=0.3, rtol=0.3)
    assert torch.equal(run(name, model.to("cpu")), before)


def test_a_converted_model_on_the_meta_device_keeps_its_structure() -> None:
    model = converted("llama").to("meta")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "plain", "gptj"])
def test_torch_compile_with_fullgraph_gives_the_same(name: str) -> None:
    model = converted(name)
    expected = run(name, model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(name, compiled), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "plain"])
def test_torch_export_at_another_length_gives_the_same(name: str) -> None:
    model = converted(name)
    run(name, model)
    inputs = (activations(2, 11),) if name == "plain" else (tokens(2, 11),)
    other = (activations(3, 17),) if name == "plain" else (tokens(3, 17),)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    keywords = {} if name != "llama" else {"use_cache": False}
    shapes: Any = {"x" if name == "plain" else "input_ids": axes, **dict.fromkeys(keywords)}
    program = torch.export.export(model, inputs, keywords, dynamic_shapes=shapes, strict=False)
    expected, found = model(*other, **keywords), program.module()(*other, **keywords)
    pick = (lambda out: out) if name == "plain" else (lambda out: out[0])
    torch.testing.assert_close(pick(found), pick(expected), atol=1e-5, rtol=1e-4)


# --- plans, hybrids and replaying


def test_the_plan_survives_json_and_replays_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    model: Any = converted("llama")
    state = model._linearize
    assert isinstance(state, LinearizeState)
    assert model.config.linearize["plan"] == state.plan.to_dict()
    plan = Plan.from_dict(json.loads(json.dumps(state.plan.to_dict())))
    assert plan == state.plan
    search = "linearize.convert.linearize.find_attention"
    monkeypatch.setattr(search, lambda *_: pytest.fail("searched the graph"))
    twin = apply_plan(llama(), plan, state.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run("llama", twin), run("llama", model))


def test_a_plan_applies_on_the_meta_device() -> None:
    state: Any = converted("llama")._linearize
    with torch.device("meta"):
        empty = llama()
    apply_plan(empty, state.plan, state.config)
    assert set(empty.state_dict()) == set(converted("llama").state_dict())
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    "setting", [{"layers": (1,)}, {"keep_softmax": (0,)}, {"keep_softmax": ("model.layers.0",)}]
)
def test_layers_that_are_kept_stay_softmax(setting: dict[str, Any]) -> None:
    model: Any = linearize(llama(), **setting)
    assert [site.path for site in model._linearize.plan.sites] == ["model.layers.1.self_attn"]
    assert type(model.model.layers[0].self_attn) is LlamaAttention
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids = tokens(2, 9)
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[:1, 4:], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[0, 9:], alone[0, 5:])


def test_plan_says_what_would_be_done_and_touches_nothing() -> None:
    model = bert()
    before = snapshot(model)
    plan = make_plan(model)
    assert [site.path for site in plan.sites] == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert all(not site.spec.causal for site in plan.sites)
    assert snapshot(model) == before


def test_shared_layers_get_one_module_each_time_they_are_called() -> None:
    shared = EagerAttention()
    model = nn.Sequential(shared, nn.LayerNorm(32), shared).eval()
    linearize(model, activations())
    (site,) = model._linearize.plan.sites  # type: ignore[union-attr]
    assert site.calls == 2 and isinstance(model(activations(3, 9)), torch.Tensor)


# --- bad input


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).softmax(-1)


class Escaping(nn.Module):
    """Returns its attention weights: they may not be rewritten away."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention(x, x, x, need_weights=True)


def filled_cache() -> dict[str, Any]:
    cache = DynamicCache()
    llama()(tokens(2, 5), past_key_values=cache)
    return {"input_ids": tokens(2, 1), "past_key_values": cache}


BAD: list[tuple[str, Any, Any, dict[str, Any], type[Exception], str]] = [
    ("no attention", NoAttention, activations, {}, NoAttentionError, "holds no softmax attention"),
    ("no inputs", plain, lambda: None, {}, InputError, "linearize\\(model, inputs\\)"),
    (
        "wrong shape",
        plain,
        lambda: torch.randn(2, 9, 31),
        {},
        InputError,
        "does not run on the example inputs",
    ),
    (
        "wrong name",
        llama,
        lambda: {"tokens": tokens(2, 9)},
        {},
        InputError,
        "does not run on the example inputs",
    ),
    ("not inputs", plain, lambda: 7, {}, InputError, "must be a dict"),
    ("filled cache", llama, filled_cache, {}, InputError, "already holds 5 keys and values"),
    ("unknown setting", plain, activations, {"taps": 3}, ConfigError, "taps"),
    ("unknown mechanism", plain, activations, {"mechanism": "magic"}, ConfigError, "magic"),
    ("weights escape", Escaping, activations, {}, RefusedError, "attention.*weights-escape"),
    ("nothing left", llama, lambda: None, {"layers": ()}, RefusedError, "leave no attention"),
]


@pytest.mark.parametrize(
    ("build", "inputs", "setting", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_one_clear_error_and_changes_nothing(
    build: Any, inputs: Any, setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        linearize(model, inputs(), **setting)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", [None, 3, "model", {"a": 1}, LlamaForCausalLM])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(InvalidModelError):
        linearize(thing, activations())


def test_a_model_is_converted_once() -> None:
    model = converted("llama")
    before = snapshot(model)
    with pytest.raises(InvalidModelError, match="already linearized"):
        linearize(model)
    with pytest.raises(InvalidModelError, match="already linearized"):
        apply_plan(model, model._linearize.plan, LinearizeConfig())  # type: ignore[union-attr, arg-type]
    assert snapshot(model) == before


def test_a_bias_is_refused_unless_the_user_drops_it_knowingly() -> None:
    from live_models import t5

    model = t5()
    before = snapshot(model)
    with pytest.raises(RefusedError, match="bias-unsupported.*approximate"):
        linearize(model)
    assert snapshot(model) == before


def test_new_parameters_train_in_float32_whatever_the_models_dtype() -> None:
    """In bfloat16 each of these steps would be lost: half of the last digit of 1 is forty of them."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = linearize(llama().to(dtype), group_size=4)
        new = {name: p for name, p in model.named_parameters() if "linear_attention" in name}
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert {p.dtype for p in new.values()} == {wanted}
        assert {p.dtype for name, p in model.named_parameters() if name not in new} == {dtype}
        scales = [p for name, p in new.items() if name.endswith("local_scale")]
        optimizer = torch.optim.AdamW(new.values(), lr=1e-4, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(tokens(2, 11)).logits
            assert out.dtype == dtype
            out.float().square().mean().backward()
            optimizer.step()
        for scale in scales:
            moved = (scale.detach() - 1).abs()
            assert ((moved > 5e-5) & (moved < 4e-4)).all()
        assert {p.dtype for p in model.half().parameters()} == {torch.float16}


def test_a_window_wider_than_the_example_inputs_is_refused() -> None:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
    )
    model = transformers.MistralForCausalLM(config).eval()
    before = snapshot(model)
    with pytest.raises(RefusedError, match="window"):
        linearize(model, mechanism="augmented_paper")
    assert snapshot(model) == before


def test_a_rewrite_that_does_not_reproduce_the_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    import linearize.convert.linearize as api

    def wrong(*args: Any) -> Plan:
        plan = real(*args)
        sites = [dataclasses.replace(s, spec=dataclasses.replace(s.spec, scale=2.0)) for s in plan.sites]
        return dataclasses.replace(plan, sites=tuple(sites))

    real = api.plan_sites
    monkeypatch.setattr(api, "plan_sites", wrong)
    model = llama(
        initializer_range=0.02
    )  # as small as fresh models are: the scale hardly shows in the output
    before = snapshot(model)
    with pytest.raises(VerificationError, match="model.layers.0.self_attn"):
        linearize(model)
    assert snapshot(model) == before


def test_an_interrupted_conversion_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.convert.pipeline.verify", stop)
    model = bart()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        linearize(model)
    assert snapshot(model) == before


def test_training_flags_and_random_state_are_left_alone() -> None:
    model = plain().train()
    model.blocks[0].eval()  # type: ignore[index, union-attr]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    linearize(model, activations())
    assert torch.equal(torch.rand(3), expected)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
