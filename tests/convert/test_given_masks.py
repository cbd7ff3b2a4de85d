"""Masks that are inputs: the pattern that the example says is carried, and every call compared with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.convert.inspect import inspect
from linearize.convert.linearize import linearize
from linearize.errors import InputError, LinearizeError, RefusedError

T, LONGER = 10, 17
EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 1024})
GENERATOR = torch.Generator().manual_seed(0)
X, WIDE = torch.randn(2, T, 32, generator=GENERATOR), torch.randn(2, LONGER, 32, generator=GENERATOR)
PADDED = torch.arange(T) >= torch.tensor([[T], [6]])


def later(length: int = T) -> Tensor:
    """Bool, True where torch's modules are to hide."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def additive(hidden: Tensor, value: float = -torch.inf) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, value)


def heads(mask: Tensor) -> Tensor:
    return mask[None].expand(8, -1, -1)


class Encoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), layers)

    def forward(self, x: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.body(x, mask=mask, **more)


class Heads(nn.Module):
    """`nn.MultiheadAttention` as it is mostly called: its weights are made and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None, weights: bool = False) -> Any:
        result, made = self.attention(x, x, x, attn_mask=mask)
        return (result, made) if weights else result


class Own(nn.Module):
    """Attention of someone's own, whose bool masks say what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        return out.transpose(1, 2).flatten(2)


MODULES: dict[str, Callable[[], nn.Module]] = {"encoder": Encoder, "heads": Heads, "own": Own}
SPELLINGS: dict[str, Callable[[int], Tensor]] = {
    "bool": later,
    "infinite": lambda n: additive(later(n)),
    "finite": lambda n: additive(later(n), torch.finfo(torch.float32).min),
    "heads": lambda n: heads(additive(later(n))),
}
OTHERS: dict[str, Tensor | None] = {
    "none": None,
    "all": torch.zeros(T, T),
    "window": later() | ~later().T.triu(-2),
    "prefix": later() & (torch.arange(T) >= 3),
    "bias": torch.arange(100.0).view(T, T) / 50,
    "discouraged": additive(later(), -5.0),
}


@pytest.fixture(scope="module", params=MODULES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The original, and what was converted on it with a causal mask."""
    torch.manual_seed(0)
    original = MODULES[request.param]().eval()
    model = linearize(copy.deepcopy(original), (X, additive(later())), **EXACT)
    assert all(site.spec.causal for site in model._linearize.plan.sites)
    return original, model


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("x", (X, WIDE), ids=("as long", "longer"))
def test_a_causal_mask_is_followed_in_every_spelling(pair: Any, spelling: str, x: Tensor) -> None:
    original, model = pair
    if spelling == "heads" and isinstance(original, Own):
        pytest.skip("it takes no such mask")
    mask = SPELLINGS[spelling](x.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), original(x, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_or_none_is_refused(pair: Any, name: str) -> None:
    _, model = pair
    with torch.no_grad(), pytest.raises(InputError) as error:
        model(X, OTHERS[name])
    assert len(str(error.value)) <= 600


@pytest.mark.parametrize("spelling", ("bool", "finite", "heads"))
def test_every_spelling_in_the_example_says_causal(spelling: str) -> None:
    torch.manual_seed(0)
    original = Encoder(1).eval()
    example = dict(x=X, mask=SPELLINGS[spelling](T))
    assert {row.mask for row in inspect(original, example).rows} == {"causal"}
    model = linearize(copy.deepcopy(original), example, **EXACT)
    with torch.no_grad():
        padded = dict(mask=later(), src_key_padding_mask=PADDED)
        found, wanted = model(X, **padded), original(X, **padded)
    torch.testing.assert_close(found[~PADDED], wanted[~PADDED], atol=1e-5, rtol=1e-4)


def test_a_mask_that_hides_nothing_in_the_example_may_be_left_out_and_hide_nothing_else() -> None:
    torch.manual_seed(0)
    original = Encoder(1).eval()
    model = linearize(copy.deepcopy(original), (X, torch.zeros(T, T)), **EXACT)
    with torch.no_grad():
        for call in ((X,), (X, torch.zeros(T, T)), (WIDE, torch.zeros(LONGER, LONGER, dtype=torch.bool))):
            torch.testing.assert_close(model(*call), original(*call), atol=1e-5, rtol=1e-4)
        for mask in (later(), additive(later())):
            with pytest.raises(InputError):
                model(X, mask)


@pytest.mark.parametrize("name", sorted(set(OTHERS) - {"none", "all"}))
def test_an_example_whose_mask_says_more_is_refused(name: str) -> None:
    with pytest.raises(RefusedError, match="'mask'|bias"):
        linearize(Own().eval(), (X, OTHERS[name]), **EXACT)


def test_what_inputs_decide_in_another_way_is_refused_though_the_example_looks_causal() -> None:
    class Prefix(Own):
        def forward(self, x: Tensor, prefix: Tensor) -> Tensor:  # type: ignore[override]
            hidden = later(x.shape[1]) & (torch.arange(x.shape[1]) >= prefix[:, None, None, None])
            return super().forward(x, hidden)

    class Window(Own):
        def forward(self, x: Tensor, width: Tensor) -> Tensor:  # type: ignore[override]
            hidden = later(x.shape[1])
            return super().forward(x, hidden | hidden.T & (hidden.T.cumsum(0) >= width))

    with pytest.raises(RefusedError, match="'prefix'"):
        linearize(Prefix().eval(), (X, torch.tensor([1, 1])), **EXACT)
    with pytest.raises(RefusedError, match="'width'"):
        linearize(Window().eval(), (X, torch.tensor(100)), **EXACT)


def test_a_learned_bias_of_zeros_is_no_mask_that_someone_gives() -> None:
    class Biased(Own):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(32, 32))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, mask + self.bias[: x.shape[1], : x.shape[1]])

    with pytest.raises(RefusedError, match="bias"):
        linearize(Biased().eval(), (X, additive(later())), **EXACT)


@pytest.mark.parametrize("door", ("compiled", "exported"))
def test_in_a_graph_the_mask_is_asserted(pair: Any, door: str) -> None:
    original, model = pair
    if isinstance(original, Encoder):
        pytest.skip("torch asks the values of its mask, also in the original")
    mask = additive(later())
    torch._dynamo.reset()
    with torch.no_grad():
        model(X, mask)
        run = (
            torch.compile(model, backend="eager")
            if door == "compiled"
            else torch.export.export(model, (X, mask)).module()
        )
        torch.testing.assert_close(run(X, mask), original(X, mask), atol=1e-5, rtol=1e-4)
        with pytest.raises((LinearizeError, RuntimeError), match="mask"):
            run(X, additive(later() & (torch.arange(T) >= 3)))


def test_weights_that_nobody_reads_are_no_reason_to_refuse_and_whoever_reads_them_later_is_told() -> None:
    torch.manual_seed(0)
    original = Heads().eval()
    model = linearize(copy.deepcopy(original), X, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(X), original(X), atol=1e-5, rtol=1e-4)
        result, weights = model(X, weights=True)
    torch.testing.assert_close(result, original(X), atol=1e-5, rtol=1e-4)
    assert not hasattr(weights, "shape")
    for read in (lambda w: w.mean(), torch.mean, lambda w: w[0], list, lambda w: X + w):
        with pytest.raises(InputError, match="makes none"):
            read(weights)


def test_weights_that_are_returned_are_refused_with_advice_that_works() -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    with pytest.raises(RefusedError, match="need_weights=False") as error:
        linearize(copy.deepcopy(original), (X, X, X), **EXACT)
    assert len(str(error.value)) <= 600
    asked = dict(query=X, key=X, value=X, need_weights=False)
    model = linearize(copy.deepcopy(original), asked, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(**asked)[0], original(**asked)[0], atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="need_weights=False"):
            model(X, X, X)


@torch.no_grad()
def test_masks_of_one_row_that_say_more_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(32, 96)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = (part.view(2, -1, 4, 8).transpose(1, 2) for part in self.project(x).chunk(3, -1))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)

    x = torch.randn(2, 10, 32)
    model = linearize(Own().eval(), {"x": x}, mechanism="augmented")
    keep = torch.rand(2, 4, 1, 10) > 0.4
    keep[..., 0] = True
    for mask in (keep, torch.where(keep, 0.0, float("-inf"))):
        with pytest.raises(InputError, match="follows no other"):  # heads see different keys
            model(x, mask)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    ids = torch.arange(3, 13).repeat(2, 1)
    linearize(decoder, {"input_ids": ids}, mechanism="augmented")
    with pytest.raises(InputError, match="one row for all queries.*2-D padding mask"):
        decoder(input_ids=ids, attention_mask=torch.zeros(2, 1, 1, 10))
    decoder(input_ids=ids, attention_mask=torch.ones(2, 10))


class Flagged(nn.Module):
    """Hand-written attention that is causal or not, by a flag, and adds what it is given to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor, add: Tensor | None = None, causal: bool = True) -> Tensor:
        q, k, v = (part.view(2, -1, 4, 8).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        scores = scores if add is None else scores + add
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_padding_alone_does_not_keep_a_site_causal() -> None:
    x, hidden = torch.randn(2, 10, 32), torch.zeros(2, 10, dtype=torch.bool)
    hidden[1, 6:] = True
    later = torch.ones(10, 10).triu(1).bool()
    floats = torch.zeros(2, 10).masked_fill(hidden, float("-inf"))
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    original = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    encoder = linearize(copy.deepcopy(original), {"src": x, "mask": later}, mechanism="augmented")
    both = {"mask": later, "src_key_padding_mask": hidden}
    torch.testing.assert_close(encoder(x, **both)[~hidden], original(x, **both)[~hidden])
    for padding in (hidden, floats, torch.zeros_like(hidden)):
        with pytest.raises(InputError, match="not a causal mask"):
            encoder(x, src_key_padding_mask=padding)
    own = Flagged().eval()
    model = linearize(copy.deepcopy(own), {"x": x}, mechanism="augmented")
    row = floats[:, None, None]
    torch.testing.assert_close(model(x, row)[~hidden], own(x, row)[~hidden])
    for add in (row, torch.zeros(2, 1, 1, 10)):
        with pytest.raises(InputError, match="not a causal mask"):
            model(x, add, causal=False)
