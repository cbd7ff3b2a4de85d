"""The model card: what was converted, how to load it, what was measured of it. Written with checkpoints."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .. import mechanisms
from ..common.files import read_json, write_whole
from ..passes.site import Reason
from ..planning.state import state_of
from .parts import Parts
from .recall import Recall
from .result import fingerprint, measured

if TYPE_CHECKING:
    from ..planning.state import LinearizeState
    from . import Evaluation

NAME = "README.md"
MARK = "<!-- linearize writes this file anew with every save; remove this line to keep your own text -->"
_LOAD = """```python
import linearize as lz

model = lz.load("this/folder")
```"""
_LOAD_TRANSFORMERS = (
    "The class's own `from_pretrained` works too, once `linearize` is imported: that is what makes "
    "transformers rewrite the model before it reads the weights. Where nothing imports it, "
    "`from_pretrained(..., trust_remote_code=True)` of an Auto class does; the package must be installed."
)
_LOAD_MODULE = """```python
import linearize as lz

model = lz.load("this/folder", model=fresh)  # a new, unconverted module of the same architecture
```"""


def write_card(model: nn.Module, folder: Path) -> bool:
    """Write the card of a converted model into `folder`; False where a README.md that is not ours stands.

    Raises CheckpointError when it cannot be written.
    """
    path = folder / NAME
    if not is_ours(path):
        return False
    write_whole(path, card(model))
    return True


def update_folder(model: nn.Module, folder: Path) -> bool:
    """Put the evaluations that `model` carries into the checkpoint it was loaded from, and into its card.

    Only for transformers checkpoints. Returns as `write_card`, and raises as that does.
    """
    path = folder / "config.json"
    config = read_json(path)
    config["linearize"]["measured"] = list(state_of(model).measured)
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return write_card(model, folder)


def tag_card(path: Path, tags: list[str]) -> None:
    """Add tags of the Hub to a card."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), *tags, "linearize"})
    card.save(path)


def is_ours(path: Path) -> bool:
    """Whether a card may be written to `path`: there is none, or one that we wrote and nobody took over."""
    if not path.exists():
        return True
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def card(model: nn.Module) -> str:
    """Write the text of a converted model's card: what was converted, how to load it, what was measured.

    Args:
        model: A model that `linearize` converted.

    Returns:
        Markdown with the YAML header of a model card.

    Raises:
        InvalidModelError: The model is not converted.
    """
    from transformers import PreTrainedModel

    state = state_of(model)
    whole = isinstance(model, PreTrainedModel)
    name = type(model).__name__
    lines = [
        "---",
        *(["library_name: transformers"] if whole else []),
        "tags:",
        "- linearize",
        "- linear-attention",
        "---",
        MARK,
        "",
        f"# {_text(name)} with {state.config.mechanism} attention",
        "",
        *_conversion(name, state),
        "",
        "## Loading",
        "",
        *([_LOAD, "", _LOAD_TRANSFORMERS] if whole else [_LOAD_MODULE]),
        "",
        "## Measured",
        "",
    ]
    found = measured(model)
    more = list(_more(model, state))
    if not found and not more:
        lines += ["Not measured. `linearize eval FOLDER --reference ORIGINAL --data FILES --card` does it."]
    for evaluation in found:
        lines += [*_evaluation(evaluation), ""]
    lines += more
    return "\n".join(lines).rstrip() + "\n"


def _conversion(name: str, state: LinearizeState) -> Iterator[str]:
    from ..common.version import __version__

    config, plan = state.config, state.plan
    mechanism = mechanisms.get(config.mechanism)
    yield (
        f"The softmax attention of a {_code(name)} was rewritten at {len(plan.sites)} "
        f"{'place' if len(plan.sites) == 1 else 'places'} by linearize {__version__}."
    )
    yield ""
    yield f"- mechanism: `{config.mechanism}`: {mechanism.formula}"
    for option, known in mechanism.options.items():
        yield f"- {option}: {config.option(option)} ({known.meaning})"
    for layer, own in config.layer_options.items():
        settings = ", ".join(f"{option} {value}" for option, value in own.items())
        yield f"- in {'layer ' if isinstance(layer, int) else ''}{_code(str(layer))}: {settings}"
    yield f"- group size: {config.group_size}"
    taps = f"{config.conv_taps} taps" if config.augments else "none"
    yield f"- convolution over values: {taps}"
    if config.approximate:
        yield f"- left out knowingly: {', '.join(config.approximate)}"
    kept = [skip for skip in plan.skipped if skip.reason != Reason.NOT_ATTENTION.value]
    yield f"- kept as softmax: {', '.join(_code(skip.path) for skip in kept) or 'nothing'}"


def _evaluation(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.name:
        yield f"On {_text(evaluation.name)}:"
        yield ""
    headings, *rows = evaluation.table()
    yield _line(headings)
    yield _line(["---:"] * len(headings))
    yield from map(_line, rows)
    yield ""
    yield f"{evaluation.scored} Measured in {_text(evaluation.setting)}."


def _more(model: nn.Module, state: LinearizeState) -> Iterator[str]:
    """What else was measured of these weights: their parts, and what they recall."""
    weights = fingerprint(model) if state.measured else ""
    for record in state.measured:
        parts, recalled = Parts.from_dict(record), Recall.from_dict(record)
        found = parts or recalled
        if found is None or found.weights != weights:
            continue
        where = f", on {_text(parts.name)}" if parts is not None and parts.name else ""
        yield f"### {'What each part gives' if parts is not None else 'What it recalls'}{where}"
        yield ""
        headings, *rows = found.table()
        yield _line(headings)
        yield _line(["---"] + ["---:"] * (len(headings) - 1))
        yield from map(_line, rows)
        yield ""
        yield _text(found.note)
        yield ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(text: object) -> str:
    """A text of a checkpoint as plain text in Markdown: one line, without HTML, links or cells of its own."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`\[\]|*])", r"\\\1", line)


def _code(name: str) -> str:
    """The name of a module or class as code; what no such name has is a question mark."""
    return f"`{re.sub(r'[^A-Za-z0-9_.-]', '?', name)}`"
