"""States in rows of bytes, and flat batches of many sequences, against one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from linearize.kernels.salient import Flat
from torch import Tensor

import linearize as lz
from linearize import mechanisms
from linearize.errors import InvalidModelError
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.serving.ragged import Batch, attend
from linearize.serving.served import share_of
from linearize.serving.slots import Layout

SPEC = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, causal=True)
SMALL = {"window": 5, "sinks": 2, "salient": 3, "features": 16}
CPU = torch.device("cpu")


def module_of(name: str, spec: SiteSpec = SPEC, conv_taps: int = 3, **options: object) -> lz.AttentionModule:
    known = mechanisms.get(name).options
    options = {key: value for key, value in SMALL.items() if key in known} | options
    torch.manual_seed(0)
    module = build_attention(
        spec, lz.LinearizeConfig(mechanism=name, group_size=4, conv_taps=conv_taps, options=options)
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.requires_grad_(False)


Steps = list[list[tuple[int, int]]]


def served(module: lz.AttentionModule, lengths: list[int], order: Steps) -> list[Tensor]:
    """Outputs of sequences that are served in steps; order: of each step, sequences and how many tokens."""
    spec, layout = module.spec, Layout.of(module, torch.float32, CPU)
    memory = torch.randint(0, 256, (len(lengths) + 3, layout.nbytes + 128), dtype=torch.uint8)
    states = layout.over(memory[:, : layout.nbytes + 64])
    tokens = [sequence(spec, length, seed) for seed, length in enumerate(lengths)]
    outputs, done = [list[Tensor]() for _ in lengths], [0] * len(lengths)
    for step in order:
        parts = [[x[done[i] : done[i] + n] for x in tokens[i]] for i, n in step]
        bounds = torch.tensor([0, *(n for _, n in step)], dtype=torch.int32).cumsum(0)
        for i, n in step:
            done[i] += n
        slots = torch.tensor([len(lengths) + 2 - i for i, _ in step], dtype=torch.int32)
        batch = Batch.of(slots, bounds, torch.tensor([done[i] for i, _ in step], dtype=torch.int32))
        padded = [torch.cat([*x, torch.full_like(x[0][:1], torch.nan)]) for x in zip(*parts, strict=True)]
        out = attend(module, layout, states, *padded, batch)
        assert not out[int(bounds[-1]) :].any()
        for (i, _), piece in zip(step, out.split([n for _, n in step] + [1]), strict=False):
            outputs[i].append(piece)
    return [torch.cat(x) for x in outputs]


def sequence(spec: SiteSpec, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    sizes = (spec.num_heads, spec.head_dim), (spec.num_key_value_heads, spec.head_dim)
    sizes = *sizes, (spec.num_key_value_heads, spec.value_dim)
    query, key, value = (torch.randn(length, *size, generator=source) for size in sizes)
    return query, key, value


def alone(module: lz.AttentionModule, length: int, seed: int) -> Tensor:
    tokens = (x.transpose(0, 1)[None] for x in sequence(module.spec, length, seed))
    return module(*tokens)[0].transpose(0, 1)


WITH_STATE = sorted(
    name
    for name in mechanisms.available()
    if not mechanisms.get(name).refusal(SPEC) and module_of(name).has_state
)
LENGTHS = [70, 33, 1, 90]
ORDER = [
    [(0, 40)],
    [(0, 1), (1, 30)],  # one runs, one begins
    [(0, 1), (1, 1), (2, 1)],  # one that begins with its only token
    [(3, 7)],
    [(1, 1), (0, 5), (3, 13)],  # a running one, and two pieces of prompts
    [(0, 1), (3, 64), (1, 1)],  # a row of one token behind one of several
    *[[(0, 1), (3, 1)]] * 6,
    [(0, 16)],
]


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_flat_batch_gives_each_sequence_what_it_would_get_alone(name: str) -> None:
    module = module_of(name)
    for i, found in enumerate(served(module, LENGTHS, ORDER)):
        assert len(found) == LENGTHS[i]
        torch.testing.assert_close(found, alone(module, LENGTHS[i], i), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [{"kv_layout": "tiled"}, {"value_dim": 3}, {"num_heads": 2}], ids=str)
def test_sites_of_other_shapes(spec: dict[str, object]) -> None:
    module = module_of("augmented", SiteSpec(**{**SPEC.to_dict(), **spec}))
    for i, found in enumerate(served(module, LENGTHS, ORDER)):
        torch.testing.assert_close(found, alone(module, LENGTHS[i], i), rtol=1e-4, atol=1e-5)


def test_a_slot_is_cleared_for_whoever_comes_next() -> None:
    module = module_of("augmented")
    layout = Layout.of(module, torch.float32, CPU)
    states = layout.over(torch.zeros(2, layout.nbytes, dtype=torch.uint8))
    for seed, length in ((0, 50), (1, 1), (2, 60)):
        tokens = sequence(SPEC, length, seed)
        bounds, slot = torch.tensor([0, length]), torch.tensor([1])
        out = attend(module, layout, states, *tokens, Batch.of(slot, bounds, torch.tensor([length])))
        torch.testing.assert_close(out, alone(module, length, seed), rtol=1e-4, atol=1e-5)


def test_the_tensors_of_a_state_lie_apart_in_its_row() -> None:
    module = module_of("augmented")
    layout = Layout.of(module, torch.float32, CPU)
    tensors = layout.over(torch.zeros(3, layout.nbytes + 8, dtype=torch.uint8)).tensors()
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()
    assert 0 <= layout.nbytes - layout.empty.nbytes < 64 * len(tensors)


def test_the_default_goes_through_one_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("augmented")
    monkeypatch.setattr(module, "extend", None)
    for i, found in enumerate(served(module, LENGTHS, ORDER)):
        torch.testing.assert_close(found, alone(module, LENGTHS[i], i), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 40])
def test_the_compiled_call_changes_what_it_is_given_and_nothing_else(dtype: torch.dtype, window: int) -> None:
    module = module_of("augmented", conv_taps=1, window=window)
    layout = Layout.of(module, dtype, CPU)
    memory = torch.zeros(4, layout.nbytes, dtype=torch.uint8)
    layout.clear(states := layout.over(memory), torch.arange(4))
    query, key, value = (x.to(dtype) for x in sequence(SPEC, 300, 0))
    batch = [torch.tensor(x) for x in ([3, 1], [100, 5], [150, 90])]
    with torch.no_grad():
        found = module.extend_flat(query, key, value, states, Flat(*batch))
        assert found is not None
        for slot, first, count in zip(*map(Tensor.tolist, batch), strict=True):
            own = module.new_state(1, dtype=dtype, device=CPU)
            tokens = (x[first : first + count].transpose(0, 1)[None] for x in (query, key, value))
            expected = module.extend(*tokens, own)[0].transpose(0, 1)
            assert torch.equal(found[first : first + count], expected)
            for whole, one in zip(states.tensors(), own.tensors(), strict=True):
                assert torch.equal(whole[slot : slot + 1], one)
    assert not found[:5].any() and not found[95:100].any() and not found[250:].any()
    for whole, one in zip(states.tensors(), layout.empty.tensors(), strict=True):
        assert torch.equal(whole[[0, 2]], one.expand_as(whole[[0, 2]]))


@pytest.mark.parametrize(
    "wrong", [([4], [0], [1]), ([-1], [0], [1]), ([1], [9], [2]), ([1, 1], [0, 1], [1, 1])]
)
def test_what_is_not_there_is_not_read(wrong: tuple[list[int], ...]) -> None:
    module = module_of("augmented")
    layout = Layout.of(module, torch.float32, CPU)
    states = layout.over(torch.zeros(4, layout.nbytes, dtype=torch.uint8))
    with torch.no_grad(), pytest.raises(ValueError, match="not there"):
        module.extend_flat(*sequence(SPEC, 10, 0), states, Flat(*map(torch.tensor, wrong)))


def test_weights_that_are_changed_are_heard() -> None:
    module = module_of("augmented")
    layout = Layout.of(module, torch.float32, CPU)
    states = layout.over(torch.zeros(2, layout.nbytes, dtype=torch.uint8))
    tokens, batch = sequence(SPEC, 150, 0), [torch.tensor([x]) for x in (1, 0, 150)]
    outputs = []
    for tail, taps in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.1)):
        module.tail_weight.fill_(tail)
        module.conv_weight.fill_(taps)
        layout.clear(states, batch[0])
        with torch.no_grad():
            outputs.append(module.extend_flat(*tokens, states, Flat(*batch)))
        torch.testing.assert_close(outputs[-1], alone(module, 150, 0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_processes_share_key_value_heads_or_nothing() -> None:
    half = share_of(SPEC, 2)
    assert (half.num_heads, half.num_key_value_heads) == (2, 1)
    with pytest.raises(InvalidModelError, match="cannot be shared by 4"):
        share_of(SPEC, 4)
    with pytest.raises(InvalidModelError, match="tiled"):
        share_of(SiteSpec(**{**SPEC.to_dict(), "kv_layout": "tiled"}), 2)
