"""Random masks in random spellings: what the matcher says of each holds at lengths and inputs it never saw.

Each is captured once at one short length. The reading is then compared with the mask itself, evaluated at
other lengths and on other inputs. `other` and `prefix` are refusals and say nothing; a mask of the language
that is refused is counted. What becomes of such masks in converted models: `rewrite/test_random_masks.py`.
"""

from __future__ import annotations

from collections import Counter

import pytest
from linearize.passes.site import Pattern
from masked import check, reading
from random_masks import drawn

COUNTS = [pytest.param(range(24), id="24"), pytest.param(range(1000, 1200), id="200", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", COUNTS)
def test_what_is_said_of_a_random_mask_holds_where_it_was_not_seen(seeds: range) -> None:
    count: Counter[str] = Counter()
    needless: list[str] = []
    wrong: list[str] = []
    for seed in seeds:
        one = drawn(seed)
        mask = reading(one.module)
        if mask.pattern in (Pattern.OTHER, Pattern.PREFIX):
            count["refused"] += 1
            assert mask.why
            needless += [f"{seed}: {mask.why}"] if one.known else []
            continue
        assert not mask.bias, (seed, mask.label)
        count["accepted"] += 1
        try:
            check(one.module, mask)
        except AssertionError as error:
            wrong.append(f"seed {seed}: {mask}: {error}")
    print(f"{len(seeds)} tried: {dict(count)}, {len(needless)} refused without need", *needless, sep="\n")
    assert not wrong, "\n".join(wrong)
    assert count["accepted"] > len(seeds) // 3 and count["refused"] > len(seeds) // 10
    assert len(needless) <= len(seeds) // 25
