"""One row of the survey: capture a zoo model, find its attention, raise it, and compare with the original.

Shared by `test_survey.py`, which asserts, and `benchmarks/survey.py`, which writes the table.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from linearize.passes import capture, find_attention, raise_attention
from linearize.passes.site import Site
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from zoo import OTHERS, TRACED, Entry, Inputs

TOLERANCE = 1e-5


@dataclass
class Row:
    """What happened to one (architecture, implementation, captured with or without a mask).

    sites: mask label without its padding part -> number. padded_sites: sites whose mask reads padding.
    refusals: (reason code, module path, message). raised: exact attention calls in the raised graph.
    errors: input size -> |raised - original| / max(1, |original|). sensitivity: the same error when every
    raised site's output is made one per cent wrong, so that an identity that could not fail is seen.
    seconds: stage -> wall time. failure: the exception that ended the row early, empty if none.
    """

    entry: Entry
    implementation: str
    masked: bool
    sites: Counter[str] = field(default_factory=Counter)
    padded_sites: int = 0
    refusals: list[tuple[str, str, str]] = field(default_factory=list)
    raised: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    sensitivity: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=float("nan"))


def label(site: Site) -> str:
    """The mask label of a site without `+padding`, which depends on the inputs, not on the architecture."""
    return replace(site.mask, padding=False).label


def float_leaves(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def relative_error(got: Any, want: Any) -> float:
    """max |got - want| over all float outputs, relative to max(1, |want|); inf where shape or NaN differ."""
    worst = 0.0
    pairs = list(zip(float_leaves(got), float_leaves(want), strict=True))
    assert pairs, "the model has no float output to compare"
    for a, b in pairs:
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.nan_to_num(), b.nan_to_num()
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item())
    return worst


def sizes(entry: Entry) -> tuple[tuple[int, int], ...]:
    """The traced size, then others; where the architecture fixes the length only the batch changes."""
    return (TRACED, *(OTHERS if entry.resizable else [(3, TRACED[1])]))


def cases(entry: Entry, masked: bool) -> dict[str, Inputs]:
    """Inputs by name. A graph captured with a mask is run with keys switched off and with all keys on."""
    found = {}
    for batch, length in sizes(entry):
        inputs = entry.inputs(batch, length, masked)
        found[f"{batch}x{length}" + (" padded" if masked else "")] = inputs
        if masked:
            whole = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
            found[f"{batch}x{length} whole"] = whole
    return found


def is_attention(node: Node) -> bool:
    return node.target is torch.ops.linearize.attention.default


class _OnePerCentOff(Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return value + 0.01 * value.roll(1, -1) if is_attention(n) else value


def exaggerated(raised: GraphModule, inputs: Inputs) -> Any:
    """The flat outputs of a raised graph whose attention is one per cent of the next feature off."""
    names = [node.target for node in raised.graph.find_nodes(op="placeholder")]
    return _OnePerCentOff(raised).run(*(inputs[name] for name in names), enable_io_processing=False)


def examine(entry: Entry, implementation: str, masked: bool, model: nn.Module | None = None) -> Row:
    """Run one row. Exceptions become `failure`; a wrong answer becomes an error above TOLERANCE."""
    row = Row(entry, implementation, masked)
    try:
        _examine(row, model)
    except Exception as error:  # the table says what happened; the test fails on it
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


@torch.no_grad()
def _examine(row: Row, model: nn.Module | None) -> None:
    def timed(stage: str, call: Any) -> Any:
        start = time.perf_counter()
        result = call()
        row.seconds[stage] = time.perf_counter() - start
        return result

    if model is None:
        model = row.entry.build(row.implementation)
    example = row.entry.inputs(*TRACED, row.masked)
    graph = timed("capture", lambda: capture(model, (), example))
    report = timed("match", lambda: find_attention(graph))
    row.sites = Counter(label(site) for site in report.sites)
    row.padded_sites = sum(site.mask.padding for site in report.sites)
    row.refusals = [(r.reason.value, r.path, r.message) for r in report.refusals]
    raised = timed("raise", lambda: raise_attention(graph))
    row.raised = sum(is_attention(node) for node in raised.graph.nodes)
    row.sensitivity = relative_error(exaggerated(raised, example), model(**example))
    for name, inputs in cases(row.entry, row.masked).items():
        row.errors[name] = relative_error(raised(**inputs), model(**inputs))


def live_error(entry: Entry, implementation: str) -> str:
    """`linearize(model, mechanism="softmax")` against the model as it was: the error, or why it was refused.

    Outputs of padded positions are left out: linear attention does not define them.
    """
    from linearize import LinearizeError, linearize

    model = entry.build(implementation)
    worst, wanted = 0.0, {}
    with torch.no_grad():
        for name, inputs in cases(entry, entry.paddable).items():
            wanted[name] = (inputs, real_tokens(model(**inputs), inputs))
        try:
            linearize(model, entry.inputs(*TRACED, entry.paddable), mechanism="softmax")
        except LinearizeError as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        for inputs, want in wanted.values():
            worst = max(worst, relative_error(real_tokens(model(**inputs), inputs), want))
    return "0" if worst == 0 else f"{worst:.0e}"


def real_tokens(output: Any, inputs: Inputs) -> list[Tensor]:
    """The float outputs; those laid out like the padding mask keep only the rows of real tokens."""
    leaves = float_leaves(output)
    mask = inputs.get("attention_mask")
    if mask is None:
        return leaves
    return [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in leaves]
