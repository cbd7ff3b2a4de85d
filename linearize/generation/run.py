"""Generating text from a prompt, and what that took: time, forward passes, and memory of the cache."""

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
from ..common.checks import unknown
from ..common.running import vocabulary_size
from ..errors import ConfigError, InputError, InvalidModelError
from .speculative import Drafter, DraftModel, Medusa, MedusaHeads, PromptLookup, TreeSpeculation, fit_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..planning.state import LinearizeState

DRAFTERS = ("medusa", "draft", "lookup")
LONG = 65_536
"""Memory is shown at this length too, besides the length that was reached."""


@dataclass(frozen=True)
class LayerMemory:
    """The memory of one cache layer at any length.

    Attributes:
        fixed: Bytes at every length.
        per_token: Further bytes for each token that the layer holds.
        window: How many tokens it holds at most; None for all.
    """

    fixed: int = 0
    per_token: int = 0
    window: int | None = None

    def at(self, length: int) -> int:
        """Bytes at `length` tokens."""
        return self.fixed + self.per_token * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class Memory:
    """The memory of a cache, and of one with keys and values in all layers instead of states.

    Attributes:
        held: The layers of the cache.
        softmax: The layers of the other.
    """

    held: tuple[LayerMemory, ...]
    softmax: tuple[LayerMemory, ...]

    def at(self, length: int) -> int:
        """Bytes of the cache at `length` tokens."""
        return sum(layer.at(length) for layer in self.held)

    def softmax_at(self, length: int) -> int:
        """Bytes of a cache with keys and values in all layers at `length` tokens."""
        return sum(layer.at(length) for layer in self.softmax)


@dataclass(frozen=True)
class GenerationStats:
    """What one generation took.

    Attributes:
        tokens: How many tokens were generated.
        prompt: Tokens of the prompt.
        seconds: The time of everything.
        first: Seconds until the first token.
        passes: Forward passes after the prompt's own.
        acceptance: The share of the drafted depth that was accepted; None without speculation.
        memory: The memory of the cache at the end.
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
        """Tokens of the prompt and of the continuation."""
        return self.prompt + self.tokens

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token, which the prompt's pass gives; over everything for one token."""
        if self.tokens > 1:
            return (self.tokens - 1) / max(self.seconds - self.first, 1e-9)
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per forward pass after the prompt's; 1 without speculation."""
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
) -> GenerationStats:
    """Continue a prompt.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        prompt: The text to continue.
        max_new_tokens: How many tokens to generate at most.
        temperature: 0 takes the likeliest token; otherwise tokens are sampled at this temperature.
        top_p: Sample from the smallest set of tokens whose probabilities sum to this.
        seed: Seed of the sampling.
        speculation: Generate with draft trees.
        write: Gets the continuation as it comes, without the prompt.

    Returns:
        Time, passes and memory.

    Raises:
        ConfigError: A setting is out of range.
        InputError: The prompt is empty, or the tokenizer is another model's.
    """
    _check_sampling(max_new_tokens, temperature, top_p)
    ids = _prompt(model, tokenizer, prompt)
    options: dict[str, Any] = dict(do_sample=bool(temperature), num_beams=1)
    if temperature:
        options |= dict(temperature=temperature, top_p=top_p, top_k=0)
        torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stream = _Stream(tokenizer, write or (lambda text: None))
    if speculation is not None:
        # transformers streams the prompt itself, and gives a callable no streamer.
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
    return GenerationStats(
        tokens=tokens,
        prompt=ids.shape[1],
        seconds=seconds,
        first=(stream.first or began) - began,
        passes=tokens - 1 if speculation is None else speculation.passes,
        acceptance=None if speculation is None else speculation.acceptance,
        memory=memory_of(model, out.past_key_values),
    )


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ConfigError for settings of `generate` that make no sense."""
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            "max_new_tokens must be at least 1, temperature at least 0, and top_p above 0 and at most 1; "
            f"got {max_new_tokens}, {temperature:g} and {top_p:g}"
        )
    if top_p < 1 and not temperature:
        raise ConfigError("top_p limits what is sampled from: give a temperature above 0 with it")


def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids int64 `[1, n]` of a prompt, on the model's device. Raises InputError for a bad prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not prompt or not ids.numel():
        raise InputError("the prompt is empty: give some text to continue")
    size = vocabulary_size(model)
    if size is not None and int(ids.max()) >= size:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {size}: it is another model's"
        )
    return ids


def check_decoder(model: PreTrainedModel, name: str) -> None:
    """Raise InvalidModelError unless `model` can continue text: a decoder with an output layer."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InvalidModelError(
            f"{name} has a {type(model).__name__}, which cannot continue text: give a whole decoder"
        )


def speculation_of(
    kind: str,
    model: PreTrainedModel,
    *,
    heads: Path | None = None,
    draft: PreTrainedModel | None = None,
    nodes: int | None = None,
) -> TreeSpeculation:
    """Make tree speculation from the name of its drafter.

    Args:
        kind: "medusa", "draft", "lookup", or several whose drafts are joined, such as "medusa+lookup".
        model: The model that generates.
        heads: The folder of Medusa heads, for "medusa".
        draft: The small model, for "draft".
        nodes: How many tokens each drafter drafts per pass at most; by default its own number.

    Raises:
        ConfigError: The name is unknown, or something that the drafter needs is missing.
        CheckpointError: The heads cannot be read.
        InputError: The heads are another model's.
    """
    if nodes is not None and nodes < 1:
        raise ConfigError(f"at least one token must be drafted per pass, got nodes={nodes}")
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
        raise ConfigError(unknown("drafter", name, DRAFTERS), "speculative")
    if name == "lookup":
        if nodes is None:
            return PromptLookup()
        depth = min(nodes, PromptLookup.depth)
        return PromptLookup(depth=depth, branches=nodes // depth)
    if name == "draft":
        if draft is None:
            raise ConfigError("drafting with a small model needs its folder: --draft DIR")
        return DraftModel(draft) if nodes is None else DraftModel(draft, depth=nodes)
    if heads is None:
        raise ConfigError("drafting with Medusa heads needs their folder: --heads DIR")
    trained = MedusaHeads.load(heads, model)
    return Medusa(trained, None if nodes is None or trained.rates is None else fit_tree(trained.rates, nodes))


def memory_of(model: Any, cache: Any) -> Memory:
    """The memory, at any length, of a transformers cache that was filled by one sequence."""
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
        return LayerMemory(fixed=layer.nbytes)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        row = (keys[:, :, :1].nbytes, values[:, :, :1].nbytes)
        return LayerMemory(per_token=sum(row), window=getattr(layer, "sliding_window", None))
    # Recurrent layers of other kinds hold tensors as attributes, of the same size at every length.
    found: list[Any] = list(vars(layer).values())
    inner = [x for item in found if isinstance(item, dict) for x in item.values()]
    return LayerMemory(fixed=sum(x.nbytes for x in (*found, *inner) if isinstance(x, Tensor)))


class _Stream(TextStreamer):
    """Gives text in whole words to a function. first: the time when the first token came."""

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
