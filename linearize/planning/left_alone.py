"""What a plan leaves alone: the candidates with their reasons, and errors that say what helps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .. import mechanisms
from ..errors import RefusedError
from ..mechanisms.base import DROPPABLE
from ..passes.site import MatchReport
from .config import LinearizeConfig

KEPT = "kept"
"""The reason code of what the user asked to leave as softmax."""
KEPT_MESSAGE = "left as softmax by `layers` or `keep_softmax`"
WINDOWED = "own-window"
"""The reason code of what sees a window of its own, and stays as it is: it needs no more memory by length."""


@dataclass(frozen=True)
class Skipped:
    """A candidate left as softmax: where, the reason code, and one sentence."""

    path: str
    ordinal: int
    reason: str
    message: str


Blocked = tuple[Skipped, tuple[str, ...]]
"""A candidate that was wanted, and what it needs that the mechanism lacks; nothing where that is not why."""


def kept_window(width: int | None, need: Collection[str]) -> tuple[str, str] | None:
    """Why a site stays as it is, as `problem_of`, where it has a window that the mechanism does not cover.

    need: What it needs that the mechanism lacks.
    """
    if "window" not in need:
        return None
    return WINDOWED, f"it sees its own window of {width} tokens, and stays as it is"


def nothing_asked(
    windowed: Sequence[Blocked], config: LinearizeConfig, windows: bool, report: MatchReport | None = None
) -> RefusedError:
    """That nothing is left to rewrite, though nothing was refused."""
    if not windowed:
        return RefusedError("`layers` and `keep_softmax` leave no attention to rewrite", report)
    advice = _advice(windowed, config, windows)
    if mechanisms.get(config.mechanism).reach is not None:
        advice += ' A window in options={"window": ...} as wide as the model\'s own carries it.'
    return RefusedError(f"no attention is left to rewrite: {_sentences(windowed)}", report, advice)


def raise_blocked(
    blocked: Sequence[Blocked], config: LinearizeConfig, report: MatchReport | None, windows: bool
) -> None:
    """Raise RefusedError for blocked candidates, if there are any and `config` does not leave them out."""
    if blocked and config.on_refusal == "error":
        sites = () if report is None else report.sites
        keep = bool({site.path for site in sites} - {skip.path for skip, _ in blocked})
        raise RefusedError(
            f"{len(blocked)} attention site(s) cannot be rewritten, so nothing was: {_sentences(blocked)}",
            report,
            _advice(blocked, config, windows, keep),
        )


def nothing_left(
    blocked: Sequence[Blocked], config: LinearizeConfig, windows: bool, report: MatchReport | None = None
) -> RefusedError:
    """That nothing is left to rewrite, because of what was refused."""
    text = f"no attention site can be rewritten: {_sentences(blocked)}"
    return RefusedError(text, report, _advice(blocked, config, windows))


def _advice(blocked: Sequence[Blocked], config: LinearizeConfig, windows: bool, keep: bool = False) -> str:
    """What to do about refused sites, nothing of which is refused in turn.

    windows: whether a causal window can be dropped, as where masks are built for transformers' attention
    interface. keep: whether the model has sites that are not refused.
    """
    droppable = set(DROPPABLE) - (set() if windows else {"window"})
    needs = dict.fromkeys(need for _, missing in blocked for need in missing)
    advice = []
    if all(missing and set(missing) <= droppable for _, missing in blocked):
        dropped = tuple(dict.fromkeys((*config.approximate, *needs)))
        advice.append(f"approximate={dropped}, which leaves that out knowingly".replace("'", '"'))
    if keep:
        advice.append("on_refusal='keep', which leaves these layers softmax")
    if not advice and all(missing for _, missing in blocked) and config.mechanism != "softmax":
        advice.append("mechanism='softmax', which carries all of it")
    return f"What helps: {'; or '.join(advice)}." if advice else "There is no other attention in the model."


def _sentences(blocked: Iterable[Blocked], limit: int = 320) -> str:
    """The refusals in at most about `limit` characters: modules that are refused alike in one sentence."""
    groups: dict[tuple[str, str], list[str]] = {}
    for skip, _ in blocked:
        paths = groups.setdefault((skip.reason, skip.message), [])
        paths += [] if (skip.path or "(root)") in paths else [skip.path or "(root)"]
    texts: list[str] = []
    for (reason, message), paths in groups.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        text = f"{paths[0]}{more} [{reason}]: {message[:limit]}"
        if texts and sum(map(len, texts)) + len(text) > limit:
            texts.append(f"and {len(groups) - len(texts)} other reasons")
            break
        texts.append(text)
    return "; ".join(texts) + "."
