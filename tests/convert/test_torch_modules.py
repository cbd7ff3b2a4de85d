"""torch's own encoder, decoder and transformer convert with masks in all their spellings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.convert.linearize import linearize
from linearize.errors import VerificationError
from linearize.mechanisms.module import SoftmaxAttention

T, S = 9, 12
GENERATOR = torch.Generator().manual_seed(0)
X, MEMORY = torch.randn(2, T, 32, generator=GENERATOR), torch.randn(2, S, 32, generator=GENERATOR)
FUTURE = torch.ones(T, T, dtype=torch.bool).triu(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
PADDED, MEMORY_PADDED = torch.zeros(2, T, dtype=torch.bool), torch.zeros(2, S, dtype=torch.bool)
PADDED[1, 6:], MEMORY_PADDED[0, 9:] = True, True
ROW = PADDED.clone()
ROW[0] = True


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def encoder(batch_first: bool = True, **more: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first, **more), 1)


def decoder(batch_first: bool = True, **more: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=batch_first, **more), 1)


def layer() -> nn.Module:
    return nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)


def transformer() -> nn.Module:
    return nn.Transformer(32, 4, 1, 1, 48, batch_first=True)


class Masks(nn.Module):
    """An encoder as people use it: the mask is made in its caller's forward, without `is_causal`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask=mask, src_key_padding_mask=None if padded is None else additive(padded))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "encoder-padding": (encoder, dict(src=X, src_key_padding_mask=PADDED)),
    "encoder-all-padded": (encoder, dict(src=X, src_key_padding_mask=ROW)),
    "encoder-batch-second": (
        lambda: encoder(False, norm_first=True), dict(src=X.transpose(0, 1), src_key_padding_mask=PADDED)
    ),
    "encoder-mask": (encoder, dict(src=X, mask=CAUSAL)),
    "encoder-bool-mask-padding": (encoder, dict(src=X, mask=FUTURE, src_key_padding_mask=PADDED)),
    "encoder-norm-first": (lambda: encoder(norm_first=True), dict(src=X, mask=CAUSAL, is_causal=True)),
    "masks-made-inside": (Masks, dict(x=X, padded=PADDED)),
    "layer": (layer, dict(tgt=X, memory=MEMORY)),
    "decoder-mask-padding": (
        decoder,
        dict(
            tgt=X, memory=MEMORY, tgt_mask=CAUSAL, memory_key_padding_mask=MEMORY_PADDED,
        ),
    ),
    "decoder-batch-second": (
        lambda: decoder(False, norm_first=True),
        dict(
            tgt=X.transpose(0, 1), memory=MEMORY.transpose(0, 1), tgt_mask=FUTURE,
            tgt_key_padding_mask=PADDED, memory_key_padding_mask=MEMORY_PADDED,
        ),
    ),
    "transformer-one-sequence-without-memory-padding": (
        transformer,
        dict(src=MEMORY[:1], tgt=X[:1], tgt_mask=CAUSAL, src_key_padding_mask=MEMORY_PADDED[:1]),
    ),
    "transformer": (
        transformer,
        dict(
            src=MEMORY, tgt=X, tgt_mask=FUTURE, src_key_padding_mask=MEMORY_PADDED,
            tgt_key_padding_mask=PADDED, memory_key_padding_mask=MEMORY_PADDED,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_module_of_torch_with_masks_converts_exactly(name, capfd):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    original = make().eval()
    model = linearize(copy.deepcopy(original), inputs, mechanism="softmax")
    with torch.no_grad():
        found, expected = model(**inputs), original(**inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert capfd.readouterr().err == ""


def test_an_encoder_packs_nothing_while_it_is_converted_and_is_as_before_after_an_error():
    model = encoder().eval()
    with pytest.raises(Exception, match="cannot carry"):
        linearize(model, dict(src=X, mask=FUTURE), mechanism="linformer")
    assert model.use_nested_tensor


class Kept(nn.Module):
    """Attention with an integer mask of the tokens to keep."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.qkv, self.fill = nn.Linear(32, 96), fill

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (query @ key.mT * 8**-0.5).masked_fill(keep[:, None, None, :] == 0, self.fill)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("fill", (-torch.inf, -1e9))
@pytest.mark.parametrize("mechanism", ("softmax", "softmax_window"))
def test_a_sequence_without_any_token_is_no_reason_to_refuse(mechanism, fill):
    keep = torch.ones(2, T, dtype=torch.int32)
    keep[0], keep[1, 6:] = 0, 0
    original = Kept(fill).eval()
    model = linearize(copy.deepcopy(original), (X, keep), mechanism=mechanism)
    with torch.no_grad():
        torch.testing.assert_close(model(X, keep)[1, :6], original(X, keep)[1, :6], rtol=0, atol=2e-6)


def test_a_wrong_rewrite_shows_beside_a_sequence_without_tokens(monkeypatch):
    real = SoftmaxAttention.forward
    monkeypatch.setattr(SoftmaxAttention, "forward", lambda *args, **more: real(*args, **more) * 1.1)
    keep = torch.ones(2, T, dtype=torch.int32)
    keep[0] = 0
    with pytest.raises(VerificationError, match="differs"):
        linearize(Kept(-1e9).eval(), (X, keep), mechanism="softmax_window")
