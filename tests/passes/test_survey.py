"""Over the model zoo: every attention site is found with the right mask, and raising it changes nothing.

By default every architecture is captured once: in turn eager without a padding mask and SDPA with one (where
there is one implementation, in turn without and with). The slow part adds the others, and the architectures
that only repeat a spelling or take long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from survey_case import TOLERANCE, Row, examine
from zoo import ENTRIES, Entry

LEFT_OUT = frozenset(
    "biogpt codegen cohere2 convbert ctrl cvt diffllama esm lilt longformer lxmert mpnet nystromformer "
    "pegasus roformer sew-d speech_to_text stablelm wav2vec2-conformer xglm".split()
)
"""Architectures that only the slow part captures, for the time that they take."""
KINDS = {"decoder", "encoder", "encoder-decoder", "vision", "audio", "multimodal"}


def rows() -> Iterator[object]:
    """(entry, implementation, masked). Each takes seconds, so that an architecture has one row by default."""
    turn = 0
    for entry in ENTRIES:
        several = len(entry.implementations) > 1
        turn += not entry.slow
        quick = entry.implementations[turn % len(entry.implementations)]
        for implementation in entry.implementations:
            for masked in (True, False) if entry.paddable else (False,):
                wanted = implementation == entry.implementations[-1] if several else turn % 2 == 1
                extra = implementation != quick or (entry.paddable and masked != wanted)
                later = entry.slow or entry.name in LEFT_OUT or extra
                marks = [pytest.mark.slow] if later else []
                name = f"{entry.name}-{implementation}-{'mask' if masked else 'plain'}"
                yield pytest.param(entry, implementation, masked, id=name, marks=marks)


@pytest.mark.parametrize(("entry", "implementation", "masked"), list(rows()))
def test_sites_are_found_and_raising_them_is_identity(
    entry: Entry, implementation: str, masked: bool
) -> None:
    row = examine(entry, implementation, masked)
    if "capture" in entry.refused:
        assert "CaptureError" in row.failure, "this architecture can be captured now: update the zoo"
        return
    assert not row.failure, row.failure
    check_sites(row)
    assert row.worst <= TOLERANCE, row.errors
    if entry.total:
        assert row.sensitivity > 10 * TOLERANCE, "attention hardly reaches the output: nothing is proved"


def check_sites(row: Row) -> None:
    assert dict(row.sites) == dict(row.entry.expected(row.masked)), row.refusals
    assert row.raised == row.entry.total
    # A router's softmax is rightly not attention; whether it is a candidate at all is not the zoo's matter.
    ignored = {"not-attention"} - set(row.entry.refused)
    told = Counter(reason for reason, _, _ in row.refusals if reason not in ignored)
    assert told == Counter(row.entry.refused), row.refusals
    if row.masked:
        assert row.padded_sites == row.entry.padded, "sites whose mask reads the padding input"


def test_the_default_zoo_covers_sixty_architectures_of_every_kind() -> None:
    assert LEFT_OUT <= {entry.name for entry in ENTRIES}
    default = [entry for entry in ENTRIES if not entry.slow and entry.name not in LEFT_OUT]
    assert len({entry.model_type for entry in default}) >= 60
    assert {entry.kind for entry in default} == KINDS
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_same_weights_whatever_the_implementation() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "llama")
    eager, sdpa = (entry.build(name).state_dict() for name in ("eager", "sdpa"))
    assert all(bool((eager[name] == sdpa[name]).all()) for name in eager)
