"""What there is to rewrite: one row per candidate site, always every one, as text, JSON and HTML."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..common.tables import Grid, alike, as_html, as_text
from ..passes.site import MatchReport, Refusal, Site, Size
from ..planning.left_alone import KEPT, WINDOWED

if TYPE_CHECKING:
    from rich.table import Table

    from ..planning.config import LinearizeConfig
    from ..planning.state import LinearizeState


REWRITE, KEEP, REFUSED, CONVERTED = "rewrite", "keep", "refused", "converted"
"""Verdicts: will be rewritten; could be but the config leaves it; cannot be; already is."""

Key = tuple[str, int]
"""A candidate's name: owner path and ordinal."""

_STYLE = {REWRITE: "green", KEEP: "cyan", REFUSED: "yellow", CONVERTED: "blue"}


@dataclass(frozen=True)
class Candidate:
    """One candidate site.

    Attributes:
        path: dotted path of the owner, "" for the model itself.
        ordinal: 0, 1, ... where one owner has several sites.
        owner: class of the owner, "" if unknown.
        source: `file:line` of the softmax or fused call.
        spelling: how the attention was written.
        shapes: sizes by axis, B, H, Hkv, T, S, D, Dv; a dynamic one is its symbol; empty if not reached.
        mask: what the mask means, "" if unknown.
        scale: factor on the scores; None if unknown or a tensor.
        verdict: "rewrite", "keep", "refused" or "converted".
        reason: code of a refusal, "" otherwise.
        message: one sentence about the verdict.
        becomes: what stands in its place after a conversion.
    """

    path: str
    ordinal: int
    owner: str
    source: str
    spelling: str
    shapes: dict[str, Size]
    mask: str
    scale: float | None
    verdict: str
    reason: str
    message: str
    becomes: str

    @property
    def shape_text(self) -> str:
        """`B,H/Hkv,T,S,D`; a dynamic size is shown by the letter of the first axis that has it."""
        if not self.shapes:
            return ""
        first: dict[Size, str] = {}
        for axis, n in self.shapes.items():
            first.setdefault(n, axis)
        size = {axis: str(n) if isinstance(n, int) else first[n] for axis, n in self.shapes.items()}
        heads = size["H"] if self.shapes["H"] == self.shapes["Hkv"] else f"{size['H']}/{size['Hkv']}"
        width = size["D"] if self.shapes["D"] == self.shapes["Dv"] else f"{size['D']}/{size['Dv']}"
        return f"{size['B']},{heads},{size['T']},{size['S']},{width}"


@dataclass(frozen=True)
class Report:
    """Every candidate attention site of a model. It prints as a table, in terminals and in notebooks.

    Attributes:
        model: class of the model.
        mechanism: what rewritten sites become.
        rows: the candidates, in order of execution.
        advice: what helps where the conversion would be refused, "" elsewhere.
    """

    model: str
    mechanism: str
    rows: tuple[Candidate, ...]
    advice: str = ""

    @property
    def sites(self) -> tuple[Candidate, ...]:
        """Proved attention, whether or not the config rewrites it."""
        return tuple(row for row in self.rows if row.verdict != REFUSED)

    @property
    def refusals(self) -> tuple[Candidate, ...]:
        return tuple(row for row in self.rows if row.verdict == REFUSED)

    @property
    def summary(self) -> str:
        """One line of text with the class of the model, counts by verdict and the reasons of refusals."""
        counts = Counter(row.verdict for row in self.rows)
        reasons = ", ".join(sorted({row.reason for row in self.refusals}))
        parts = [f"{counts[verdict]} {verdict}" for verdict in _STYLE if counts[verdict]]
        total = f"{len(self.rows)} candidate{'' if len(self.rows) == 1 else 's'}"
        return f"{self.model}: {', '.join([total, *parts])}{f' ({reasons})' if reasons else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "model": self.model,
            "mechanism": self.mechanism,
            "rows": [asdict(row) for row in self.rows],
            "advice": self.advice,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self, width: int = 160) -> str:
        """The table as plain text, `width` columns wide. Layers of which the same is said are one row."""
        return as_text(self, width) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.summary),
            caption=Text(self.advice) if self.advice else None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        # Two lines a row, so that 80 columns are enough for most models.
        for name in ("module, source", "spelling", "B,H,T,S,D", "mask", "scale", "outcome"):
            table.add_column(name, overflow="fold", no_wrap=name == "B,H,T,S,D")
        for module, source, spelling, shape, mask, scale, verdict, outcome in alike(map(_cells, self.rows)):
            site = Text(f"{module}\n").append(source, "dim")
            said = Text(verdict, _STYLE[verdict]).append(f": {outcome}" if outcome else "", "default")
            table.add_row(site, *map(Text, (spelling, shape, mask, scale)), said)
        return table

    def to_html(self) -> str:
        """One self-contained page: no script, no outside file; everything taken from the model is escaped."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "\n".join(
            f'<tr class="{row.verdict}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            + "</tr>"
            for row in self.rows
        )
        return _PAGE.format(
            title=html.escape(self.summary), head=head, body=body, advice=html.escape(self.advice)
        )

    def _repr_html_(self) -> str:
        said = [self.advice] if self.advice else []
        return as_html([self.summary, Grid(_COLUMNS, alike(map(_cells, self.rows))), *said])


_COLUMNS = (
    "module",
    "source",
    "spelling",
    "B,H,T,S,D",
    "mask",
    "scale",
    "verdict",
    "becomes, or why not",
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid #d8dee4; }}
td {{ font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }}
th {{ position: sticky; top: 0; background: #f6f8fa; }}
tr.rewrite td:nth-child(7) {{ color: #116329; }} tr.refused td:nth-child(7) {{ color: #9a5b00; }}
tr.converted td:nth-child(7), tr.keep td:nth-child(7) {{ color: #0550ae; }}
</style></head><body>
<h1 style="font-size: 1.3rem">{title}</h1>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
<p>{advice}</p>
</body></html>
"""


def _cells(row: Candidate) -> tuple[str, ...]:
    name = row.path or "(model)"
    if row.ordinal:
        name += f" #{row.ordinal}"
    if row.verdict == REFUSED:
        outcome = f"{row.reason}: {row.message}"
    else:
        outcome = ". ".join(part for part in (row.becomes, row.message) if part)
    scale = "" if row.scale is None else f"{row.scale:.4g}"
    spelling = row.spelling.replace("scaled_dot_product_attention", "sdpa")
    return (name, row.source, spelling, row.shape_text, row.mask, scale, row.verdict, outcome)


def describe(config: LinearizeConfig) -> str:
    """What a site becomes under `config`."""
    return "softmax, exact" if config.mechanism == "softmax" else config.mechanism


def converted_candidates(state: LinearizeState) -> tuple[Candidate, ...]:
    converted = [
        Candidate(
            path=site.path,
            ordinal=site.slot,
            owner="",
            source=site.source,
            spelling="",
            shapes={
                "B": "B",
                "H": site.spec.num_heads,
                "Hkv": site.spec.num_key_value_heads,
                "T": "T",
                "S": "S" if site.spec.cross else "T",
                "D": site.spec.head_dim,
                "Dv": site.spec.value_dim,
            },
            mask=site.mask,
            scale=site.spec.scale,
            verdict=CONVERTED,
            reason="",
            message=f"applied by {site.route}",
            becomes=describe(state.config),
        )
        for site in state.plan.sites
    ]
    skipped = [
        Candidate(
            path=skip.path,
            ordinal=skip.ordinal,
            owner="",
            source="",
            spelling="",
            shapes={},
            mask="",
            scale=None,
            verdict=KEEP if skip.reason in (KEPT, WINDOWED) else REFUSED,
            reason="" if skip.reason in (KEPT, WINDOWED) else skip.reason,
            message=skip.message,
            becomes="",
        )
        for skip in state.plan.skipped
    ]
    return (*converted, *skipped)


def candidates(
    match: MatchReport,
    refused: Mapping[Key, tuple[str, str]],
    becomes: Mapping[Key, str],
    windowed: Mapping[Key, str] = MappingProxyType({}),
) -> tuple[Candidate, ...]:
    """Rows of a match in graph order.

    refused: reason code and sentence for proved sites that cannot be rewritten as configured.
    becomes: what each site that will be rewritten turns into. windowed: a sentence about each site that stays
    as it is for its own window. A site in none is kept by the config.
    """
    order = {node: i for i, node in enumerate(match.graph_module.graph.nodes)}
    matched: list[Site | Refusal] = [*match.sites, *match.refusals]
    matched.sort(key=lambda candidate: order[candidate.anchor])
    result = []
    for candidate in matched:
        key = (candidate.path, candidate.ordinal)
        if isinstance(candidate, Refusal):
            result.append(_of_refusal(candidate))
        elif key in refused:
            reason, message = refused[key]
            result.append(_of_site(candidate, REFUSED, reason=reason, message=message))
        elif key in becomes:
            result.append(_of_site(candidate, REWRITE, becomes=becomes[key]))
        else:
            why = windowed.get(key, "the config keeps it")
            result.append(_of_site(candidate, KEEP, becomes="softmax, as it is", message=why))
    return tuple(result)


def _of_site(site: Site, verdict: str, reason: str = "", message: str = "", becomes: str = "") -> Candidate:
    return Candidate(
        path=site.path,
        ordinal=site.ordinal,
        owner=site.owner_type,
        source=site.source,
        spelling=site.spelling,
        shapes=site.shapes,
        mask=site.mask.label,
        scale=site.scale,
        verdict=verdict,
        reason=reason,
        message=message,
        becomes=becomes,
    )


def _of_refusal(refusal: Refusal) -> Candidate:
    return Candidate(
        path=refusal.path,
        ordinal=refusal.ordinal,
        owner="",
        source=refusal.source,
        spelling=refusal.reached,
        shapes={},
        mask="",
        scale=None,
        verdict=REFUSED,
        reason=refusal.reason.value,
        message=refusal.message,
        becomes="",
    )
