"""Raising is identity: with every proved site replaced, a graph gives the model's output and gradients."""

from __future__ import annotations

import pytest
import torch
from graphs_of import (
    accepted,
    canonical_calls,
    compare,
    fused_or_softmax,
    graph_of,
    named,
    report_of,
    tolerance,
)
from linearize.passes import find_attention, raise_attention
from spellings import EITHER, REGISTRY, Spelling

pytestmark = pytest.mark.xdist_group("spellings")


def check_raise(entry: Spelling, dtype: torch.dtype | None = None) -> int:
    """Raise the spelling's graph, compare forward and gradients at both sizes; returns how many sites."""
    traced = graph_of(entry, dtype)
    report = report_of(entry, dtype)
    raised = raise_attention(traced.graph)
    assert canonical_calls(raised) == len(report.sites)
    kept = {refusal.anchor.name for refusal in report.refusals}
    assert fused_or_softmax(raised) <= len(kept), "the softmax of a raised site is left over"
    for batch, length in entry.lengths:
        inputs = entry.example(batch, length, traced.dtype)
        compare(
            traced.net, raised, inputs, tolerance(report, traced.dtype), not entry.name.startswith("flex")
        )
    return len(report.sites)


@pytest.mark.parametrize("entry", accepted())
def test_raised_graph_equals_the_model(entry: Spelling) -> None:
    """float64, forward and gradients of inputs and parameters, at the traced and an untraced size."""
    facts = entry.facts
    assert facts is not None
    assert check_raise(entry) == facts.sites


@pytest.mark.parametrize("entry", named(EITHER))
def test_a_hard_spelling_is_exact_if_it_is_rewritten(entry: Spelling) -> None:
    check_raise(entry)


REPRESENTATIVE = (
    "matmul_transpose",
    "baddbmm_adds_the_mask",
    "softmax_dtype_argument",
    "scale_learned_per_head",
    "softcap_before_mask",
    "t5_bias_causal_padding",
    "sink_last_causal",
    "causal_add_finfo_min",
    "padding_add_finfo_min",
    "gqa_tiled_repeat",
    "llama_eager",
    "swin_shifted_windows",
    "mla",
    "sdpa_enable_gqa",
)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_raised_graph_equals_the_model_in_float32(name: str) -> None:
    check_raise(REGISTRY[name], torch.float32)


@pytest.mark.parametrize("name", ["llama_eager", "softmax_between_casts", "scale_zero_dim_computed"])
def test_raised_graph_equals_the_model_in_bfloat16(name: str) -> None:
    """The canonical call keeps every cast, so that half precision rounds where the model rounds."""
    check_raise(REGISTRY[name], torch.bfloat16)


PADDED = [e for e in REGISTRY.values() if e.inputs == ("x", "keep") and e.facts is not None]


@pytest.mark.parametrize("entry", named(PADDED))
def test_rows_without_any_visible_key_are_reproduced(entry: Spelling) -> None:
    """Left padding under a causal mask leaves rows with nothing to see: what the graph gave, raise gives."""
    traced = graph_of(entry)
    raised = raise_attention(traced.graph)
    inputs = entry.example(*entry.lengths[1], traced.dtype)
    keep = inputs["keep"].flip(1)
    keep[0] = False
    inputs["keep"] = keep
    with torch.no_grad():
        torch.testing.assert_close(
            raised(*inputs.values()), traced.graph(*inputs.values()), equal_nan=True, rtol=1e-6, atol=1e-6
        )


def test_raise_changes_nothing_outside_the_sites() -> None:
    """Projections, norms and the residual keep their nodes, names and parameters."""
    traced = graph_of(REGISTRY["llama_eager"])
    before = traced.graph.code
    raised = raise_attention(traced.graph)
    assert traced.graph.code == before
    linear = [
        n.target for n in raised.graph.nodes if "linear" in str(n.target) and "linearize" not in str(n.target)
    ]
    assert len(linear) == 4
    assert {n.target for n in raised.graph.nodes if n.op == "get_attr"} <= {
        n.target for n in traced.graph.graph.nodes if n.op == "get_attr"
    }
    ours = dict(raised.named_parameters())
    for name, parameter in traced.net.named_parameters():
        assert ours[name] is parameter or ours[name].data_ptr() == parameter.data_ptr(), name


def test_raised_graph_holds_no_further_site_and_raises_to_itself() -> None:
    """Raising twice is raising once."""
    traced = graph_of(REGISTRY["two_layers"])
    once = raise_attention(traced.graph)
    assert not find_attention(once).sites
    assert canonical_calls(raise_attention(once)) == canonical_calls(once) == 2
    assert [change.count for change in once.meta["history"] if change.name == "raise"] == [2]
