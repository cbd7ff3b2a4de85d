"""Small files with one node of `ai.linearize` and its body, and calls of them against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import torch
from linearize.kernels.naive import augmented_attention
from onnx import TensorProto, helper
from torch import Tensor

from linearize.onnx import body
from linearize.onnx.schema import DOMAIN, FAMILIES, OPERATORS, VERSION, window_rows

OPSET = 20
FLOAT, FLOAT16, BFLOAT16, DOUBLE = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
)
_KINDS = {"float": FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def write_node(
    path: Path,
    name: str = FAMILIES["relu2"],
    dtype: int = FLOAT,
    *,
    group_size: int = 64,
    normalize: int = 1,
    sizes: body.Sizes | None = None,
) -> Path:
    """One node with its body, which `sizes` are told to. The file's inputs and outputs of type T are float,
    with casts around the node for another T, so that numpy has all of them."""
    operator = OPERATORS[name]
    inputs, before, taken = [], [], []
    for given, kind in operator.inputs:
        inputs.append(helper.make_tensor_value_info(given, _KINDS.get(kind, FLOAT), None))
        cast = kind == "T" and dtype != FLOAT
        taken.append(f"{given}_cast" if cast else given)
        if cast:
            before.append(helper.make_node("Cast", [given], [taken[-1]], to=dtype))
    outputs, after, made = [], [], []
    for given, kind in operator.outputs:
        outputs.append(helper.make_tensor_value_info(given, FLOAT, None))
        cast = kind == "T" and dtype != FLOAT
        made.append(f"{given}_cast" if cast else given)
        if cast:
            after.append(helper.make_node("Cast", [made[-1]], [given], to=FLOAT))
    node = helper.make_node(name, taken, made, domain=DOMAIN, group_size=group_size, normalize=normalize)
    types = [helper.make_tensor_value_info(x, dtype, None) for x in (*taken, *made) if x.endswith("_cast")]
    graph = helper.make_graph([*before, node, *after], "graph", inputs, outputs, value_info=types)
    function = onnx_ir.serde.serialize_function(body.function(name, OPSET, sizes))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.save(model, path)
    return path


@dataclass(frozen=True)
class Case:
    """Tokens of one operator call, float64, and what they give by `kernels/naive.py`."""

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor
    alpha: Tensor
    local_scale: Tensor
    conv_weight: Tensor
    group_size: int
    activation: str
    normalize: bool

    @classmethod
    def random(
        cls,
        length: int,
        *,
        group_size: int = 64,
        taps: int = 32,
        dim: int = 32,
        value_dim: int = 32,
        heads: tuple[int, int] = (4, 2),
        activation: str = "relu2",
        normalize: bool = True,
        padded: bool = False,
        digits: Any = np.float32,
    ) -> Case:
        """digits: the numpy type in which every number is exact."""
        numbers = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=numbers, dtype=torch.float64)
            return torch.from_numpy(x.numpy().astype(digits).astype(np.float64))

        scale = 1.0 if normalize else dim**-0.5
        real = torch.ones(2, length, dtype=torch.bool)
        if padded:
            real = torch.rand(2, length, generator=numbers) < 0.8
            real[0, : length // 4], real[1, length // 4 :] = False, True
        return cls(
            query=normal(2, heads[0], length, dim) * scale,
            key=normal(2, heads[1], length, dim) * scale,
            value=normal(2, heads[1], length, value_dim),
            real=real,
            alpha=normal(heads[0]),
            local_scale=normal(heads[0]),
            conv_weight=normal(heads[0], taps) * 0.3,
            group_size=group_size,
            activation=activation,
            normalize=normalize,
        )

    def expected(self) -> np.ndarray:
        """The oracle on the real tokens alone; zeros elsewhere."""
        out = torch.zeros(*self.query.shape[:3], self.value.shape[3], dtype=torch.float64)
        repeats = self.query.shape[1] // self.key.shape[1]
        for row, real in enumerate(self.real):
            at = real.nonzero()[:, 0]
            one = [x[row : row + 1, :, at] for x in (self.query, self.key, self.value)]
            out[row, :, at] = augmented_attention(
                one[0],
                one[1].repeat_interleave(repeats, 1),
                one[2].repeat_interleave(repeats, 1),
                alpha=self.alpha,
                conv_weight=self.conv_weight,
                local_scale=self.local_scale,
                activation=self.activation,
                group_size=self.group_size,
                normalize=self.normalize,
            )[0]
        return out.numpy()

    def run(
        self, session: ort.InferenceSession, chunks: Sequence[int], *, forget: bool = False
    ) -> np.ndarray:
        """In pieces of the given lengths; masked tokens hold NaN. forget: a new state for each piece."""
        batch, kv_heads, length, dim = self.key.shape
        width = self.value.shape[3]
        assert sum(chunks) == length
        rows = window_rows(self.group_size, self.conv_weight.shape[1])
        empty = (
            np.zeros((batch, kv_heads, dim, width), np.float32),
            np.zeros((batch, kv_heads, rows, dim + width), np.float32),
        )
        state, seen = empty, np.zeros(batch, np.int64)
        tables = {
            name: getattr(self, name).numpy().astype(np.float32)
            for name in ("alpha", "local_scale", "conv_weight")
        }
        outs, start = [], 0
        for count in chunks:
            real = self.real[:, start : start + count]
            tokens = {
                name: torch.where(
                    real[:, None, :, None], getattr(self, name)[:, :, start : start + count], torch.nan
                )
                .numpy()
                .astype(np.float32)
                for name in ("query", "key", "value")
            }
            past = dict(past_recurrent=state[0], past_window=state[1], past_length=seen)
            out, *state = session.run(None, {**tokens, "mask": real.numpy(), **past, **tables})
            if forget:
                state = empty
            outs.append(out)
            seen = seen + real.sum(1).numpy()
            start += count
        return np.concatenate(outs, 2)


def session_options(level: str = "ORT_ENABLE_ALL", threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return options
