"""What an entry of the zoo is, and the parts that entries share: configs, weights, token inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TRACED = (2, 12)
"""(batch, length in tokens) of the example that is captured."""
OTHERS = ((3, 9), (4, 17))
"""Sizes that are not traced; a window of 4 tokens is narrower than every length."""

VOCAB = 64
SEED = 7
BOTH = ("eager", "sdpa")
EAGER = ("eager",)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)
IDS = {k: TEXT[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache")}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}

CAUSAL = {"causal": 2}
WINDOW = {"window(4)": 2}
FULL = {"full": 2}
ALTERNATE = ["sliding_attention", "full_attention"]
CONTENT = {"other+bias": 2}  # the bias is computed from the tokens: no mask class can be read off it

Inputs = dict[str, Tensor]
MakeInputs = Callable[["Entry", int, int, bool], Inputs]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    name: unique. kind: decoder, encoder, encoder-decoder, vision, audio or multimodal. model_type: key of the
    config class. auto: the class that builds the model. sites: mask label without its padding part -> number
    of attention calls. inputs_of: makes keyword inputs for (batch, length, padded). implementations: those
    that transformers has. paddable: takes a padding mask. resizable: length changes the inputs.
    refused: reason code -> number of refusals ("capture" where the whole model is beyond torch.export);
    why: one sentence on them. slow: not among the models that the default test run builds.
    padding_reaches: sites whose mask depends on the padding mask, where `padded` guesses wrong.
    masked_sites: `sites` where the graph is captured with a padding mask, if that changes them.
    """

    name: str
    kind: str
    model_type: str
    config: Mapping[str, Any]
    sites: Mapping[str, int]
    inputs_of: MakeInputs
    auto: str = "AutoModel"
    implementations: tuple[str, ...] = BOTH
    paddable: bool = True
    resizable: bool = True
    refused: Mapping[str, int] = field(default_factory=dict)
    why: str = ""
    slow: bool = False
    padding_reaches: int | None = None
    masked_sites: Mapping[str, int] | None = None

    def build(self, attn_implementation: str) -> nn.Module:
        """The model in eval mode, float32, with the same weights for every implementation."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        torch.manual_seed(SEED)
        # AutoModel does not know every config class; where it does not, `auto` names the class itself.
        cls = getattr(transformers, self.auto)
        if self.auto.startswith("Auto"):
            model = cls.from_config(config, attn_implementation=attn_implementation)
        else:
            model = cls._from_config(config, attn_implementation=attn_implementation)
        randomise(model)
        return model.eval()

    def inputs(self, batch: int, length: int, padded: bool = False) -> Inputs:
        """Keyword inputs of `length` tokens; `padded` adds a mask that switches keys off on both sides."""
        return self.inputs_of(self, batch, length, padded)

    def expected(self, masked: bool) -> Mapping[str, int]:
        """Mask label -> attention calls, in a graph captured with or without a padding mask."""
        return self.masked_sites if masked and self.masked_sites is not None else self.sites

    @property
    def total(self) -> int:
        """Attention calls."""
        return sum(self.sites.values())

    @property
    def padded(self) -> int:
        """Attention calls whose mask depends on the padding mask; decoder tokens are never padded here."""
        if self.padding_reaches is not None:
            return self.padding_reaches
        if self.kind == "encoder-decoder":
            return sum(n for label, n in self.sites.items() if not label.startswith(("causal", "window")))
        return self.total


def randomise(model: nn.Module) -> None:
    """Weights of std 0.3, biases and gains of std 0.1 around their initial value."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)


def padding_mask(batch: int, length: int) -> Tensor:
    """[B, T] of 0 and 1: the first row whole, then in turn two tokens off on the left, three on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, :2] = 0
    mask[2::2, -3:] = 0
    return mask


def ids(batch: int, length: int, seed: int = SEED) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def tokens(entry: Entry, batch: int, length: int, padded: bool) -> Inputs:
    inputs = {"input_ids": ids(batch, length)}
    if padded:
        inputs["attention_mask"] = padding_mask(batch, length)
    return inputs


def make_entry(
    kind: str, name: str, sites: Mapping[str, int], model_type: str, config: dict[str, Any], **options: Any
) -> Entry:
    """An entry whose `config` may also hold entry fields (`slow=True`), which win over `options`."""
    own = {k: config.pop(k) for k in list(config) if k in Entry.__dataclass_fields__}
    return Entry(name, kind, model_type or name, config, sites, **{**options, **own})


def slow(*entries: Entry) -> tuple[Entry, ...]:
    return tuple(replace(entry, slow=True) for entry in entries)
