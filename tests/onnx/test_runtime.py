"""Exported files where users run them: onnxruntime with and without the library, and onnxruntime-genai."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_nodes import session_options
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

import linearize as lz
from linearize.errors import ExportError, InputError
from linearize.onnx import library
from linearize.onnx.runtime import OrtModel, OrtStates

pytestmark = pytest.mark.xdist_group("onnx")

GROUP, TAPS = 16, 8
# Uneven; calls that begin at 0 and at 1 modulo the group, of one token and of several groups.
CHUNKS = (40, 1, 1, 6, 16, 1, 17)
VOCABULARY = 64
END = VOCABULARY
"""A token that these models never write: genai always has one to stop at."""


def awake(model: Any) -> Any:
    """Weights that start at zero, so that an attention without them would pass for one with them."""
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("alpha", "conv_weight")):
            parameter.data.add_(torch.randn(parameter.shape, generator=numbers) * 0.3)
    return model


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[END] = 0  # among logits of which many are above zero
    settings = dict(group_size=GROUP, conv_taps=TAPS)
    return awake(lz.linearize(model, **{**settings, **options}))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "model"
    lz.export_onnx(model, folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model that keeps softmax in one layer, and its folder; the file gives the last token's logits."""
    model = llama(keep_softmax=[1])
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    lz.export_onnx(model, folder, last_logits=True)
    return model, folder


@pytest.fixture(scope="module")
def salient(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose layers choose tokens of a text this long, and its folder."""
    options = {"window": 8, "sinks": 2, "salient": 4}
    model = llama(mechanism="augmented", augmentation=True, options=options)
    folder = tmp_path_factory.mktemp("salient") / "model"
    lz.export_onnx(model, folder)
    return model, folder


@pytest.fixture(params=["body", "library"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "library" and library.unavailable_reason() is not None:
        pytest.skip(str(library.unavailable_reason()))
    return request.param


def opened(folder: Path, kind: str, level: str = "ORT_ENABLE_ALL") -> OrtModel:
    return OrtModel(folder, options=session_options(level), library=kind == "library")


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ onnxruntime


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_logits_in_pieces_are_pytorchs_and_the_kernel_that_ran_is_the_one_asked_for(
    model: Any, folder: Path, kind: str, level: str
) -> None:
    running = opened(folder, kind, level)
    ids = tokens(2, sum(CHUNKS))
    with torch.no_grad():
        expected = model(ids).logits
    before, states, out = library.calls(), None, []
    for piece in ids.split(CHUNKS, 1):
        result = running(piece, past_key_values=states)
        states = result.past_key_values
        out.append(result.logits)
    torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-4, rtol=0)
    assert library.calls() - before == (len(CHUNKS) * 2 if kind == "library" else 0)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_prompt_in_pieces_is_the_whole_prompt(model: Any, hybrid: Any, folder: Path, piece: int) -> None:
    ids, mask = tokens(2, 29), torch.ones(2, 29, dtype=torch.int64)
    mask[0, :5] = 0
    for home, kept in ((folder, 29), (hybrid[1], 1)):
        whole, pieces = (OrtModel(home, library=False, piece=n)(ids, mask) for n in (29, piece))
        assert pieces.logits.shape == (2, kept, VOCABULARY + 1)
        real = mask[:, -kept:].bool()
        torch.testing.assert_close(pieces.logits[real], whole.logits[real], atol=1e-4, rtol=0)
        assert pieces.past_key_values.columns == 29


def test_a_state_of_zeros_in_the_middle_is_noticed(model: Any, folder: Path, kind: str) -> None:
    running = opened(folder, kind)
    ids = tokens(1, 60)
    states = running(ids[:, :40]).past_key_values
    forgotten = OrtStates(running.empty_states(1).values, 40)
    kept, lost = (running(ids[:, 40:], past_key_values=s).logits for s in (states, forgotten))
    with torch.no_grad():
        expected = model(ids).logits[:, 40:]
    torch.testing.assert_close(kept, expected, atol=1e-4, rtol=0)
    assert (lost - expected).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_real_token(model: Any, folder: Path, kind: str, side: str) -> None:
    running = opened(folder, kind)
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.int64)
    if side != "right":
        mask[0, :9] = 0
    if side != "left":
        mask[1, 33:] = 0
    states, out = None, []
    for first, last in ((0, 20), (20, 21), (21, 50)):
        result = running(ids[:, first:last], mask[:, :last], states)
        states = result.past_key_values
        out.append(result.logits)
    out = torch.cat(out, 1)
    for row in range(2):
        real = mask[row].bool()
        with torch.no_grad():
            expected = model(ids[row, real][None]).logits[0]
        torch.testing.assert_close(out[row, real], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(do_sample=True, top_k=8)], ids=str)
def test_generate_writes_what_pytorch_writes(
    model: Any, folder: Path, kind: str, how: dict[str, Any]
) -> None:
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    written = []
    for one in (model, opened(folder, kind)):
        torch.manual_seed(0)
        written.append(one.generate(ids, attention_mask=mask, max_new_tokens=40, **how))
    assert torch.equal(*written)


def test_200_greedy_tokens_are_pytorchs(model: Any, folder: Path, kind: str) -> None:
    ids = tokens(1, 17)
    written = [m.generate(ids, max_new_tokens=200, do_sample=False) for m in (model, opened(folder, kind))]
    assert written[0].shape == (1, 217)
    assert torch.equal(*written)
    assert len(written[0].unique()) > 10


class _Heard(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


def test_tokens_are_streamed_as_they_come(folder: Path) -> None:
    heard, ids = _Heard(), tokens(1, 5)
    out = opened(folder, "body").generate(ids, max_new_tokens=7, streamer=heard)
    assert [len(piece) for piece in heard.pieces] == [5, *[1] * 7, 0]
    assert sum(heard.pieces, []) == out[0].tolist()


def test_a_prompts_states_can_be_continued_twice(folder: Path) -> None:
    running, ids = opened(folder, "body"), tokens(1, 30)
    states = running(ids).past_key_values
    size = states.nbytes
    one, other = (running(tokens(1, 9, seed), past_key_values=states) for seed in (1, 2))
    again = running(tokens(1, 9, 1), past_key_values=states)
    assert torch.equal(one.logits, again.logits) and not torch.equal(one.logits, other.logits)
    assert one.past_key_values.nbytes == size


def test_a_hybrid_with_softmax_layers_generates(hybrid: tuple[Any, Path], kind: str) -> None:
    model, folder = hybrid
    running, ids = opened(folder, kind), tokens(1, 19)
    assert running(ids).logits.shape == (1, 1, VOCABULARY + 1)
    before = library.calls()
    written = [m.generate(ids, max_new_tokens=20, do_sample=False) for m in (model, running)]
    assert torch.equal(*written)
    assert library.calls() - before == (20 if kind == "library" else 0)


def test_salient_tokens_are_chosen_as_in_pytorch(salient: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = salient
    running, ids = OrtModel(folder, piece=50), tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    first = running(ids[:, :40], mask[:, :40]).past_key_values
    last = running(ids[:, 40:], mask, first)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, 40:]
    torch.testing.assert_close(last.logits, expected, atol=1e-4, rtol=0)
    assert last.past_key_values.nbytes == first.nbytes
    lost = running(ids[:, 40:], mask, OrtStates(running.empty_states(2).values, 40)).logits
    assert (lost - expected).abs().max() > 0.1
    how = dict(attention_mask=mask, max_new_tokens=50, num_beams=2)
    assert torch.equal(*(one.generate(ids, **how) for one in (model, running)))
    assert running.obstacle is not None, "the library has no kernel for it"
    with pytest.raises(ExportError, match="genai cannot run .* by the library"):
        lz.onnx.write_genai(folder / "model.onnx", model.config, model.generation_config, library=True)
    small = lz.onnx.quantize(folder / "model.onnx", tmp_path / "model.onnx")
    out = OrtModel(tmp_path / "model.onnx")(ids[:, 40:], mask, first).logits
    assert (out - expected).norm() < 0.1 * expected.norm()
    assert small.error is not None and small.error < 0.1


def test_embeddings_of_an_encoder_are_pytorchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    model = awake(
        lz.linearize(
            BertModel(config, add_pooling_layer=False).eval(), mechanism="augmented_paper", group_size=GROUP
        )
    )
    with pytest.raises(ExportError, match="last_logits"):
        lz.export_onnx(model, tmp_path / "encoder", last_logits=True)
    lz.export_onnx(model, tmp_path / "encoder")
    ids, mask = tokens(2, 37), torch.ones(2, 37, dtype=torch.int64)
    mask[1, 20:] = 0
    found = OrtModel(tmp_path / "encoder").embed(ids, mask)
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    similarity = torch.nn.functional.cosine_similarity(found, mean)
    torch.testing.assert_close(similarity, torch.ones(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_what_cannot_run_is_said_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not there"):
        OrtModel(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="cannot run"):
        OrtModel(tmp_path, library=False)
    with pytest.raises(InputError, match="piece"):
        OrtModel(folder, piece=0)
    with pytest.raises(ExportError, match="NoSuchProvider"):
        OrtModel(folder, providers=["NoSuchProvider"])
    running = opened(folder, "body")
    with pytest.raises(InputError, match=r"must be \[1, 7\]"):
        running(tokens(1, 4), torch.ones(1, 4), running(tokens(1, 3)).past_key_values)
    with pytest.raises(InputError, match="embeddings"):
        running.embed(tokens(1, 3))


def test_cuda_is_used_where_onnxruntime_has_it(folder: Path) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDAExecutionProvider here")
    running = OrtModel(folder)
    assert running.providers[0] == "CUDAExecutionProvider" and running.obstacle is not None


# ------------------------------------------------------------------------------------------------- genai


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="the extra `dev` brings onnxruntime-genai")


def written_by(genai: Any, folder: Path, ids: Tensor, count: int) -> list[int]:
    opened = genai.Model(str(folder))
    params = genai.GeneratorParams(opened)
    params.set_search_options(max_length=ids.shape[1] + count, do_sample=False)
    generator = genai.Generator(opened, params)
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


def test_genai_opens_the_folder_as_it_is_and_writes_200_tokens_like_pytorch(
    genai: Any, model: Any, folder: Path
) -> None:
    ids = tokens(1, 17)
    expected = model.generate(ids, max_new_tokens=200, do_sample=False)[0].tolist()
    assert written_by(genai, folder, ids, 200) == expected


def test_genai_runs_a_hybrid_with_softmax_layers(genai: Any, hybrid: tuple[Any, Path]) -> None:
    model, folder = hybrid
    ids = tokens(1, 17)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)[0].tolist()
    assert written_by(genai, folder, ids, 60) == expected


def test_genai_writes_with_salient_tokens_like_pytorch(genai: Any, salient: tuple[Any, Path]) -> None:
    model, folder = salient
    ids = tokens(1, 70)
    expected = model.generate(ids, max_new_tokens=100, do_sample=False)[0].tolist()
    assert written_by(genai, folder, ids, 100) == expected


def test_genai_runs_by_the_library_when_asked_to(
    genai: Any, model: Any, folder: Path, tmp_path: Path
) -> None:
    if library.unavailable_reason() is not None:
        pytest.skip(str(library.unavailable_reason()))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    lz.onnx.write_genai(tmp_path / "model.onnx", model.config, model.generation_config, library=True)
    ids, before = tokens(1, 17), library.calls()
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0].tolist()
    assert written_by(genai, tmp_path, ids, 30) == expected
    assert library.calls() - before >= 30 * 2


def test_the_genai_config_says_when_there_is_no_name_for_a_state(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    path = lz.onnx.write_genai(folder / "model.onnx", config, generation)
    settings = json.loads(path.read_text())["model"]
    assert settings["decoder"]["inputs"]["past_conv_names"] == "past.%d.conv"
    assert settings["vocab_size"] == VOCABULARY + 1 and settings["context_length"] == 4096
    file = onnx.load(folder / "model.onnx")
    file.graph.input[-1].name += ".1"
    onnx.save(file, tmp_path / "two.onnx")
    with pytest.raises(ExportError, match="one state for a layer"):
        lz.onnx.write_genai(tmp_path / "two.onnx", config, generation)
    file.graph.output[0].name = "hidden"
    onnx.save(file, tmp_path / "encoder.onnx")
    with pytest.raises(ExportError, match="no decoder"):
        lz.onnx.write_genai(tmp_path / "encoder.onnx", config, generation)
