"""The result of an evaluation: as data, JSON and a table, and stored in a converted model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.tables import Grid, Printed
from ..errors import InputError
from ..planning.state import carry, state_of
from .figures import Figures, Measurement

if TYPE_CHECKING:
    import os

VERSION = 1
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = ("decoder", "encoder-decoder", "encoder")


@dataclass(frozen=True)
class Evaluation(Printed):
    """The result of `evaluate`. It prints as a table.

    Attributes:
        kind: "decoder", "encoder-decoder" or "encoder".
        name: The name of the data.
        model: The class of the model, and the mechanism of its attention.
        reference: The same of the reference; None without one.
        rows: What was measured, in the order of the lengths.
        setting: The dtype, device and threads of the run.
        weights: A fingerprint of the weights that were measured.
    """

    kind: str
    name: str
    model: str
    reference: str | None
    rows: tuple[Measurement, ...]
    setting: str
    weights: str

    def at(self, length: int | None) -> Measurement:
        """What was measured at one length. Raises InputError if nothing was."""
        for row in self.rows:
            if row.length == length:
                return row
        raise InputError(f"nothing was measured at {length} tokens, only at {[r.length for r in self.rows]}")

    @property
    def scored(self) -> str:
        """What was scored, in a sentence."""
        if self.kind == "encoder":
            return (
                "Embeddings are means over the tokens of a text; the rank correlation is Spearman's, over "
                "the similarities of all pairs of texts."
            )
        if self.kind == "encoder-decoder":
            return "Every label that is not -100 is scored."
        return (
            "Windows of a length follow each other without overlap, and each is read by itself. The same "
            "tokens are scored at every length: all except those that begin a window of any length."
        )

    def attach(self, model: nn.Module) -> None:
        """Store these figures in a converted model, so that they go into its checkpoints and model card.

        They replace earlier figures of the same `name`, and all figures of other weights.

        Args:
            model: The model that was measured.

        Raises:
            InvalidModelError: The model is not converted.
            InputError: Its weights have changed since they were measured.
        """
        attach(self, model)

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        return {
            "version": VERSION,
            **dataclasses.asdict(self),
            "rows": [dataclasses.asdict(r) for r in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`. Raises InputError for anything else."""
        try:
            fields = dict(data)
            version = fields.pop("version")
            if version != VERSION:
                raise InputError(f"this evaluation has version {version!r}; this release reads {VERSION}")
            if fields["kind"] not in KINDS:
                raise ValueError(f"kind is one of {', '.join(KINDS)}, got {fields['kind']!r}")
            found = cls(**{**fields, "rows": tuple(_measurement(row) for row in fields["rows"])})
            found.table()  # what cannot be written is no figure
            return found
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"this is no record of an evaluation: {error}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot perplexity, time and memory of model and reference against length.

        Args:
            path: The image file. Its suffix is .png, .svg or .pdf.

        Raises:
            InputError: There are fewer than two lengths, or the suffix is another one.
            MissingExtraError: matplotlib is not installed.
            CheckpointError: The file cannot be written.
        """
        from .plot import plot

        plot(self.rows, self.model, self.reference, path)

    def table(self) -> list[list[str]]:
        """The cells of a table: headings, then a line per length and model. Empty columns are left out."""
        lines = [
            (row, who, figures, first)
            for row in self.rows
            for who, figures, first in _sides(row, self.model, self.reference)
        ]
        headings = [heading for heading, _, _ in (*_FIGURES, *_COMPARISONS)]
        columns = [["length"], ["tokens"], ["model"], *([heading] for heading in headings)]
        for row, who, figures, first in lines:
            length = "as given" if row.length is None else f"{row.length:,}"
            cells = [length, f"{row.tokens:,}"] if first else ["", ""]
            cells += [who, *(_text(getattr(figures, field), form) for _, field, form in _FIGURES)]
            # Comparisons are in the line of the model, not in that of the reference.
            compared = figures is row.model
            cells += [
                _text(getattr(row, field) if compared else None, form) for _, field, form in _COMPARISONS
            ]
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
        return [list(line) for line in zip(*(c for c in columns if any(c[1:])), strict=True)]

    def blocks(self) -> Iterator[Grid | str]:
        headings, *lines = self.table()
        if self.name:
            yield self.name
        yield Grid(headings, lines)
        yield f"{self.scored} Measured in {self.setting}."


_FIGURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("forward tokens/s", "forward_tokens_per_second", "{:,.0f}"),
    ("decode tokens/s", "decode_tokens_per_second", "{:,.1f}"),
    ("cache bytes", "cache_bytes", "{:,}"),
)
_COMPARISONS = (
    ("agreement", "agreement", "{:.1%}"),
    ("KL", "kl", "{:.4f}"),
    ("cosine", "cosine", "{:.4f}"),
    ("rank correlation", "spearman", "{:.4f}"),
)


def _sides(row: Measurement, model: str, reference: str | None) -> list[tuple[str, Figures, bool]]:
    """The name and the figures of each model, and whether its line is the first of this length."""
    if row.reference is None:
        return [(model, row.model, True)]
    return [(f"{reference}, original", row.reference, True), (model, row.model, False)]


def _text(value: float | int | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _measurement(data: Mapping[str, Any]) -> Measurement:
    fields = dict(data)
    reference = fields.pop("reference")
    return Measurement(
        **{**fields, "model": Figures(**fields["model"])},
        reference=None if reference is None else Figures(**reference),
    )


def describe(model: nn.Module) -> str:
    """The class and mechanism of a model, such as `LlamaForCausalLM, softmax_window`."""
    state = getattr(model, "_linearize", None)
    name = type(model).__name__
    return f"{name}, softmax" if state is None else f"{name}, {state.config.mechanism}"


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights and their names, the same on every device."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(_row_sums(tensor).numpy().tobytes())
    return found.hexdigest()[:16]


def _row_sums(tensor: Tensor) -> Tensor:
    """The sum of each row's bits, read as integers: int64 `[rows]`. Exact, so in any order."""
    flat = tensor.detach().contiguous()
    flat = flat.reshape(flat.shape[0] if flat.dim() > 1 else 1, -1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.int8)
    return flat.view(_BITS[flat.element_size()]).sum(1, dtype=torch.int64).cpu()


def attach(evaluation: Evaluation, model: nn.Module) -> None:
    """See `Evaluation.attach`."""
    carry_record(model, evaluation.to_dict())


def carry_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Let a converted model carry one more record of its weights, in place of that of the same kind and name.

    Those of other weights are dropped. Raises as `Evaluation.attach`.
    """
    if record["weights"] != fingerprint(model):
        raise InputError("the weights have changed since they were measured: evaluate the model again")
    kept = [
        other
        for other in state_of(model).measured
        if other.get("weights") == record["weights"] and _named(other) != _named(record)
    ]
    carry(model, [*kept, record])


def _named(record: Mapping[str, Any]) -> tuple[Any, Any]:
    kind = record.get("kind")
    return "evaluation" if kind in KINDS else kind, record.get("name")


def measured(model: nn.Module) -> list[Evaluation]:
    """The evaluations stored in a converted model, without those of other weights or of other releases."""
    records = state_of(model).measured
    if not records:
        return []
    weights = fingerprint(model)
    found = []
    for record in records:
        # A checkpoint must load even if another release wrote these.
        with suppress(InputError):
            found.append(Evaluation.from_dict(record))
    return [evaluation for evaluation in found if evaluation.weights == weights]
