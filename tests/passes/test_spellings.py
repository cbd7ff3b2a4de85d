"""The library of spellings tells the truth about itself: each runs, traces, and means what its facts say."""

from __future__ import annotations

import pytest
import spellings
import torch


def named(entries: list[spellings.Spelling]) -> list:
    return [pytest.param(entry, id=entry.name) for entry in entries]


KNOWN = [e for e in spellings.REGISTRY.values() if e.facts is not None and e.reference]


@pytest.mark.parametrize("entry", named(KNOWN))
def test_facts_are_true(entry: spellings.Spelling) -> None:
    """The module equals a row-by-row softmax that knows nothing but the facts, at both lengths."""
    net = entry.model().double()
    for batch, length in entry.lengths:
        inputs = entry.example(batch, length, torch.float64)
        with torch.no_grad():  # flex attention has no backward on CPU
            output, expected = net(*inputs.values()), spellings.reference(entry, net, inputs)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_reference_sees_a_wrong_fact() -> None:
    """Any single wrong fact changes the reference: the guard above can fail."""
    import dataclasses

    entry = spellings.REGISTRY["llama_eager"]
    net = entry.model().double()
    inputs = entry.example(2, 7, torch.float64)
    right = net(*inputs.values())
    for wrong in ({"mask": "full"}, {"scale": 1.0}, {"softcap": 2.0}, {"kv": ("tiled", 2)}):
        changed = dataclasses.replace(entry, facts=dataclasses.replace(entry.facts, **wrong))
        assert (spellings.reference(changed, net, inputs) - right).abs().max() > 1e-3, wrong


def test_symbolic_trace_flag() -> None:
    """`fx` says exactly which spellings torch.fx.symbolic_trace can follow."""
    wrong = {}
    for entry in spellings.REGISTRY.values():
        try:
            torch.fx.symbolic_trace(entry.model())
            traced = True
        except Exception:  # noqa: BLE001  (torch.fx raises whatever the module's code raises on a proxy)
            traced = False
        if traced != entry.fx:
            wrong[entry.name] = traced
    assert not wrong
