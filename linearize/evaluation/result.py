"""The figures of an evaluation: data, JSON, a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..errors import InputError

if TYPE_CHECKING:
    import os

    from torch import nn

VERSION = 1
KINDS = ("decoder", "encoder-decoder", "encoder")


@dataclass(frozen=True)
class Figures:
    """Of one model at one length; None where it does not apply or was not measured.

    perplexity: exp of the mean negative log-likelihood of the scored tokens. forward_tokens_per_second: of
    one pass over `length` tokens, without a cache, all logits computed. decode_tokens_per_second: greedy, one
    token at a time, up to `length`. cache_bytes: what the cache of one sequence of `length` tokens holds.
    """

    perplexity: float | None = None
    forward_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """What was measured at one length.

    length: tokens of a window, or that texts are cut to; None where batches came as they are. tokens: how
    many were scored. agreement: share of these at which both models' likeliest token is the same. kl: mean
    KL(reference || model) in nats. cosine: mean cosine of both models' embeddings of a text. spearman: rank
    correlation of the similarities of all pairs of texts, None where all are the same.
    """

    length: int | None
    tokens: int
    model: Figures
    reference: Figures | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    spearman: float | None = None


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
        from .record import attach

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

        plot(self, path)

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
