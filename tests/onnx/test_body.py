"""The bodies of the operators, run by onnxruntime without our library, against the float64 oracles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bounds import bound
from linearize.kernels.naive import augmented_attention
from onnx.reference import ReferenceEvaluator
from onnx_nodes import Case, session_options, write_node
from torch import Tensor

from linearize.mechanisms.augmented import naive as salient_oracle
from linearize.mechanisms.softmax_window import naive as window_oracle
from linearize.onnx import body
from linearize.onnx.file import OPSETS
from linearize.onnx.schema import DOMAIN, FAMILIES, OPERATORS, OWN, VERSION, window_rows

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 9
SIZES = body.Sizes(HEADS, KV_HEADS, DIM, VALUE_DIM, taps=5)
# Calls that begin at 0 and at 1 modulo the group, of one token, of a part of a group and of several groups.
CHUNKS = (33, 1, 1, 13, 16, 1, 20)
WINDOW_SOFTMAX, SALIENT = "WindowSoftmaxLinearAttention", "SalientAttention"


def session(path: Path, level: str) -> ort.InferenceSession:
    return ort.InferenceSession(path, session_options(level), providers=["CPUExecutionProvider"])


def single(name: str, opset: int = 20, sizes: body.Sizes | None = None, **attributes: Any) -> onnx.ModelProto:
    """A model of one node with its body, which `sizes` are told to."""
    import onnx_ir

    kinds = {"T": 1, "float": 1, "int64": 7, "bool": 9}
    ranks = {"mask": 2, "past_length": 1, "start": 1, "alpha": 1, "local_scale": 1, "far_weight": 1}
    ranks |= {"conv_weight": 2, "query_map": 3, "key_map": 3}
    operator = OPERATORS[name]

    def values(items: Any) -> list[Any]:
        return [
            onnx.helper.make_tensor_value_info(n, kinds[k], [f"{n}_{a}" for a in range(ranks.get(n, 4))])
            for n, k in items
        ]

    inputs, outputs = values(operator.inputs), values(operator.outputs)
    node = onnx.helper.make_node(
        name, [x.name for x in inputs], [x.name for x in outputs], domain=DOMAIN, **attributes
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "graph", inputs, outputs),
        functions=[onnx_ir.serde.serialize_function(body.function(name, opset, sizes))],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def opened(model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    return ort.InferenceSession(
        model.SerializeToString(), session_options(level), providers=["CPUExecutionProvider"]
    )


def padded(x: Tensor, columns: np.ndarray, width: int) -> np.ndarray:
    """x [B, n, T, D] at `columns` [B, T] of `width`, NaN elsewhere."""
    out = np.full((*x.shape[:2], width, x.shape[3]), np.nan, np.float32)
    for row, at in enumerate(columns):
        out[row][:, at] = x[row]
    return out


def random_columns(length: int, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Increasing columns [2, length] among length + extra, and their mask."""
    numbers = np.random.default_rng(length)
    columns = np.stack([np.sort(numbers.permutation(length + extra)[:length]) for _ in range(2)])
    mask = np.zeros((2, length + extra), bool)
    np.put_along_axis(mask, columns, True, 1)
    return columns, mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


STEEPEST = {"relu2": 2.0, "linear": 1.0, "laplace": 1.5, "yoso": 8.0}
"""Slope of each activation on [-1, 1] at most: so much larger is the rounding of a score in its weight."""


def near(found: np.ndarray, expected: np.ndarray, activation: str = "relu2") -> None:
    """As far as the sums over the tokens, and over the width for the norm and for the score, explain."""
    allowed = bound(torch.float32, expected.shape[2] + 2 * DIM, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=allowed * STEEPEST[activation])


def repeated(x: Tensor, axis: int = 1) -> Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, axis)


@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", FAMILIES)
def test_causal_pieces_with_padding_are_the_oracle(
    tmp_path: Path, activation: str, level: str, sizes: body.Sizes | None
) -> None:
    case = Case.random(
        sum(CHUNKS), group_size=16, taps=5, dim=DIM, value_dim=VALUE_DIM, activation=activation, padded=True
    )
    path = write_node(tmp_path / "node.onnx", FAMILIES[activation], group_size=16, sizes=sizes)
    found = case.run(session(path, level), CHUNKS)
    near(found, case.expected(), activation)
    forgetful = case.run(session(path, level), CHUNKS, forget=True)
    assert np.abs(forgetful - case.expected()).max() > 0.1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("group", "taps"), [(64, 32), (1, 1), (1, 6), (4, 40), (100, 3), (16, 17)])
def test_groups_and_taps_of_any_size(tmp_path: Path, group: int, taps: int, level: str) -> None:
    chunks = (130, 1, 1, 62, 64, 1, 5, 1)
    case = Case.random(sum(chunks), group_size=group, taps=taps, dim=DIM, value_dim=DIM)
    path = write_node(tmp_path / "node.onnx", group_size=group)
    found = case.run(session(path, level), chunks)
    near(found, case.expected())


def test_without_normalisation(tmp_path: Path) -> None:
    case = Case.random(80, group_size=16, taps=3, normalize=False)
    path = write_node(tmp_path / "node.onnx", group_size=16, normalize=0)
    near(case.run(session(path, LEVELS[1]), (50, 30)), case.expected())


def test_rows_of_zeros_stay_zeros(tmp_path: Path) -> None:
    case = Case.random(20, group_size=16, taps=3)
    case.query[:, :, 3], case.key[:, :, 5] = 0, 0
    path = write_node(tmp_path / "node.onnx", group_size=16)
    near(case.run(session(path, LEVELS[1]), (20,)), case.expected())


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_that_is_offered_runs(tmp_path: Path, opset: int) -> None:
    for name, operator in OPERATORS.items():
        if "Augmented" in name or name.removeprefix("Bidirectional") in OWN:
            values = {"int": 16, "float": 0.5}
            for sizes in (None, SIZES):
                opened(single(name, opset, sizes, **{n: values[kind] for n, kind in operator.attributes}))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", FAMILIES)
@pytest.mark.parametrize(("length", "group", "taps"), [(150, 64, 32), (75, 16, 20), (7, 16, 3), (1, 4, 2)])
def test_bidirectional_is_the_oracle(level: str, activation: str, length: int, group: int, taps: int) -> None:
    query, alpha = normal(2, HEADS, length, DIM), normal(HEADS, seed=1)
    key, scale = normal(2, KV_HEADS, length, DIM), normal(HEADS, seed=2)
    value, conv = normal(2, KV_HEADS, length, VALUE_DIM), normal(HEADS, 2 * taps - 1)
    columns, mask = random_columns(length, 5)
    sizes = SIZES._replace(taps=2 * taps - 1) if length % 2 else None
    model = single(f"Bidirectional{FAMILIES[activation]}", sizes=sizes, group_size=group, normalize=1)
    tokens = {
        n: padded(x, columns, length + 5) for n, x in (("query", query), ("key", key), ("value", value))
    }
    tables = dict(alpha=alpha.numpy(), local_scale=scale.numpy(), conv_weight=conv.numpy())
    (out,) = opened(model, level).run(None, {**tokens, "mask": mask, **tables})
    expected = augmented_attention(
        query,
        repeated(key),
        repeated(value),
        alpha=alpha,
        local_scale=scale,
        conv_weight=conv,
        activation=activation,
        group_size=group,
        causal=False,
    )
    found = np.stack([row[:, at] for row, at in zip(out, columns, strict=True)])
    near(found, expected.numpy(), activation)
    assert not out.transpose(0, 2, 1, 3)[~mask].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", FAMILIES)
@pytest.mark.parametrize(
    ("queries", "keys", "start", "group"), [(80, 60, 0, 16), (1, 60, 17, 16), (30, 20, 9, 16), (5, 7, 0, 1)]
)
def test_cross_is_the_oracle(
    level: str, activation: str, queries: int, keys: int, start: int, group: int
) -> None:
    query, alpha = normal(2, HEADS, queries, DIM), normal(HEADS, seed=1)
    key, scale = normal(2, KV_HEADS, keys, DIM), normal(HEADS, seed=2)
    value = normal(2, KV_HEADS, keys, VALUE_DIM)
    columns, mask = random_columns(keys, 5)
    sizes = SIZES if start % 2 else None
    model = single(f"Cross{FAMILIES[activation]}", sizes=sizes, group_size=group, normalize=1)
    (out,) = opened(model, level).run(
        None,
        dict(
            query=query.numpy(),
            key=padded(key, columns, keys + 5),
            value=padded(value, columns, keys + 5),
            mask=mask,
            start=np.array([start]),
            alpha=alpha.numpy(),
            local_scale=scale.numpy(),
        ),
    )
    expected = augmented_attention(
        query,
        repeated(key),
        repeated(value),
        alpha=alpha,
        local_scale=scale,
        conv_weight=None,
        activation=activation,
        group_size=group,
        causal=False,
        cross=True,
        query_start=start,
    )
    near(out, expected.numpy(), activation)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("window", [64, 16, 2, 1, 200])
def test_window_softmax_in_pieces_with_padding_is_the_oracle(level: str, window: int) -> None:
    length = sum(CHUNKS)
    query, query_map = normal(2, HEADS, length, DIM), normal(HEADS, DIM, DIM)
    key, key_map = normal(2, KV_HEADS, length, DIM), normal(KV_HEADS, DIM, DIM)
    value, far = normal(2, KV_HEADS, length, VALUE_DIM), normal(HEADS)
    sizes = SIZES if window > 16 else None
    running = opened(single(WINDOW_SOFTMAX, sizes=sizes, window=window, scale=0.5), level)
    recurrent = np.zeros((2, KV_HEADS, 2 * DIM, VALUE_DIM + 1), np.float32)
    rows = np.zeros((2, KV_HEADS, window_rows(window), DIM + VALUE_DIM), np.float32)
    found, seen = [], 0
    for count in CHUNKS:
        columns, mask = random_columns(count, 3)
        part = slice(seen, seen + count)
        out, recurrent, rows = running.run(
            None,
            dict(
                query=padded(query[:, :, part], columns, count + 3),
                key=padded(key[:, :, part], columns, count + 3),
                value=padded(value[:, :, part], columns, count + 3),
                mask=mask,
                past_recurrent=recurrent,
                past_window=rows,
                past_length=np.full(2, seen),
                query_map=query_map.numpy(),
                key_map=key_map.numpy(),
                far_weight=far.numpy(),
            ),
        )
        found.append(np.stack([row[:, at] for row, at in zip(out, columns, strict=True)]))
        seen += count
    double = [
        x.double() for x in (query, repeated(key), repeated(value), query_map, repeated(key_map, 0), far)
    ]
    expected = window_oracle(*double, window=window, sinks=0, scale=0.5, causal=True)
    np.testing.assert_allclose(np.concatenate(found, 2), expected, atol=1e-5)


SALIENT_SIZES = [
    pytest.param((8, 2, 4), id="all parts"),
    pytest.param((40, 0, 50), id="more kept than leave at once"),
    pytest.param((100, 12, 4), id="first tokens that leave the window with scores"),
    pytest.param((8, 3, 0), id="no salient tokens"),
    pytest.param((5, 40, 3), id="more sinks than a block"),
    pytest.param((5, 0, 0), id="a window alone"),
    pytest.param((0, 1, 5), id="no window"),
]


def salient_case(window: int, length: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with scores that differ enough, and weights of as many taps as the window lets."""
    sizes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    query, key, value = (normal(2, heads, length, width) for heads, width in sizes)
    return query * 2, key, value, normal(HEADS, min(window, 5) + 1)


def salient_expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    sizes: tuple[int, int, int],
    softcap: float | None = None,
) -> Tensor:
    """Token by token in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    causal, rows = conv_weight is not None, []
    for row in zip(query.unflatten(1, (KV_HEADS, -1)), key, value, strict=True):
        heads = [
            salient_oracle(*one, sizes=sizes, scale=0.5, softcap=softcap, causal=causal)
            for one in zip(*row, strict=True)
        ]
        rows.append(torch.cat(heads))
    out = torch.stack(rows)
    for lag in range(0 if conv_weight is None else conv_weight.shape[1]):
        moved = torch.nn.functional.pad(repeated(value), (0, 0, lag, 0))[:, :, : value.shape[2]]
        out = out + conv_weight.double()[:, lag, None, None] * moved
    return out


def salient_pieces(
    running: Any,
    case: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    chunks: Sequence[int],
    forget: bool = False,
) -> np.ndarray:
    """Outputs [B, H, T, Dv] of calls with padding between the tokens, NaN in it; row 1 is 5 tokens ahead."""
    query, key, value, conv_weight = case
    rows = max(sizes[1] + sizes[2], 1) + sizes[0] + 32
    empty = (
        np.zeros((2, KV_HEADS, rows, 4), np.float32),
        np.zeros((2, KV_HEADS, rows, DIM + VALUE_DIM), np.float32),
    )
    state, seen, found = empty, np.zeros(2, np.int64), [list[np.ndarray](), list[np.ndarray]()]
    length = query.shape[2]
    calls = [(count, count) for count in chunks]
    calls[0], calls[-1] = (calls[0][0], calls[0][1] + 5), (calls[-1][0], calls[-1][1] - 5)
    for counts in calls:
        width = max(counts) + (0 if max(counts) == 1 else 3)
        mask = np.zeros((2, width), bool)
        given = {
            n: np.full((2, x.shape[1], width, x.shape[3]), np.nan, np.float32)
            for n, x in (("query", query), ("key", key), ("value", value))
        }
        for row, count in enumerate(counts):
            at = np.sort(np.random.default_rng(width).permutation(width)[:count])
            mask[row, at] = True
            part = slice(seen[row], seen[row] + count)
            for n, x in (("query", query), ("key", key), ("value", value)):
                given[n][row][:, at] = x[row, :, part]
        past = dict(past_recurrent=state[0], past_window=state[1], past_length=seen)
        out, *state = running.run(None, {**given, "mask": mask, **past, "conv_weight": conv_weight.numpy()})
        assert [x.shape for x in state] == [x.shape for x in empty]
        assert not out.transpose(0, 2, 1, 3)[~mask].any()
        for row, parts in enumerate(found):
            parts.append(out[row][:, mask[row]])
        state = empty if forget else state
        seen = seen + counts
    assert seen.tolist() == [length, length]
    return np.stack([np.concatenate(parts, 1) for parts in found])


SALIENT_CHUNKS = (70, 1, 1, 13, 33, 1, 40, *[1] * 30, 11)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", SALIENT_SIZES)
def test_salient_tokens_in_pieces_with_padding_are_the_oracle(
    level: str, sizes: tuple[int, int, int]
) -> None:
    case = salient_case(sizes[0])
    told = SIZES._replace(taps=case[3].shape[1]) if sizes[0] > 5 else None
    attributes = dict(zip(("window", "sinks", "salient"), sizes, strict=True), scale=0.5)
    running = opened(single(SALIENT, sizes=told, **attributes), level)
    expected = salient_expected(*case, sizes)
    np.testing.assert_allclose(salient_pieces(running, case, sizes, SALIENT_CHUNKS), expected, atol=2e-5)
    forgetful = salient_pieces(running, case, sizes, SALIENT_CHUNKS, forget=True)
    assert np.abs(forgetful - expected.numpy()).max() > 0.1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("length", [150, 20, 1])
@pytest.mark.parametrize("sizes", [(8, 2, 4), (5, 0, 0), (0, 0, 3), (200, 4, 9)])
def test_bidirectional_salient_tokens_are_the_oracle(
    level: str, length: int, sizes: tuple[int, int, int]
) -> None:
    query, key, value, _ = salient_case(0, length)
    columns, mask = random_columns(length, 5)
    attributes = dict(zip(("window", "sinks", "salient"), sizes, strict=True), scale=0.5)
    model = single(f"Bidirectional{SALIENT}", sizes=SIZES if length % 2 else None, **attributes)
    tokens = {
        n: padded(x, columns, length + 5) for n, x in (("query", query), ("key", key), ("value", value))
    }
    (out,) = opened(model, level).run(None, {**tokens, "mask": mask})
    found = np.stack([row[:, at] for row, at in zip(out, columns, strict=True)])
    np.testing.assert_allclose(found, salient_expected(query, key, value, None, sizes), atol=1e-5)
    assert not out.transpose(0, 2, 1, 3)[~mask].any()


def test_capped_scores_of_salient_tokens_are_the_oracle() -> None:
    sizes, case = (8, 2, 4), salient_case(8)
    attributes = dict(zip(("window", "sinks", "salient"), sizes, strict=True), scale=0.5, softcap=1.5)
    found = salient_pieces(opened(single(f"Capped{SALIENT}", **attributes)), case, sizes, SALIENT_CHUNKS)
    np.testing.assert_allclose(found, salient_expected(*case, sizes, softcap=1.5), atol=2e-5)
    query, key, value, _ = case
    tokens = {name: x.numpy() for name, x in (("query", query), ("key", key), ("value", value))}
    model = opened(single(f"BidirectionalCapped{SALIENT}", **attributes))
    (out,) = model.run(None, {**tokens, "mask": np.ones((2, 200), bool)})
    expected = salient_expected(query, key, value, None, sizes, softcap=1.5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_reference_evaluator_runs_salient_tokens() -> None:
    sizes, case = (8, 2, 4), salient_case(8, 120)
    attributes = dict(zip(("window", "sinks", "salient"), sizes, strict=True), scale=0.5)
    found = salient_pieces(ReferenceEvaluator(single(SALIENT, **attributes)), case, sizes, (70, 1, 49))
    np.testing.assert_allclose(found, salient_expected(*case, sizes), atol=2e-5)


def test_the_reference_evaluator_agrees(tmp_path: Path) -> None:
    chunks = (20, 1, 14, 2)
    case = Case.random(sum(chunks), group_size=16, taps=5, dim=DIM, value_dim=DIM, padded=True)
    path = write_node(tmp_path / "node.onnx", group_size=16)
    reference: Any = ReferenceEvaluator(onnx.load(path))
    near(case.run(reference, chunks), case.expected())
