"""What each part of a converted decoder gives: perplexity with the parts added one by one, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..common.tables import Grid, Printed
from .result import carry_record

KIND = "parts"
VERSION = 1


@dataclass(frozen=True)
class Part:
    """One line.

    Attributes:
        name: What is there; "+" adds to the line before.
        state_bytes: Bytes of the constant-size states of one sequence; None without such states.
        perplexity: One for each length.
    """

    name: str
    state_bytes: int | None
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class Parts(Printed):
    """The result of `measure_parts`. It prints as a table.

    Attributes:
        name: The name of the data.
        lengths: Tokens of context.
        tokens: How many tokens were scored at each length.
        rows: The original, the window of the same bytes, the parts one after the other, no attention at all.
        setting: The dtype, device and threads of the run.
        weights: A fingerprint of the weights that were measured.
    """

    name: str
    lengths: tuple[int, ...]
    tokens: int
    rows: tuple[Part, ...]
    setting: str
    weights: str

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"version": VERSION, "kind": KIND, **dataclasses.asdict(self), "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parts | None:
        """The inverse of `to_dict`; None for what is no such record of this version."""
        try:
            fields = dict(data)
            if (fields.pop("version"), fields.pop("kind")) != (VERSION, KIND):
                return None
            rows = tuple(Part(**{**row, "perplexity": tuple(row["perplexity"])}) for row in fields["rows"])
            found = cls(**{**fields, "lengths": tuple(fields["lengths"]), "rows": rows})
            return found if found.table() and found.note else None  # what cannot be written is no figure
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None

    def attach(self, model: nn.Module) -> None:
        """Store these figures in the model, as `Evaluation.attach` does."""
        carry_record(model, self.to_dict())

    def table(self) -> list[list[str]]:
        """The cells of a table: headings, then a line per row."""
        lines = [["attention", *(f"perplexity at {n:,}" for n in self.lengths), "state bytes"]]
        for row in self.rows:
            size = "" if row.state_bytes is None else f"{row.state_bytes:,}"
            lines.append([row.name, *(f"{value:.2f}" for value in row.perplexity), size])
        return lines

    @property
    def note(self) -> str:
        """What was measured, in a sentence."""
        return (
            f"Parts with the parameters that they have in this model. {self.tokens:,} tokens scored at each "
            f"length, the same ones. Measured in {self.setting}."
        )

    def blocks(self) -> Iterator[Grid | str]:
        headings, *lines = self.table()
        yield Grid(headings, lines)
        yield self.note
