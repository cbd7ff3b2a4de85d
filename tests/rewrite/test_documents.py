"""Rows that hold several documents: each gets what it gets alone, forward and backward, or nothing runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from live_models import converted, llama, tokens
from torch import Tensor

from linearize import mechanisms
from linearize.convert.linearize import linearize
from linearize.errors import InputError
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig
from linearize.rewrite.documents import attend_documents, grouped, of_lengths, of_square
from linearize.rewrite.masks import compact_mask

LENGTHS = (5, 1, 9, 2)
EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 1024})


def positions(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.fixture(scope="module")
def original() -> Any:
    return llama()


@pytest.fixture(scope="module")
def model(original: Any) -> Any:
    return linearize(copy.deepcopy(original), **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", sorted(mechanisms.available()))
def test_every_mechanism_gives_each_document_what_it_gets_alone(mechanism: str, causal: bool) -> None:
    spec = SiteSpec(4, 2, 8, 8, causal)
    if mechanisms.get(mechanism).refusal(spec) is not None:
        pytest.skip("not for such a site")
    options = {"window": 4} if "window" in mechanisms.get(mechanism).options else {}
    torch.manual_seed(0)
    child: Any = build_attention(
        spec, LinearizeConfig(mechanism=mechanism, group_size=4, options=options)
    ).double()
    query, key, value = (torch.randn(2, h, 17, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))
    interleaved = torch.tensor([1, 2, 1, 2, 2, 3, 3, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2])
    documents = torch.stack([numbers, interleaved])
    out = attend_documents(lambda q, k, v, real: child(q, k, v, key_mask=real), query, key, value, documents)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))

    assert not out[1, :, documents[1] == 0].any()
    for row in (0, 1):
        for number in range(1, int(documents[row].max()) + 1):
            (at,) = (documents[row] == number).nonzero(as_tuple=True)
            alone = [x[row : row + 1, :, at].detach().requires_grad_() for x in (query, key, value)]
            expected = child(*alone)
            torch.testing.assert_close(out[row : row + 1, :, at], expected)
            for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
                torch.testing.assert_close(grad[row : row + 1, :, at], wanted)


def alone(original: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([original(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)


def test_packed_rows_give_each_document_what_it_gets_alone(model: Any, original: Any) -> None:
    ids = tokens(2, sum(LENGTHS))
    packed = model(ids, position_ids=torch.cat([positions(), positions((4, 13))]), use_cache=False).logits
    for row, lengths in enumerate([LENGTHS, (4, 13)]):
        wanted = alone(original, ids[row : row + 1], lengths)
        torch.testing.assert_close(packed[row : row + 1], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_training_on_a_flattened_batch_is_training_on_its_documents(name: str, flash: bool) -> None:
    model: Any = converted(name).train()
    documents = [row.tolist() for row in tokens(1, sum(LENGTHS))[0].split(LENGTHS)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_tensors="pt")
    batch = collate([{"input_ids": document} for document in documents])
    # With a cache a model itself sees no documents in position ids, only in what the collator adds, and
    # where it does not dispatch, not even there.
    model(**batch, use_cache=flash and name == "llama").loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = sum(len(document) - 1 for document in documents)
    for document in documents:
        ids = torch.tensor([document])
        if len(document) > 1:
            (model(ids, labels=ids, use_cache=False).loss * (len(document) - 1) / count).backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_square_masks_of_documents_are_followed(
    model: Any, original: Any, additive: bool, use_cache: bool
) -> None:
    ids = tokens(1, 17)
    number = of_lengths(torch.tensor([0, *LENGTHS]).cumsum(0), 17)
    keep = (number[:, :, None] == number[:, None, :]).tril()[:, None]
    mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min) if additive else keep
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=use_cache)
        wanted = original(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-4)
    if use_cache:
        with pytest.raises(InputError, match="several documents"), torch.no_grad():
            model(ids[:, :1], past_key_values=out.past_key_values)


def test_documents_of_a_square_mask_with_padding_inside_and_at_the_ends() -> None:
    number = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 0]])
    real = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    seen = ((number[:, :, None] == number[:, None, :]) & real[:, None, :]).tril()[:, None]
    assert of_square(seen, real, windowed=True).tolist() == [[0, 0, 1, -1, 1, 2, 2, -2, 0]]
    # Without a window the first real token names its document.
    assert of_square(seen, real, windowed=False).tolist() == [[0, 0, 3, -3, 3, 6, 6, -6, 0]]


def test_a_document_after_a_cached_prompt_is_refused(model: Any) -> None:
    ids = tokens(1, 8)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        ends = torch.tensor([0, 3, 8])
        with pytest.raises(InputError, match="cannot continue a cache"):
            model(ids, past_key_values=cache, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("door", ["compile", "export"])
def test_in_a_graph_documents_are_refused_and_one_document_runs(model: Any, original: Any, door: str) -> None:
    def forward(ids: Tensor, position_ids: Tensor) -> Tensor:
        return model(ids, position_ids=position_ids, use_cache=False).logits

    ids, one, packed = tokens(1, 17), torch.arange(17)[None], positions()
    with torch.no_grad():
        if door == "compile":
            torch._dynamo.reset()
            run: Any = torch.compile(forward, backend="eager", fullgraph=True)
        else:
            run = torch.export.export(Called(model), (ids, one), strict=False).module()
        torch.testing.assert_close(run(ids, one), original(ids).logits, atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="packed documents"):
            run(ids, packed)


class Called(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(ids, position_ids=position_ids, use_cache=False).logits


def test_a_mask_function_of_someone_elses_is_made_a_square_and_compared(model: Any) -> None:
    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) | (key < 3)

    mask = compact_mask(1, 6, 6, mask_function=prefix)
    assert mask is not None and mask.shape == (1, 1, 6, 6)
    with pytest.raises(InputError, match="not a causal mask"):
        model(tokens(1, 6), attention_mask=mask, use_cache=False)


def test_a_long_row_is_not_padded_to_its_longest_document() -> None:
    """A document of 400 among a hundred of 3 would make a batch of 40,000 tokens of 700."""
    numbers = torch.repeat_interleave(torch.arange(1, 102), torch.tensor([400] + [3] * 100))[None]
    assert sum(group.tokens.numel() for group in grouped(numbers)) <= 2 * 700
