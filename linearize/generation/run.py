"""Text from a prompt, with what it took: time, forward passes, and memory beside that of a KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from ..cache.state_layer import StateLayer
from ..errors import ConfigError, InputError, InvalidModelError
from .speculative import Drafter, DraftModel, Medusa, MedusaHeads, PromptLookup, TreeSpeculation, fit_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..planning.state import LinearizeState

DRAFTERS = ("medusa", "draft", "lookup")
LONG = 65_536
"""The length at which memory is told beside that at the length that was reached."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one cache layer at any length. fixed: whatever the length. per_token: for each token held.
    window: most tokens that are held, None for all."""

    fixed: int = 0
    per_token: int = 0
    window: int | None = None

    def at(self, length: int) -> int:
        return self.fixed + self.per_token * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class Memory:
    """A cache as it is, and as it would be with keys and values in every layer that has a state."""

    held: tuple[LayerMemory, ...]
    softmax: tuple[LayerMemory, ...]

    def at(self, length: int) -> int:
        return sum(layer.at(length) for layer in self.held)

    def softmax_at(self, length: int) -> int:
        return sum(layer.at(length) for layer in self.softmax)


@dataclass(frozen=True)
class Run:
    """What one generation took.

    tokens: new ones. prompt: tokens of the prompt. seconds: of everything. first: seconds until the first
    token. passes: forward passes after the prompt's own. acceptance: share of the drafted depth that was
    kept, None without drafts. memory: of the cache at the end.
    """

    tokens: int
    prompt: int
    seconds: float
    first: float
    passes: int
    acceptance: float | None
    memory: Memory

    @property
    def length(self) -> int:
        return self.prompt + self.tokens

    @property
    def tokens_per_second(self) -> float:
        """Without the prompt's pass, which gives the first token; of all of it when there is no other."""
        if self.tokens > 1:
            return (self.tokens - 1) / max(self.seconds - self.first, 1e-9)
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_pass(self) -> float:
        return (self.tokens - 1) / self.passes if self.passes else 1.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    speculation: TreeSpeculation | None = None,
    write: Callable[[str], object] | None = None,
) -> Run:
    """Continue `prompt`, giving the text to `write` as it comes; nothing of the prompt is written.

    temperature: 0 takes the likeliest token; anything else samples, from the smallest set of tokens whose
    probabilities sum to `top_p`, from `seed`. Raises InputError for a prompt or setting that makes no sense.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            "max_new_tokens is at least 1, temperature at least 0, and top_p more than 0 and at most 1; "
            f"got {max_new_tokens}, {temperature:g} and {top_p:g}"
        )
    if top_p < 1 and not temperature:
        raise ConfigError("top_p chooses what is sampled from: give a temperature above 0 with it")
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not prompt or not ids.numel():
        raise InputError("the prompt is empty: give some text to continue")
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())} and the model has {rows}: it is another model's"
        )
    options: dict[str, Any] = dict(do_sample=bool(temperature), num_beams=1)
    if temperature:
        options |= dict(temperature=temperature, top_p=top_p, top_k=0)
        torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stream = _Stream(tokenizer, write or (lambda text: None))
    if speculation is not None:
        # transformers streams the prompt, and gives a callable no streamer for what it generates.
        options["custom_generate"] = partial(speculation, streamer=stream)
    began = time.perf_counter()
    out: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        return_dict_in_generate=True,
        streamer=stream,
        **options,
    )
    seconds = time.perf_counter() - began
    tokens = out.sequences.shape[1] - ids.shape[1]
    return Run(
        tokens=tokens,
        prompt=ids.shape[1],
        seconds=seconds,
        first=(stream.first or began) - began,
        passes=tokens - 1 if speculation is None else speculation.passes,
        acceptance=None if speculation is None else speculation.acceptance,
        memory=memory_of(model, out.past_key_values),
    )


def check_decoder(model: PreTrainedModel, name: str) -> None:
    """Raise InvalidModelError unless `model` continues text: a decoder with an output layer."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InvalidModelError(
            f"{name} holds a {type(model).__name__}, which continues no text: give a whole decoder"
        )


def speculation_of(
    kind: str,
    model: PreTrainedModel,
    *,
    heads: Path | None = None,
    draft: PreTrainedModel | None = None,
    nodes: int | None = None,
) -> TreeSpeculation:
    """Speculation by the name of its drafter: "medusa" (heads: their folder), "draft" (draft: the small
    model), "lookup", or several whose drafts are tried together, such as "medusa+lookup". nodes: most tokens
    that each drafts per pass, the drafter's own choice by default.

    Raises ConfigError for another name, or what the drafter needs and was not given; CheckpointError or
    InputError for heads that cannot be read or are another model's.
    """
    if nodes is not None and nodes < 1:
        raise ConfigError(f"at least one token is drafted per pass, got nodes={nodes}")
    drafters = [_drafter(name, model, heads, draft, nodes) for name in kind.split("+")]
    return TreeSpeculation(drafters[0] if len(drafters) == 1 else drafters)


def _drafter(
    name: str,
    model: PreTrainedModel,
    heads: Path | None,
    draft: PreTrainedModel | None,
    nodes: int | None,
) -> Drafter:
    if name not in DRAFTERS:
        raise ConfigError(f"unknown drafter {name!r}; the drafters are {', '.join(DRAFTERS)}")
    if name == "lookup":
        if nodes is None:
            return PromptLookup()
        depth = min(nodes, PromptLookup.depth)
        return PromptLookup(depth=depth, branches=nodes // depth)
    if name == "draft":
        if draft is None:
            raise ConfigError("drafts of a small model need its folder: --draft DIR")
        return DraftModel(draft) if nodes is None else DraftModel(draft, depth=nodes)
    if heads is None:
        raise ConfigError("Medusa drafts need a folder with trained heads: --heads DIR")
    trained = MedusaHeads.load(heads, model)
    return Medusa(trained, None if nodes is None or trained.rates is None else fit_tree(trained.rates, nodes))


def memory_of(model: Any, cache: Any) -> Memory:
    """What a filled transformers cache of one sequence holds, layer by layer, at any length."""
    converted: LinearizeState | None = getattr(model, "_linearize", None)
    specs = {} if converted is None else {site.layer_index: site.spec for site in converted.plan.sites}
    held, softmax = [], []
    for index, layer in enumerate(cache.layers):
        here = _layer_memory(layer)
        held.append(here)
        if isinstance(layer, StateLayer) and index in specs:
            spec = specs[index]
            numbers = spec.num_key_value_heads * (spec.head_dim + spec.value_dim)
            here = LayerMemory(per_token=numbers * layer.dtype.itemsize, window=spec.window)
        softmax.append(here)
    return Memory(tuple(held), tuple(softmax))


def _layer_memory(layer: Any) -> LayerMemory:
    if isinstance(layer, StateLayer):
        return LayerMemory(fixed=0 if layer.states is None else layer.states.nbytes)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        row = (keys[:, :, :1].nbytes, values[:, :, :1].nbytes)
        return LayerMemory(per_token=sum(row), window=getattr(layer, "sliding_window", None))
    # Recurrent layers of other kinds keep tensors by name, whatever the length.
    found: list[Any] = list(vars(layer).values())
    inner = [x for item in found if isinstance(item, dict) for x in item.values()]
    return LayerMemory(fixed=sum(x.nbytes for x in (*found, *inner) if isinstance(x, Tensor)))


class _Stream(TextStreamer):
    """Text in whole words to a function. first: when the first token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None
        self._write = write
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self.first is None and not self._prompt:
            self.first = time.perf_counter()
        self._prompt = False
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
