"""Calls carry their own state: threads, re-entrant calls and exceptions do not mix up one model's calls."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, bart, bert, llama, refuse_states, tokens, wake
from torch import Tensor, nn

from linearize.convert.linearize import linearize
from linearize.errors import InputError

GREEDY: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
THREADS, ROUNDS = 4, 2


def bloom() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, use_cache=True
    )
    return transformers.BloomForCausalLM(config).eval()


def gptj() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, initializer_range=0.2
    )
    return transformers.GPTJForCausalLM(config).eval()


def fresh(name: str) -> Any:
    """The converted model without its traced graphs. BLOOM keeps its own: a first call of one sequence cannot
    tell heads and batch apart."""
    return converted(name) if name == "bloom" else copy.deepcopy(converted(name))


MAKERS = {"llama": llama, "bert": bert, "bloom": bloom, "gptj": gptj, "bart": bart}


@cache
def converted(name: str) -> Any:
    approximate = ("bias",) if name == "bloom" else ()
    return wake(
        linearize(
            MAKERS[name](), mechanism="augmented_paper", group_size=4, conv_taps=3, approximate=approximate
        )
    )


@contextmanager
def often_switching() -> Iterator[None]:
    """Threads take turns after microseconds instead of milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def generated(model: Any, index: int) -> Tensor:
    return model.generate(tokens(1, 9 + index), **GREEDY)


def scored(model: Any, index: int) -> Tensor:
    with torch.no_grad():
        return (
            model(tokens(2, 9 + index)).last_hidden_state
            if "Bert" in type(model).__name__
            else model(input_ids=tokens(2, 9 + index), use_cache=False).logits
        )


CALLS: list[tuple[str, list[Callable[[Any, int], Tensor]]]] = [
    ("llama", [generated]),
    ("llama", [generated, scored]),
    ("bert", [scored]),
    ("bloom", [generated, scored]),
    pytest.param("gptj", [generated, scored], marks=pytest.mark.slow),  # another on the graph route
]


@pytest.mark.parametrize(("name", "calls"), CALLS, ids=lambda x: x if isinstance(x, str) else str(len(x)))
def test_threads_that_share_a_model_each_get_what_they_get_alone(name: str, calls: Any) -> None:
    # A graph that was traced already would hide what tracing beside other threads does to them.
    model = fresh(name)
    jobs = [(calls[i % len(calls)], i) for i in range(THREADS)]
    wanted = [call(converted(name), i) for call, i in jobs]
    wrong: list[str] = []

    def work(place: int) -> None:
        call, index = jobs[place]
        try:
            for _ in range(ROUNDS):
                found = call(model, index)
                if found.shape != wanted[place].shape or not torch.allclose(found, wanted[place], atol=1e-5):
                    wrong.append(f"thread {place} got something else")
        except Exception as error:
            wrong.append(f"thread {place}: {type(error).__name__}: {error}")

    with often_switching():
        threads = [threading.Thread(target=work, args=(place,)) for place in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("name", ["llama", pytest.param("gptj", marks=pytest.mark.slow)])
def test_a_model_that_is_called_again_from_a_hook_computes_both_calls(name: str) -> None:
    model = fresh(name)
    outer, inner = tokens(1, 11), tokens(2, 7)
    with torch.no_grad():
        wanted, wanted_inside = model(outer, use_cache=False).logits, model(inner, use_cache=False).logits
        inside: list[Tensor] = []

        def again(*_: Any) -> None:
            if not inside:
                inside.append(torch.empty(0))  # the inner call meets this hook as well
                inside[0] = model(inner, use_cache=False).logits

        owner = model.get_submodule(model._linearize.plan.sites[-1].path)
        # Inside the owner, between the projections and the attention.
        handle = next(m for m in owner.modules() if isinstance(m, nn.Linear)).register_forward_hook(again)
        found = model(outer, use_cache=False).logits
        handle.remove()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(inside[0], wanted_inside)


def places(name: str) -> list[str]:
    """Modules at which a call is stopped: before, inside and after the first and the last owner."""
    model = MAKERS[name]()
    names = [path for path, module in model.named_modules() if path and not list(module.children())]
    found = [
        n for n in names if any(part in n for part in ("q_proj", "o_proj", "out_proj", "dense", "query_key"))
    ]
    found += [n for n in names if any(part in n for part in ("norm", "ln_1", "mlp", "head", "embed", "wte"))]
    return found


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_after_an_interrupt_anywhere_a_cache_goes_on_exactly_or_is_refused(name: str, first: bool) -> None:
    model = fresh(name)
    ids, past = tokens(1, 24), 12
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    outcomes = {"exact": 0, "refused": 0}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in places(name):
        store = transformers.DynamicCache(config=model.config)
        begin = 0 if first else past
        with torch.no_grad():
            if not first:
                model(ids[:, :past], past_key_values=store, use_cache=True)
            handle = model.get_submodule(place).register_forward_hook(stop)
            with suppress(KeyboardInterrupt):
                model(ids[:, begin : begin + 5], past_key_values=store, use_cache=True)
            handle.remove()
            counted = int(store.get_seq_length())
            try:
                found = model(ids[:, counted:], past_key_values=store, use_cache=True).logits
            except InputError as error:
                assert "start from an empty cache" in str(error), place
                outcomes["refused"] += 1
                with pytest.raises(InputError):  # and it stays refused
                    model(ids[:, counted:], past_key_values=store, use_cache=True)
                continue
        torch.testing.assert_close(found, wanted[:, counted:], atol=1e-4, rtol=1e-4, msg=place)
        outcomes["exact"] += 1
    assert outcomes["exact"] and outcomes["refused"], outcomes


def test_a_state_that_was_left_half_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ids = tokens(1, 20)
    store = transformers.DynamicCache(config=model.config)
    child = model.model.layers[0].self_attn.linear_attention
    whole = child.extend

    def out_of_memory(query: Tensor, key: Tensor, value: Tensor, states: Any, **more: Any) -> Tensor:
        whole(query, key, value, states, **more)
        raise torch.OutOfMemoryError("no memory")

    with torch.no_grad():
        model(ids[:, :10], past_key_values=store, use_cache=True)
        monkeypatch.setattr(child, "extend", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, 10:15], past_key_values=store, use_cache=True)
        monkeypatch.undo()
        with pytest.raises(InputError, match="half written"):
            model(ids[:, 10:], past_key_values=store, use_cache=True)


def test_a_call_leaves_nothing_on_the_modules() -> None:
    for name in MAKERS:
        model = converted(name)
        with torch.no_grad():
            scored(model, 0) if name != "bart" else model(
                input_ids=tokens(1, 9), decoder_input_ids=tokens(1, 5)
            )
        for path in model._linearize.plan.owners:
            ours = [key for key in vars(model.get_submodule(path)) if key.startswith("_linearize")]
            assert ours == ["_linearize_owner"], path


def test_a_mask_that_is_refused_costs_the_cache_nothing() -> None:
    model = fresh("llama")
    ids, past = tokens(1, 24), 12
    scattered = torch.ones(1, 1, 5, past + 5, dtype=torch.bool)
    scattered[:, :, 1, 4] = False
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        store = model(ids[:, :past], use_cache=True).past_key_values
        with pytest.raises(InputError, match="not a causal mask"):
            model(ids[:, past : past + 5], past_key_values=store, attention_mask=scattered)
        assert store.get_seq_length() == past
        found = model(ids[:, past:], past_key_values=store).logits
    torch.testing.assert_close(found, wanted[:, past:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", (1, 7))
@pytest.mark.parametrize("kind", (transformers.DynamicCache, transformers.StaticCache))
@torch.no_grad()
def test_a_prompt_cut_off_before_a_softmax_layer_is_refused_later(kind: Any, length: int) -> None:
    model: Any = wake(linearize(llama(), keep_softmax=(1,), mechanism="augmented_paper", group_size=4))
    sizes = {"max_cache_len": 32} if kind is transformers.StaticCache else {}
    cache, other = (kind(config=model.config, **sizes) for _ in range(2))
    ids = tokens(1, length)
    model(ids, past_key_values=other, use_cache=True)
    model(ids, past_key_values=other, use_cache=True)  # a whole first call is gone on from

    def cut(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_hook(cut)
    with suppress(KeyboardInterrupt):
        model(ids, past_key_values=cache, use_cache=True)
    hook.remove()
    with pytest.raises(InputError, match="ended midway"):
        model(ids, past_key_values=cache, use_cache=True)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns or raises, all of them at once in threads of their own."""
    found: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    with often_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def test_models_can_be_converted_and_traced_in_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for `monkeypatch` so that each conversion searches its model itself, see `conftest.py`."""
    model = converted("gptj")
    alone = [generated(model, index) for index in range(2)]
    cold = [copy.deepcopy(model) for _ in range(2)]
    convert = [
        lambda make=make: linearize(make(), mechanism="augmented_paper", group_size=4)
        for make in (llama, gptj)
    ]
    found = together(*convert, *(lambda i=i: generated(cold[i], i) for i in range(2)))
    assert all(isinstance(x, nn.Module) for x in found[:2]), found
    assert all(torch.equal(x, y) for x, y in zip(found[2:], alone, strict=True)), found


@pytest.mark.slow
def test_threads_whose_graphs_show_no_state_all_keep_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_states(monkeypatch)
    converted = wake(linearize(gptj(), mechanism="augmented_paper", group_size=4))
    alone = [generated(converted, i) for i in range(2)]
    model = copy.deepcopy(converted)
    found = together(*(lambda i=i: generated(model, i) for i in range(2)))
    assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True)), found
