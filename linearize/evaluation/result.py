"""The result of an evaluation: data, JSON, a table; and how a converted model carries it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..errors import InputError
from ..planning.state import carry, state_of
from .figures import Figures, Row

if TYPE_CHECKING:
    import os

VERSION = 1
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = ("decoder", "encoder-decoder", "encoder")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, in order of length.

    kind: "decoder", "encoder-decoder" or "encoder". name: of the data, as given. model, reference: what they
    are. setting: dtype, device and threads of the run. weights: fingerprint of the weights that were
    measured.
    """

    kind: str
    name: str
    model: str
    reference: str | None
    rows: tuple[Row, ...]
    setting: str
    weights: str

    def at(self, length: int | None) -> Row:
        """The row of one length. Raises InputError, naming those there are."""
        for row in self.rows:
            if row.length == length:
                return row
        raise InputError(f"nothing was measured at {length} tokens, but at {[r.length for r in self.rows]}")

    @property
    def scored(self) -> str:
        """What the figures are of, in one sentence."""
        if self.kind == "encoder":
            return (
                "Embeddings are means over the tokens of a text; the rank correlation is Spearman's, over "
                "the similarities of all pairs of texts."
            )
        if self.kind == "encoder-decoder":
            return "Scored is every label that is not -100."
        return (
            "Windows of a length follow each other without overlap and each is read on its own; scored are "
            "the same tokens at every length, which leaves out those that begin a window of any."
        )

    def attach(self, model: nn.Module) -> None:
        """Let the converted `model` carry these figures: they go into its checkpoints and model card.

        They take the place of earlier ones by the same `name`, and of all that were measured on other
        weights. Raises InvalidModelError when it is not converted, InputError when its weights have changed
        since they were measured.
        """

        attach(self, model)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "version": VERSION,
            **dataclasses.asdict(self),
            "rows": [dataclasses.asdict(r) for r in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Inverse of `to_dict`. Raises InputError for anything else."""
        try:
            fields = dict(data)
            version = fields.pop("version")
            if version != VERSION:
                raise InputError(f"this evaluation has version {version!r}; this release reads {VERSION}")
            if fields["kind"] not in KINDS:
                raise ValueError(f"kind is one of {', '.join(KINDS)}, got {fields['kind']!r}")
            return cls(**{**fields, "rows": tuple(_row(row) for row in fields["rows"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"this is no record of an evaluation: {error}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw perplexity, time and memory against length to an image file, original and model.

        The suffix says the format: .png, .svg or .pdf. The file appears whole or not at all.
        Raises MissingExtraError without matplotlib, InputError when there are no two lengths or the suffix is
        unknown, CheckpointError when the file cannot be written.
        """
        from .plot import plot

        plot(self.rows, self.model, self.reference, path)

    def table(self) -> list[list[str]]:
        """Cells of a table, headings first, one line per length and model; no column is empty."""
        lines = [
            (row, who, figures, first)
            for row in self.rows
            for who, figures, first in _sides(row, self.model, self.reference)
        ]
        columns = [["length"], ["tokens"], ["model"], *([heading] for heading, _, _ in (*_FIGURES, *_ROW))]
        for row, who, figures, first in lines:
            length = "as given" if row.length is None else f"{row.length:,}"
            cells = [length, f"{row.tokens:,}"] if first else ["", ""]
            cells += [who, *(_text(getattr(figures, field), form) for _, field, form in _FIGURES)]
            # What compares the two stands beside the model, not beside the original.
            compared = figures is row.model
            cells += [_text(getattr(row, field) if compared else None, form) for _, field, form in _ROW]
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
        return [list(line) for line in zip(*(c for c in columns if any(c[1:])), strict=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headings, *lines = self.table()
        table = Table(*headings)
        for line in lines:
            table.add_row(*line)
        if self.name:
            yield Text(self.name)
        yield table
        yield f"{self.scored} Measured in {self.setting}."


_FIGURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("forward tokens/s", "forward_tokens_per_second", "{:,.0f}"),
    ("decode tokens/s", "decode_tokens_per_second", "{:,.1f}"),
    ("cache bytes", "cache_bytes", "{:,}"),
)
_ROW = (
    ("agreement", "agreement", "{:.1%}"),
    ("KL", "kl", "{:.4f}"),
    ("cosine", "cosine", "{:.4f}"),
    ("rank correlation", "spearman", "{:.4f}"),
)


def _sides(row: Row, model: str, reference: str | None) -> list[tuple[str, Figures, bool]]:
    """Name and figures of each model, and whether it is the first of its row."""
    if row.reference is None:
        return [(model, row.model, True)]
    return [(f"{reference}, original", row.reference, True), (model, row.model, False)]


def _text(value: float | int | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _row(data: Mapping[str, Any]) -> Row:
    fields = dict(data)
    reference = fields.pop("reference")
    return Row(
        **{**fields, "model": Figures(**fields["model"])},
        reference=None if reference is None else Figures(**reference),
    )


def describe(model: nn.Module) -> str:
    """Class and mechanism, such as `LlamaForCausalLM, softmax_window`."""
    state = getattr(model, "_linearize", None)
    name = type(model).__name__
    return f"{name}, softmax" if state is None else f"{name}, {state.config.mechanism}"


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights and their names, in whatever order or on whatever device they are summed."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(_row_sums(tensor).numpy().tobytes())
    return found.hexdigest()[:16]


def _row_sums(tensor: Tensor) -> Tensor:
    """Sums of each row's bits, read as integers: int64 `[rows]`. Exact, so the order of summing is free."""
    flat = tensor.detach().contiguous()
    flat = flat.reshape(flat.shape[0] if flat.dim() > 1 else 1, -1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.int8)
    return flat.view(_BITS[flat.element_size()]).sum(1, dtype=torch.int64).cpu()


def attach(evaluation: Evaluation, model: nn.Module) -> None:
    """See `Evaluation.attach`."""
    if evaluation.weights != fingerprint(model):
        raise InputError("the weights are not those that were measured: evaluate the model again")
    others = [found for found in measured(model) if found.name != evaluation.name]
    carry(model, [found.to_dict() for found in (*others, evaluation)])


def measured(model: nn.Module) -> list[Evaluation]:
    """The evaluations that a converted model carries, as far as they are of its present weights and can be
    read."""
    records = state_of(model).measured
    if not records:
        return []
    weights = fingerprint(model)
    found = []
    for record in records:
        # One that another release wrote is no reason to lose a checkpoint.
        with suppress(InputError):
            found.append(Evaluation.from_dict(record))
    return [evaluation for evaluation in found if evaluation.weights == weights]
