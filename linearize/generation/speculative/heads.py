"""Medusa heads: small networks on a frozen decoder that guess several tokens ahead at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.files import read_json, shown
from ...common.replacing import Layout, finish_killed, is_inside, whole_checkpoint
from ...common.schema import FLAG, OBJECT, Rule, check_entries, number, optional, several, whole
from ...errors import CheckpointError, ConfigError, InputError
from .drafter import output_layer

HEADS = Layout("medusa_heads.json", "weights", "medusa_heads.safetensors")
_VERSION = 1


class MedusaHeads(nn.Module):
    """Medusa heads: each guesses one of the tokens after the next one (Cai et al., arXiv 2401.10774).

    Let h be the hidden state from which the model's output layer chose the token x. Head k guesses the k-th
    token after x by `output_layer(h + silu(W_k [h; e(x)] + b_k))`, where `e(x)` is the model's embedding of
    x. (Medusa's own heads use h alone: `sees_token=False`.) W and b are zero at first, so untrained heads
    repeat the model's own logits.

    Args:
        model: The decoder that the heads belong to. Its layers are used but never changed, and are not part
            of this module, whose parameters are the heads' alone.
        num_heads: How many heads there are, and so how many tokens ahead they guess.
        sees_token: Whether heads use `e(x)`.
        own_layers: Whether each head has an output layer of its own, at first a copy of the model's
            (Medusa-1). Otherwise heads use the model's, which takes no memory.

    Attributes:
        rates: `rates[k][r]` is how often the guess of rank r by head k is right; None until measured, see
            `acceptance`.

    Raises:
        ConfigError: `num_heads` is below 1.
        InputError: The model has no output layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    output: nn.Parameter | None

    def __init__(
        self, model: Any, num_heads: int = 4, sees_token: bool = True, own_layers: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ConfigError(f"there must be at least one head, got num_heads={num_heads}")
        layer = output_layer(model)
        vocabulary, hidden = layer.weight.shape
        self.num_heads, self.sees_token, self.own_layers = num_heads, sees_token, own_layers
        self.fingerprint = {"hidden_size": hidden, "vocabulary": vocabulary}
        self.rates: list[list[float]] | None = None
        # In a tuple, so that the layers are not child modules.
        self._base = (layer, model.get_input_embeddings())
        place = dict(dtype=layer.weight.dtype, device=layer.weight.device)
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden, hidden * (2 if sees_token else 1), **place))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, hidden, **place))
        copies = layer.weight.detach().clone().expand(num_heads, -1, -1).clone() if own_layers else None
        self.output = None if copies is None else nn.Parameter(copies)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Guess ahead.

        Args:
            hidden: `[N, hidden_size]`, the hidden states.
            tokens: int64 `[N]`, the token that was chosen from each.

        Returns:
            Logits `[num_heads, N, vocabulary]` in the dtype of the heads.
        """
        layer, embedding = self._base
        hidden = hidden.to(self.weight.dtype)
        seen = hidden
        if self.sees_token:
            seen = torch.cat([hidden, _frozen(embedding, tokens).to(hidden.dtype)], -1)
        states = hidden + F.silu(
            torch.baddbmm(self.bias, seen.expand(self.num_heads, -1, -1), self.weight.mT)
        )
        if self.output is not None:
            return states @ self.output.mT
        return _frozen(layer, states.to(layer.weight.dtype))

    def check(self, model: Any) -> None:
        """Raise InputError if the heads were made for a model of other sizes."""
        vocabulary, hidden = output_layer(model).weight.shape
        found = {"hidden_size": hidden, "vocabulary": vocabulary}
        if found != self.fingerprint:
            raise InputError(
                f"these heads were trained on a model with {_sizes(self.fingerprint)}, and this one has "
                f"{_sizes(found)}; train heads for it with train_heads"
            )

    def save(self, folder: str | Path) -> None:
        """Write the heads to a folder, as `medusa_heads.safetensors` and `medusa_heads.json`.

        Files of the same names are only replaced once both new files are complete.

        Args:
            folder: Any folder, such as the model's own; created if it does not exist.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        about = {
            "version": _VERSION,
            "num_heads": self.num_heads,
            "sees_token": self.sees_token,
            "own_layers": self.own_layers,
            "model": self.fingerprint,
            "rates": self.rates,
        }
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        with whole_checkpoint(folder, HEADS) as scratch:
            save_file(tensors, scratch / HEADS.weights)
            (scratch / HEADS.record).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: Any) -> MedusaHeads:
        """Load heads that `save` wrote.

        Args:
            folder: The folder.
            model: The model that the heads were trained on.

        Raises:
            CheckpointError: The folder has no heads, or they cannot be read.
            InputError: The heads were trained on a model of other sizes.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        finish_killed(folder, HEADS)
        if not os.path.isfile(folder / HEADS.record):
            raise CheckpointError(
                f"no heads in {shown(folder)} ({HEADS.record} and {HEADS.weights}); "
                "`linearize train-heads` makes them"
            )
        try:
            about = _checked(read_json(folder / HEADS.record), folder / HEADS.record)
            tensors = load_file(folder / about.get(HEADS.key, HEADS.weights))
            heads = cls(model, about["num_heads"], about["sees_token"], about["own_layers"])
            heads.fingerprint, heads.rates = about["model"], about["rates"]
            heads.check(model)
            heads.load_state_dict(tensors)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"the heads in {shown(folder)} cannot be used: {error}") from error
        return heads.eval()

    def acceptance(self, model: Any, tokens: Any, ranks: int = 10) -> list[list[float]]:
        """Measure how often guesses are right, and store the result as `rates`.

        A guess is right if it is the model's own greedy choice. Counted are the places where the text is what
        the model would have chosen, and where all earlier heads have the right token among their first
        `ranks` guesses.

        Args:
            model: The model that the heads were trained on.
            tokens: int64 `[n]` or `[B, n]`, or a list of these; text that the heads were not trained on.
            ranks: How many guesses of each head are counted.

        Returns:
            `rates[k][r]`, the share of right guesses of head k at rank r.

        Raises:
            InputError: There are fewer tokens than the heads look ahead.
        """
        from .rates import acceptance_rates

        self.rates = acceptance_rates(self, model, tokens, ranks)
        return self.rates

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, {_sizes(self.fingerprint)}"


def _frozen(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The output of one of the model's own layers, without gradients for its parameters."""
    if not torch.is_grad_enabled():
        return layer(inputs)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return torch.func.functional_call(layer, parameters, (inputs,))


def _sizes(fingerprint: dict[str, int]) -> str:
    return f"hidden size {fingerprint.get('hidden_size')} and {fingerprint.get('vocabulary')} tokens"


_SIZES = {"hidden_size": whole(1, 2**30), "vocabulary": whole(1, 2**30)}
_SHARES = several(several(number(0, 1)))
_RULES: Mapping[str, Rule] = {
    "version": whole(1, _VERSION),
    "num_heads": whole(1, 1000),
    "sees_token": FLAG,
    "own_layers": FLAG,
    "model": OBJECT,
    "rates": optional(_SHARES),
    HEADS.key: (lambda x: isinstance(x, str) and is_inside(x), "a file in the folder"),
}


def _checked(about: Any, file: Path) -> Mapping[str, Any]:
    """The record of heads. Raises CheckpointError for one of another form."""
    where = shown(file)
    version = about.get("version") if isinstance(about, dict) else None
    if type(version) is int and version > _VERSION:
        raise CheckpointError(f"{where} was written by a newer release of linearize: install that")
    check_entries(about, where, _RULES, [name for name in _RULES if name != HEADS.key])
    check_entries(about["model"], f"{where}: model", _SIZES, list(_SIZES))
    if about["rates"] is not None and len(about["rates"]) != about["num_heads"]:
        raise CheckpointError(f"{where} has rates of another number of heads")
    return about
