"""The bounds that other tests use: any order of a sum is inside, a fault of a thousandth is outside."""

from __future__ import annotations

import pytest
import torch
from bounds import bound


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("count", [10, 100, 1000])
def test_every_order_of_a_sum_is_inside_and_a_fault_is_not(count: int, positive: bool) -> None:
    torch.manual_seed(count)
    terms = torch.rand(50, count) if positive else torch.randn(50, count)
    exact = terms.double().sum(1)
    size = torch.maximum(exact.abs(), terms.double().norm(dim=1))
    allowed = bound(torch.float32, count) * size
    backwards = terms.flip(1).cumsum(1)[:, -1]
    one_by_one = terms[:, 0]
    for column in terms.T[1:]:
        one_by_one = one_by_one + column
    for found in (terms.sum(1), one_by_one, backwards, terms.sort(1).values.sum(1)):
        assert ((found - exact).abs() <= allowed).all()
        assert ((found + 1e-3 * size - exact).abs() > 10 * allowed).all()


def test_a_result_stored_in_a_narrow_type_may_be_off_by_its_unit() -> None:
    x = torch.randn(1000).double()
    for dtype in (torch.bfloat16, torch.float16):
        assert ((x.to(dtype).double() - x).abs() <= bound(dtype, 0, stored=1) * x.abs()).all()
