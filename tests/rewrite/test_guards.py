"""Later calls of a converted owner: each means what was converted and proved, or is refused by name.

`softmax_window` with a window wider than the text is exact softmax, so that what it gives shows whether the
rewrite follows a call; the reference is the model before it was converted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_models import bert, llama, tokens
from torch import Tensor, nn

from linearize.convert.linearize import linearize
from linearize.errors import InputError, InvalidModelError, LinearizeError

EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 1024})
X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
PAD = torch.ones(2, 10, dtype=torch.bool)
PAD[1, 7:] = False


def tril(length: int = 10) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def blocks() -> Tensor:
    return tril() & torch.block_diag(torch.ones(6, 6), torch.ones(4, 4)).bool()


def prefix() -> Tensor:
    mask = tril()
    mask[:, :4] = True
    return mask


class Own(nn.Module):
    """Attention with everything that people leave optional."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.causal, self.scale, self.window, self.cap, self.use_keep = causal, 8**-0.5, None, None, False
        self.register_buffer("keep", tril(64))
        self.inner = nn.Module()
        self.inner.gain = 1.0  # type: ignore[assignment]
        self.settings, self.args = {"gain": 1.0}, SimpleNamespace(gain=1.0)
        self.tables: dict[str, Tensor] = {}
        self.rules: Callable[[int], dict[str, Any]] | None = None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pad: Tensor | None = None,
        window: int | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        batch, length, _ = x.shape
        if self.rules is not None:
            rules = self.rules(length)
            window, scale = rules.get("window"), rules.get("scale")
        query, key, value = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * (scale or self.scale) * self.inner.gain
        scores = scores * self.settings["gain"] * self.args.gain
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.causal or causal:
            scores = scores.masked_fill(~tril(length), float("-inf"))
        width = window or self.window
        if width is not None:
            scores = scores.masked_fill(tril(length).tril(-width), float("-inf"))
        if self.use_keep:
            keep = self.tables.get("keep", self.keep)
            scores = scores.masked_fill(~keep[:length, :length], float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if pad is not None:
            scores = scores.masked_fill(~pad[:, None, None, :], float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, 32)


@pytest.fixture(scope="module")
def pairs() -> dict[bool, tuple[Own, Own, Own]]:
    """Whether causal -> the original, exact in a window that holds all, and softmax of its own graph."""
    made = {}
    for causal in (True, False):
        torch.manual_seed(0)
        original = Own(causal).eval()
        linear = linearize(copy.deepcopy(original), X, **EXACT)
        made[causal] = original, linear, linearize(copy.deepcopy(original), X, mechanism="softmax")
    return made


Pairs = dict[bool, tuple[Own, Own, Own]]


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


CALLS: dict[str, dict[str, Any]] = {
    "causal": dict(causal=True),
    "window": dict(window=3),
    "scale": dict(scale=1.5),
    "padding": dict(pad=PAD),
    "padding as a mask": dict(mask=PAD[:, None, None, :]),
    "padding as an additive mask": dict(mask=additive(PAD)[:, None, None, :]),
    "causal mask": dict(mask=tril()),
    "causal additive mask": dict(mask=additive(tril())[None, None]),
    "documents": dict(mask=blocks()),
    "prefix": dict(mask=prefix()),
    "bias": dict(mask=torch.arange(100.0).view(10, 10) / 50),
    "bias of keys": dict(mask=torch.arange(10.0).view(1, 1, 1, 10) / 5),
}
CARRIED = {
    (True, "causal"),
    (True, "padding"),
    (True, "padding as a mask"),
    (True, "padding as an additive mask"),
    (True, "causal mask"),
    (True, "causal additive mask"),
    (True, "documents"),
    (True, "prefix"),  # hidden by the model's own causality
    (False, "padding"),
    (False, "padding as a mask"),
    (False, "padding as an additive mask"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("causal", [True, False])
def test_an_argument_given_later_is_followed_or_refused(pairs: Pairs, causal: bool, name: str) -> None:
    original, model, exact = pairs[causal]
    with torch.no_grad():
        wanted = original(X, **CALLS[name])
        real = PAD if "padding" in name else torch.ones_like(PAD)
        torch.testing.assert_close(exact(X, **CALLS[name])[real], wanted[real], atol=1e-5, rtol=1e-4)
        if (causal, name) in CARRIED:
            found = model(X, **CALLS[name])
            torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(model(X), original(X), atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(InputError) as error:
                model(X, **CALLS[name])
            assert len(str(error.value)) <= 600


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "flag": (lambda m: setattr(m, "causal", not m.causal), "mask was"),
    "window": (lambda m: setattr(m, "window", 3), "window of 3"),
    "scale": (lambda m: setattr(m, "scale", 1.5), "scale was"),
    "softcap": (lambda m: setattr(m, "cap", 2.0), "softcap was"),
    "child": (lambda m: setattr(m.inner, "gain", 3.0), "scale was"),
    "in a dict": (lambda m: m.settings.update(gain=3.0), "scale was"),
    "in a namespace": (lambda m: setattr(m.args, "gain", 3.0), "scale was"),
    "a mask switched on": (lambda m: setattr(m, "use_keep", True), "mask was"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_changed_later_is_noticed(pairs: Pairs, name: str) -> None:
    change, words = CHANGES[name]
    original, model, exact = copy.deepcopy(pairs[name != "a mask switched on"])
    model(X)
    for module in (original, model, exact):
        change(module)
    with torch.no_grad():
        torch.testing.assert_close(exact(X), original(X), atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match=words):
            model(X)


def test_a_model_that_was_compiled_is_exported_as_before(pairs: Pairs) -> None:
    original, model, _ = copy.deepcopy(pairs[True])
    model(X)
    torch.compile(model, backend="eager")
    with torch.no_grad():
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), original(X), atol=1e-5, rtol=1e-4)


def narrow(keep: Tensor) -> Tensor:
    return keep & ~keep.tril(-3)


def loaded(owner: Any, **how: Any) -> None:
    owner.load_state_dict({**owner.state_dict(), "keep": narrow(owner.keep)}, **how)


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.keep.copy_(narrow(m.keep)),
    "registered again": lambda m: m.register_buffer("keep", narrow(m.keep)),
    "state dict": loaded,
    "state dict assigned": lambda m: loaded(m, assign=True),
    "data": lambda m: m.keep.data.copy_(narrow(m.keep)),
    "data replaced": lambda m: setattr(m.keep, "data", narrow(m.keep)),
    "numpy": lambda m: m.keep.numpy().__setitem__(..., narrow(m.keep).numpy()),
}


@pytest.fixture(scope="module")
def buffered() -> tuple[Own, Own]:
    """The original, whose mask is in a buffer, and exact in a window that holds all."""
    torch.manual_seed(0)
    original = Own(False).eval()
    original.use_keep = True
    return original, linearize(copy.deepcopy(original), X, **EXACT)


@pytest.mark.parametrize("name", WRITES)
def test_a_buffer_that_a_mask_is_read_from_is_noticed_when_it_is_written_to(
    buffered: tuple[Own, Own], name: str
) -> None:
    original, model = copy.deepcopy(buffered)
    with torch.no_grad():
        torch.testing.assert_close(model(X), original(X), atol=1e-5, rtol=1e-4)
        WRITES[name](model)
        with pytest.raises(InputError, match="window of 3"):
            model(X)
        model.keep = tril(64)
        torch.testing.assert_close(model(X), original(X), atol=1e-5, rtol=1e-4)


def test_a_tensor_in_a_dict_that_a_mask_is_read_from_is_noticed_as_well() -> None:
    original = Own(False).eval()
    original.use_keep, original.tables = True, {"keep": tril(64)}
    for change in (
        lambda m: m.tables["keep"].copy_(narrow(tril(64))),
        lambda m: m.tables.update(keep=narrow(tril(64))),
    ):
        model = linearize(copy.deepcopy(original), X, **EXACT)
        model(X)
        change(model)
        with pytest.raises(InputError, match="window of 3"):
            model(X)


@pytest.mark.parametrize("name", ["in place", "registered again", "state dict", "data"])
def test_the_same_is_asserted_in_a_compiled_model(buffered: tuple[Own, Own], name: str) -> None:
    original, model = copy.deepcopy(buffered)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        model(X)
        torch.testing.assert_close(compiled(X), original(X), atol=1e-5, rtol=1e-4)
        WRITES[name](model)
        with pytest.raises(RuntimeError, match="values of `keep`, which a mask or a scale is read from"):
            compiled(X)


class Scaled(nn.Module):
    """Scores times a tensor."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(32, 96), scale

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        scores = 2.0 * (query @ key.mT) * self.scale.clamp(max=3.0)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def test_a_learned_scale_is_carried_and_learns() -> None:
    torch.manual_seed(0)
    original = Scaled(nn.Parameter(torch.rand(4, 1, 1) + 0.5))
    model = linearize(copy.deepcopy(original), X, **EXACT)
    torch._dynamo.reset()
    options = {**EXACT, "inner": "eager"}
    results = []
    for run, of in (
        (original, original),
        (model, model),
        (torch.compile(original, backend="linearize", options=options), original),
    ):
        out = run(X)
        results.append((out, *torch.autograd.grad(out.square().sum(), (of.scale, of.qkv.weight))))
    assert options["backend"].report.sites and not options["backend"].report.refusals  # type: ignore[attr-defined]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        original.scale.mul_(2), model.scale.mul_(2)
        torch.testing.assert_close(model(X), original(X), atol=1e-5, rtol=1e-4)


def test_a_scale_in_a_buffer_that_is_written_to_is_noticed() -> None:
    model = linearize(Scaled(nn.Buffer(torch.tensor(0.3))).eval(), X, **EXACT)
    model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    model.scale.fill_(1.5)
    with pytest.raises(RuntimeError, match="values of `scale`"):
        compiled(X)
    with pytest.raises(InputError, match="scale was"):
        model(X)


def test_a_mask_of_zeros_and_ones_is_asserted_wherever_it_was_read_as_one() -> None:
    class Counted(Own):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, (1 - real[:, None, None, :]) * torch.finfo(x.dtype).min)

    torch.manual_seed(0)
    original = Counted(True).eval()
    model = linearize(copy.deepcopy(original), (X, PAD.long()), **EXACT)
    torch._dynamo.reset()
    inside = torch.compile(original, backend="linearize", options={**EXACT, "inner": "eager"})
    exported = torch.export.export(model, (X, PAD.long())).module()
    twice = PAD.long()
    twice[0, 3] = 2
    with torch.no_grad():
        for run in (model, torch.compile(model, backend="eager"), exported, inside):
            torch.testing.assert_close(
                run(X, PAD.long())[PAD], original(X, PAD.long())[PAD], atol=1e-5, rtol=1e-4
            )
            with pytest.raises((InputError, RuntimeError), match="discourage keys|0 or 1"):
                run(X, twice)


@pytest.mark.parametrize(
    "rules",
    [
        lambda length: {"window": 3} if length % 2 else {},
        lambda length: {"window": 8} if length > 12 else {},
        lambda length: {"scale": 8**-0.5 if length < 12 else 1.0},
        lambda length: {"scale": 8**-0.5 * math.log(length) / math.log(10)},
    ],
    ids=["odd", "long", "scale of long", "scale of length"],
)
def test_what_depends_on_the_length_is_proved_for_each_length(pairs: Pairs, rules: Any) -> None:
    original, model, exact = copy.deepcopy(pairs[True])
    for module in (original, model, exact):
        module.rules = rules
    refused = 0
    for length in (10, 11, 16, 23):
        x = torch.randn(2, length, 32)
        with torch.no_grad():
            wanted = original(x)
            torch.testing.assert_close(exact(x), wanted, atol=1e-5, rtol=1e-4)
            try:
                torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
            except LinearizeError:
                refused += 1
    assert 0 < refused < 4


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    return original, linearize(copy.deepcopy(original), X, **EXACT)


def test_padding_given_later_to_a_torch_encoder_is_followed(encoder: tuple[nn.Module, nn.Module]) -> None:
    original, model = encoder
    with torch.no_grad():
        for hidden in (~PAD, additive(PAD)):
            wanted, found = (m(X, src_key_padding_mask=hidden) for m in (original, model))
            torch.testing.assert_close(found[PAD], wanted[PAD], atol=1e-5, rtol=1e-4)


def test_causality_given_later_to_a_torch_encoder_is_refused(encoder: tuple[nn.Module, nn.Module]) -> None:
    _, model = encoder
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    for given in (dict(mask=mask, is_causal=True), dict(mask=mask), dict(mask=~tril())):
        with pytest.raises(InputError), torch.no_grad():
            model(X, **given)


# --- the interface route ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any]:
    original = llama()
    return original, linearize(copy.deepcopy(original), **EXACT)


def test_a_decoder_made_bidirectional_later_is_refused(decoder: tuple[Any, Any]) -> None:
    ids = tokens(1, 9)
    for change in (
        lambda m: setattr(m.config, "is_causal", False),
        lambda m: setattr(m.model.layers[1].self_attn, "is_causal", False),
        lambda m: setattr(m.model.layers[0].self_attn, "scaling", 2.0),
    ):
        model = copy.deepcopy(decoder[1])
        change(model)
        with pytest.raises(InvalidModelError, match="is_causal|scaling"):
            model(ids)


def test_settings_that_masks_do_not_read_may_change(decoder: tuple[Any, Any]) -> None:
    model = copy.deepcopy(decoder[1])
    model.config.use_cache, model.config.pad_token_id = False, 5
    model.model.layers[0].self_attn.attention_dropout = 0.5
    torch.testing.assert_close(model(tokens(1, 9)).logits, decoder[1](tokens(1, 9)).logits)


def cached(model: Any, first: Tensor | None, later: Tensor | None, static: bool) -> Tensor:
    ids = tokens(2, 12)
    settings: dict[str, Any] = {}
    if static:
        from transformers import StaticCache

        settings["past_key_values"] = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        cache = model(ids[:, :8], attention_mask=first, use_cache=True, **settings).past_key_values
        masks = [None if later is None else later[:, :n] for n in (11, 12)]
        positions = torch.arange(12)[None]
        more = [
            model(ids[:, a:b], attention_mask=m, position_ids=positions[:, a:b], past_key_values=cache).logits
            for m, a, b in zip(masks, (8, 11), (11, 12), strict=True)
        ]
    return torch.cat(more, 1)


def hidden(*columns: int, length: int = 12) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, list(columns)] = 0
    return mask


@pytest.mark.parametrize("static", [False, True])
def test_the_same_padding_goes_on_and_other_padding_of_cached_tokens_is_refused(
    decoder: tuple[Any, Any], static: bool
) -> None:
    original, model = decoder
    for first, later in ((None, None), (hidden(0, 1, length=8), hidden(0, 1)), (None, hidden(9))):
        wanted, found = (cached(m, first, later, static) for m in decoder)
        real = torch.ones(2, 4, dtype=torch.bool) if later is None else later[:, 8:].bool()
        torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-4)
    for first, later in ((None, hidden(2)), (hidden(0, length=8), hidden()), (hidden(0, length=8), None)):
        with pytest.raises(InputError, match="hides tokens that the cache took as visible"):
            cached(model, first, later, static)


def test_a_cache_goes_on_after_a_refused_mask(decoder: tuple[Any, Any]) -> None:
    _, model = decoder
    ids = tokens(2, 12)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(InputError):
            model(ids[:, 8:], attention_mask=hidden(2), past_key_values=cache)
        found = model(ids[:, 8:], attention_mask=hidden(), past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 8:], atol=1e-5, rtol=1e-4)


def test_square_masks_are_asserted_in_a_compiled_model(decoder: tuple[Any, Any]) -> None:
    _, model = decoder
    ids = tokens(1, 10)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = compiled(ids, attention_mask=tril()[None, None], use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)
        for mask in (prefix(), blocks()):
            with pytest.raises(RuntimeError, match="attention mask"):
                compiled(ids, attention_mask=mask[None, None], use_cache=False)


def test_an_encoder_follows_documents_and_refuses_what_is_causal() -> None:
    original: Any = bert()
    model: Any = linearize(copy.deepcopy(original), **EXACT)
    ids = tokens(1, 10)
    both = (blocks() | blocks().mT)[None, None]
    with torch.no_grad():
        wanted, found = (m(ids, attention_mask=both).last_hidden_state for m in (original, model))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="not a bidirectional mask"):
            model(ids, attention_mask=tril()[None, None])
        with pytest.raises(InputError, match="not a bidirectional mask"):
            model(ids, attention_mask=torch.linspace(-2, 0, 10).expand(1, 1, 10, 10))
