"""What a converted model asserts shows in a file without assertions: as NaN, never as other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from masked import OneAttention, ones
from torch import Tensor, nn

import linearize as lz

LINEAR: dict[str, Any] = dict(mechanism="augmented_paper", group_size=4)


def session(model: nn.Module, inputs: Any, path: Path) -> Any:
    lz.export_onnx(model, path, inputs)
    opened = onnxruntime.InferenceSession(path)
    names = [given.name for given in opened.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        return torch.from_numpy(
            opened.run(None, dict(zip(names, map(Tensor.numpy, tensors), strict=True)))[0]
        )

    return run


def apart(t: int, x: dict[str, Tensor]) -> Tensor:
    return ones(t).tril() & (x["segments"][:, None, :, None] == x["segments"][:, None, None])


@torch.no_grad()
def test_documents_that_a_file_cannot_take_apart_are_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, one = torch.randn(2, 11, 8), torch.zeros(2, 11, dtype=torch.long)
    model: Any = lz.linearize(OneAttention(apart, ("segments",), "fill", None).eval(), (x, one), **LINEAR)
    run = session(model, (x, one), tmp_path / "model.onnx")
    torch.testing.assert_close(run(x, one), model(x, one), atol=1e-5, rtol=1e-4)
    assert run(x, (torch.arange(11) // 5).expand(2, -1).contiguous()).isnan().all()


@torch.no_grad()
def test_a_mask_given_to_a_file_is_one_that_it_follows_or_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 11, 8)
    model: Any = lz.linearize(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), x, **LINEAR)
    nothing, causal = torch.zeros(11, 11, dtype=torch.bool), ~ones(11).tril()
    run = session(model, dict(src=x, mask=nothing), tmp_path / "model.onnx")
    torch.testing.assert_close(run(x, nothing), model(x), atol=1e-5, rtol=1e-4)
    assert run(x, causal).isnan().all()
