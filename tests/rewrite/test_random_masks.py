"""Random masks in random spellings, in converted models: equal to the original or refused, never different.

Each attention is converted on one short example that shows nothing: no padding, one document, a length below
most windows. It is then called at other lengths, on inputs that show everything. The mechanism is exact in a
window wider than the text, so that what differs is the mask. Carried are full, causal, window and band, with
padding, beside a window on the sides only, and outside of graphs with documents. Of what else the language
says, chunks, a module of one's own is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked import LATER, SHOWN, OneAttention, make_inputs
from random_masks import Drawn, drawn
from torch import Tensor
from torch.export import Dim

from linearize.convert.linearize import linearize
from linearize.errors import LinearizeError

EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 1024})
CARRIED = frozenset({"full", "causal", "window", "band", "padding"})
Made = Callable[..., Tensor] | None
"""What a call runs; None where the conversion is refused."""


def example(module: OneAttention, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    inputs = make_inputs(batch, length, seed)
    return torch.randn(batch, length, 8, generator=g), *(inputs[name] for name in module.names)


def converted(module: OneAttention) -> Made:
    try:
        return linearize(copy.deepcopy(module), example(module, *SHOWN, 0), **EXACT)
    except LinearizeError as error:
        assert len(str(error)) <= 600
        return None


def exported(module: OneAttention) -> Made:
    model, shown = converted(module), example(module, *SHOWN, 0)
    if model is None:
        return None
    model(*shown)
    sizes = tuple(dict.fromkeys(range(x.ndim if n else 2), Dim.AUTO) for n, x in enumerate(shown))
    shapes = (sizes[0], sizes[1:]) if module.names else sizes
    return torch.export.export(model, shown, dynamic_shapes=shapes).module()


def backend(module: OneAttention) -> Made:
    torch._dynamo.reset()
    options = {**EXACT, "inner": "eager"}
    compiled = torch.compile(module, backend="linearize", options=options, dynamic=True)
    try:
        compiled(*example(module, *SHOWN, 0))
    except LinearizeError:
        return None
    return None if options["backend"].report.refusals else compiled


def same(module: OneAttention, made: Callable[..., Tensor], everywhere: bool) -> bool:
    """Whether calls at other lengths and on other inputs give what the original does; False where one is
    refused. everywhere: to queries that are no one's key as well, which get zeros in a graph."""
    for batch, length in LATER:
        for seed in (1, 2):
            given = example(module, batch, length, seed)
            seen = module.mask(length, dict(zip(module.names, given[1:], strict=True)))
            seen = seen.expand(batch, 1, length, length)[:, 0]
            rows = seen.any(2) if everywhere else seen.any(2) & seen.any(1)
            try:
                found = made(*given)
            except (LinearizeError, RuntimeError) as error:
                assert isinstance(error, LinearizeError) or "mask" in str(error), error
                return False
            torch.testing.assert_close(found[rows], module(*given)[rows], atol=1e-5, rtol=1e-4)
    return True


def needless(one: Drawn, route: str) -> bool:
    """The refusal of what is carried; the padding of these inputs is anywhere."""
    carried = CARRIED | {"documents"} if route == "converted" else CARRIED
    return one.kinds <= carried and not ("padding" in one.kinds and one.kinds & {"window", "band"})


ROUTES = {"converted": converted, "exported": exported, "backend": backend}
SEEDS = [
    pytest.param("converted", range(6), id="converted-6"),
    pytest.param("exported", range(6), id="exported-6"),
    pytest.param("backend", range(6), id="backend-6"),
    pytest.param("converted", range(2000, 2100), id="converted-100", marks=pytest.mark.slow),
    pytest.param("exported", range(3000, 3050), id="exported-50", marks=pytest.mark.slow),
    pytest.param("backend", range(4000, 4050), id="backend-50", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("route", "seeds"), SEEDS)
@torch.no_grad()
def test_a_random_mask_is_followed_or_refused(route: str, seeds: range) -> None:
    count: Counter[str] = Counter()
    without_need, different = [], []
    for seed in seeds:
        one = drawn(seed)
        made = ROUTES[route](one.module)
        try:
            carried = made is not None and same(one.module, made, route == "converted")
        except AssertionError as error:
            different.append(f"seed {seed}, {set(one.kinds)}: {error}")
            continue
        count["carried" if carried else "refused"] += 1
        if not carried and needless(one, route):
            without_need.append(f"{seed}: {set(one.kinds)}")
    print(
        f"{route}: {len(seeds)} tried, {dict(count)}, {len(without_need)} of them without need", *without_need
    )
    assert not different, "\n".join(different)
    assert count["carried"] >= len(seeds) // 6 and len(without_need) <= len(seeds) // 10
