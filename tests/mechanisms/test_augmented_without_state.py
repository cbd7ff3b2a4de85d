"""`augmented` of the last queries of a text, without a state: exact where no earlier query is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

LENGTH = 150


def build(**options: int) -> Any:
    config = LinearizeConfig(mechanism="augmented", conv_taps=3, options=options)
    module = build_attention(SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True), config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, LENGTH, d, generator=generator) for n, d in ((4, 8), (2, 8), (2, 6))]


@pytest.mark.parametrize("last", (1, 5, 33, 149))
def test_windows_and_first_tokens_need_no_earlier_query(last: int) -> None:
    module, (query, key, value) = build(window=20, sinks=3, salient=0), given()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 4:50] = False
    for mask in (None, real):
        whole = module(query, key, value, key_mask=mask)[:, :, -last:]
        late = query[:, :, -last:].clone().requires_grad_()
        out = module(late, key, value, key_mask=mask)
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
        out.sum().backward()
        assert late.grad is not None and late.grad.isfinite().all()
        if last > 9:  # the same with columns after the last query, as static caches have
            part = module(query[:, :, -last:-9], key, value, key_mask=mask, query_start=LENGTH - last)
            torch.testing.assert_close(part, whole[:, :, :-9], atol=1e-5, rtol=1e-5)


def test_salient_tokens_need_the_earlier_queries_as_soon_as_a_token_is_left_out() -> None:
    module, (query, key, value) = build(window=20, sinks=3, salient=30), given()
    whole = module(query, key, value)
    for length in (10, 54):
        part = [x[:, :, :length] for x in (key, value)]
        out = module(query[:, :, length - 2 : length], *part)
        torch.testing.assert_close(out, whole[:, :, length - 2 : length], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"1 queries and 55 keys.*linearize\(\).*'salient': 0"):
        module(query[:, :, 54:55], key[:, :, :55], value[:, :, :55])
    with pytest.raises(InputError, match="static cache"):
        module(query[:, :, :1], key, value, query_start=torch.tensor(0))
