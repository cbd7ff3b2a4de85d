"""Every mechanism with a state: pieces, steps, rewinds, trees and commits equal its parallel form."""

from __future__ import annotations

import itertools

import pytest
import torch

from linearize import mechanisms
from linearize.errors import InputError
from linearize.mechanisms.module import AttentionModule
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

STATELESS = {"softmax"}
OPTIONS = {
    "augmented": {"window": 7, "sinks": 1, "salient": 3},
    **{name: {"window": 7} for name in ("softmax_window", "power_window")},
}  # the default covers all here
VARIANTS = {
    "augmented_paper with means": ("augmented_paper", {"grouped": "mean"}),
    "softmax_window with first tokens alone": ("softmax_window", {"window": 7, "sinks": 9, "tail": "none"}),
    "power_window without first tokens": ("power_window", {"window": 7, "sinks": 0}),
}
NAMED = [
    (name, augmentation)
    for name, mechanism in mechanisms.available().items()
    for augmentation in (False, True)
    if "causal" in mechanism.supports and name not in STATELESS
] + [(name, True) for name in VARIANTS]


def build(name: str, augmentation: bool, kv_layout: str = "interleaved") -> AttentionModule:
    torch.manual_seed(0)
    spec = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True, scale=0.4, kv_layout=kv_layout)
    name, options = VARIANTS.get(name, (name, OPTIONS.get(name, {})))
    config = LinearizeConfig(
        mechanism=name, group_size=8, conv_taps=4, augmentation=augmentation, options=options
    )
    module = build_attention(spec, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def tokens(length: int = 50) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 6)


@pytest.mark.parametrize("kv_layout", ("interleaved", "tiled"))
@pytest.mark.parametrize("name, augmentation", NAMED)
@torch.no_grad()
def test_state_form_equals_parallel_form(name, augmentation, kv_layout):
    module = build(name, augmentation, kv_layout)
    query, key, value = tokens()
    whole = module(query, key, value)
    state = module.new_state(2, dtype=torch.float32, device=query.device, max_rewind=6)
    size = state.nbytes
    for start, stop in itertools.pairwise((0, 20, 21, 22, 23, 30, 31, 40, 41, 50)):
        piece = [x[:, :, start:stop] for x in (query, key, value)]
        torch.testing.assert_close(
            module.extend(*piece, state), whole[:, :, start:stop], atol=1e-5, rtol=1e-5
        )
    state.rewind(6)
    assert state.length.tolist() == [44, 44] and state.nbytes == size

    # A chain of 4 tokens and, beside it, another that starts with the same one.
    branch = torch.tensor([44, 45, 46, 47, 49, 49])
    drafts = [x[:, :, branch] for x in (query, key, value)]
    out = module.tree(*drafts, state, torch.tensor([-1, 0, 1, 2, 0, 4]))
    torch.testing.assert_close(out[:, :, :4], whole[:, :, 44:48], atol=1e-5, rtol=1e-5)
    module.commit(*drafts, state, torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]]))
    assert state.length.tolist() == [48, 46]
    state.rewind(torch.tensor([2, 0]))
    piece = [x[:, :, 46:] for x in (query, key, value)]
    torch.testing.assert_close(module.extend(*piece, state), whole[:, :, 46:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ("augmented", "augmented_paper", "performer", "softmax_window", "power_window", "yoso", "castling"),
)
@torch.no_grad()
def test_padded_tokens_change_nothing_and_give_nothing(name):
    module = build(name, True)
    query, key, value = tokens(20)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    for x in (query, key, value):
        x[0, :, :7] = torch.nan
    state = module.new_state(2, dtype=torch.float32, device=query.device)
    out = module.extend(query, key, value, state, key_mask=real)
    alone = module(*(x[:1, :, 7:] for x in (query, key, value)))
    torch.testing.assert_close(out[:1, :, 7:], alone, atol=1e-5, rtol=1e-5)
    assert state.length.tolist() == [13, 20]
    assert (out[0, :, :7] == 0).all()


@pytest.mark.parametrize("name, augmentation", NAMED)
@torch.no_grad()
def test_states_of_half_precision_with_float32_parameters(name, augmentation):
    module = build(name, augmentation)
    query, key, value = (x.bfloat16() for x in tokens(40))
    whole = module(query, key, value)
    state = module.new_state(2, dtype=torch.bfloat16, device=query.device, max_rewind=2)
    for start, stop in itertools.pairwise((0, 20, 21, 22, 40)):
        piece = [x[:, :, start:stop] for x in (query, key, value)]
        if stop == 22:
            draft = module.tree(*piece, state, torch.tensor([-1]))
            torch.testing.assert_close(draft, whole[:, :, start:stop], atol=3e-2, rtol=3e-2)
        out = module.extend(*piece, state)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, whole[:, :, start:stop], atol=3e-2, rtol=3e-2)


@torch.no_grad()
def test_a_rewind_that_one_part_refuses_changes_no_part():
    module = build("castling", True)
    query, key, value = tokens()
    state = module.new_state(2, dtype=torch.float32, device=query.device, max_rewind=4)
    module.extend(query, key, value, state)
    with pytest.raises(InputError, match="max_rewind=4"):
        state.rewind(40)
    assert [part.length.tolist() for part in state.parts] == [[50, 50]] * 2


def test_what_has_no_constant_state_says_so():
    for name in ("softmax", "softmax_window", "power_window", "augmented_paper"):
        spec = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=name == "softmax")
        module = build_attention(spec, LinearizeConfig(mechanism=name))
        assert module.new_state(2, dtype=torch.float32, device=torch.device("cpu")) is None


# --- softmax_window and power_window

EITHER = pytest.mark.parametrize("name", ("softmax_window", "power_window"))


def windowed(window: int, augmentation: bool = False, name: str = "softmax_window") -> AttentionModule:
    """float64, so that what differs is not rounding."""
    torch.manual_seed(0)
    config = LinearizeConfig(
        mechanism=name,
        group_size=4,
        conv_taps=3,
        augmentation=augmentation,
        options={"window": window},
    )
    module = build_attention(SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True), config).double()
    for parameter in module.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.3)
    return module


def exact_tokens(length: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() for x in tokens(length))


def new_state(module: AttentionModule, batch: int = 2, max_rewind: int = 0):
    return module.new_state(batch, dtype=torch.float64, device=torch.device("cpu"), max_rewind=max_rewind)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@EITHER
@pytest.mark.parametrize("max_rewind", (0, 1, 6))
@pytest.mark.parametrize("window", (1, 2, 9, 10, 11, 64))
def test_a_prompt_shorter_than_the_window_exactly_it_and_longer(window, max_rewind, name):
    module = windowed(window, name=name)
    query, key, value = exact_tokens(40)
    whole = module(query, key, value)
    for prompt in (1, 9, 10, 11, 30):
        state = new_state(module, max_rewind=max_rewind)
        same(module.extend(*(x[:, :, :prompt] for x in (query, key, value)), state), whole[:, :, :prompt])
        for t in range(prompt, 35):
            step = [x[:, :, t : t + 1] for x in (query, key, value)]
            same(module.tree(*step, state, torch.tensor([-1])), whole[:, :, t : t + 1])
            same(module.extend(*step, state), whole[:, :, t : t + 1])
        same(module.extend(*(x[:, :, 35:] for x in (query, key, value)), state), whole[:, :, 35:])


@EITHER
@pytest.mark.parametrize("window", (1, 3, 8))
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_pieces_rewinds_trees_and_commits_on_uneven_rows(seed, window, name):
    module = windowed(window, True, name)
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape or (1,), generator=generator)

    def fresh(count: int) -> list[torch.Tensor]:
        shapes = (4, 8), (2, 8), (2, 6)
        return [
            torch.randn(2, heads, count, size, generator=generator, dtype=torch.float64)
            for heads, size in shapes
        ]

    def after(row: int, *more: torch.Tensor) -> torch.Tensor:
        """The last token of `more`, as the parallel form has it after the row's history."""
        sequence = [torch.cat(pair, 2) for pair in zip(history[row], more, strict=True)]
        return module(*sequence)[0, :, -1]

    def pick(drafts: list[torch.Tensor], row: int, index: torch.Tensor) -> list[torch.Tensor]:
        return [x[row : row + 1, :, index] for x in drafts]

    rewindable = 4
    state = new_state(module, max_rewind=rewindable)
    history = [[x[:1, :, :0] for x in fresh(1)] for _ in range(2)]
    furthest = torch.zeros(2, dtype=torch.int64)
    for _ in range(25):
        new = fresh(int(draw(13)) + 1)
        count = new[0].shape[2]
        action = int(draw(3))
        if action == 0:
            real = draw(4, 2, count) > 0 if draw(2) else None
            out = module.extend(*new, state, key_mask=real)
            for row in range(2):
                for t in range(count):
                    if real is not None and not real[row, t]:
                        assert (out[row, :, t] == 0).all()
                        continue
                    token = pick(new, row, torch.tensor([t]))
                    same(out[row, :, t], after(row, *token))
                    history[row] = [torch.cat(pair, 2) for pair in zip(history[row], token, strict=True)]
        elif action == 1:
            parents = torch.stack([draw(node + 1, 2) - 1 for node in range(count)], 1)
            parents[0] = torch.arange(count) - 1  # one row with the longest branch there can be
            out = module.tree(*new, state, parents)
            path = torch.full((2, count), -1)
            for row in range(2):
                for node in range(count):
                    branch = [node]
                    while parents[row, branch[0]] >= 0:
                        branch.insert(0, int(parents[row, branch[0]]))
                    same(out[row, :, node], after(row, *pick(new, row, torch.tensor(branch))))
                accepted = torch.tensor(branch[: int(draw(len(branch) + 1))], dtype=torch.int64)
                path[row, : len(accepted)] = accepted
                pairs = zip(history[row], pick(new, row, accepted), strict=True)
                history[row] = [torch.cat(pair, 2) for pair in pairs]
            module.commit(*new, state, path)
        else:
            least = (furthest - rewindable).clamp_min(0)
            taken = torch.minimum(draw(rewindable + 1, 2), state.length - least)
            state.rewind(taken)
            for row in range(2):
                kept = history[row][0].shape[2] - int(taken[row])
                history[row] = [x[:, :, :kept] for x in history[row]]
        assert state.length.tolist() == [row[0].shape[2] for row in history]
        furthest = torch.maximum(furthest, state.length)
    assert (furthest > 3 * window).all()


@EITHER
@pytest.mark.parametrize("window", (1, 3, 8))
@pytest.mark.parametrize("rows", (1, 2))
def test_sequences_of_one_length_take_steps_trees_commits_and_rewinds_in_any_order(window, rows, name):
    """Without rows to spare in the window; trees deeper than it, on an empty state too."""
    module = windowed(window, name=name)
    torch.manual_seed(window)
    tokens = [
        torch.randn(rows, heads, 90, size, dtype=torch.float64) for heads, size in ((4, 8), (2, 8), (2, 6))
    ]
    whole = module(*tokens)
    state = module.new_state(rows, dtype=torch.float64, device=torch.device("cpu"))
    at = 0

    def pick(start: int, stop: int) -> list[torch.Tensor]:
        return [x[:, :, start:stop] for x in tokens]

    for turn in range(40):
        branch = (3, 12, 1, 5)[turn % 4]
        drafts = [
            torch.cat([x, torch.randn_like(tokens[i][:, :, :2])], 2)
            for i, x in enumerate(pick(at, at + branch))
        ]
        parents = torch.tensor([*range(-1, branch - 1), -1, min(branch - 1, 1)])
        if at > 75:
            break
        out = module.tree(*drafts, state, parents)
        same(out[:, :, :branch], whole[:, :, at : at + branch])
        for node, before in ((branch, at), (branch + 1, at + min(branch - 1, 1) + 1)):
            wrong = [
                torch.cat([x, y[:, :, node : node + 1]], 2)
                for x, y in zip(pick(0, before), drafts, strict=True)
            ]
            same(out[:, :, node], module(*wrong)[:, :, -1])
        kept = min(branch, 2)
        path = torch.arange(kept).expand(rows, -1)
        module.commit(*drafts, state, torch.nn.functional.pad(path, (0, 1), value=-1))
        at += kept
        same(module.extend(*pick(at, at + 1), state), whole[:, :, at : at + 1])
        at += 1
        if turn % 3 == 0:  # one token can always be taken back, and any that still are in the rows
            count = min(at, 2) if at <= window else 1
            state.rewind(count)
            at -= count
        assert state.length.tolist() == [at] * rows
    assert at > 70


def test_a_row_that_begins_after_another():
    module = windowed(4)
    query, key, value = exact_tokens(20)
    state = new_state(module)
    real = torch.tensor([[True], [False]]).expand(2, 9)
    module.extend(*(x[:, :, :9] for x in (query, key, value)), state, key_mask=real)
    out = module.extend(*(x[:, :, 9:] for x in (query, key, value)), state)
    same(out[:1], module(query, key, value)[:1, :, 9:])
    same(out[1:], module(*(x[1:, :, 9:] for x in (query, key, value))))


def test_more_than_max_rewind_is_refused_once_a_token_has_left_the_window():
    module = windowed(5)
    query, key, value = exact_tokens(40)
    state = new_state(module, max_rewind=3)
    short, rest = ([x[:, :, part] for x in (query, key, value)] for part in (slice(7), slice(7, None)))
    module.extend(*short, state)
    state.rewind(7)  # everything is still in the rows
    module.extend(*short, state)
    module.extend(*rest, state)
    with pytest.raises(InputError, match="max_rewind=3"):
        state.rewind(4)
    assert state.length.tolist() == [40, 40]
    state.rewind(3)
    last = [x[:, :, 37:] for x in (query, key, value)]
    same(module.extend(*last, state), module(query, key, value)[:, :, 37:])


def test_the_state_of_softmax_window_keeps_its_size_and_place():
    module = windowed(4, augmentation=True)
    query, key, value = exact_tokens(300)
    whole = module(query, key, value)
    state = new_state(module, max_rewind=2)
    places = [x.data_ptr() for x in state.tensors()]
    window = state.parts[0].tensors
    assert window.key_window.shape == (2, 2, 5, 8) and window.recurrent.shape == (2, 2, 16, 7)
    for t in range(300):
        same(module.extend(*(x[:, :, t : t + 1] for x in (query, key, value)), state), whole[:, :, t : t + 1])
    state.rewind(2)
    module.commit(query[:, :, 298:], key[:, :, 298:], value[:, :, 298:], state)
    assert [x.data_ptr() for x in state.tensors()] == places
    assert torch.equal(state.length, torch.tensor([300, 300]))
    copy = state.map(torch.clone)
    step = [x[:, :, :1] for x in (query, key, value)]
    same(module.extend(*step, copy), module.extend(*step, state))


@EITHER
def test_the_state_of_a_window_compiles_whole(name):
    module = windowed(4, True, name)
    query, key, value = exact_tokens(12)
    whole = module(query, key, value)
    state = new_state(module)

    def extend(*piece: torch.Tensor) -> torch.Tensor:
        return module.extend(*piece, state)

    compiled = torch.compile(extend, backend="eager", fullgraph=True, dynamic=False)
    for start, stop in itertools.pairwise((0, 6, 7, 8, 9, 12)):
        same(compiled(*(x[:, :, start:stop] for x in (query, key, value))), whole[:, :, start:stop])
    assert state.length.tolist() == [12, 12]


@EITHER
@pytest.mark.parametrize("far", (-300.0, 300.0))
def test_the_window_joins_without_overflow(far, name):
    module = windowed(3, name=name)
    module.far_weight.fill_(far)
    query, key, value = exact_tokens(20)
    query = query * 1000
    whole = module(query, key, value)
    state = new_state(module)
    pieces = [
        module.extend(*(x[:, :, start:stop] for x in (query, key, value)), state)
        for start, stop in itertools.pairwise((0, 2, 3, 4, 5, 12, 13, 20))
    ]
    out = torch.cat(pieces, 2)
    assert out.isfinite().all()
    same(out, whole)


@EITHER
def test_a_window_in_half_precision_is_its_parallel_form(name):
    module = windowed(4, name=name).bfloat16()
    query, key, value = (x.bfloat16() for x in tokens(30))
    whole = module(query, key, value)
    state = module.new_state(2, dtype=torch.bfloat16, device=query.device, max_rewind=2)
    assert state.parts[0].tensors.key_window.dtype == torch.bfloat16
    assert state.parts[0].recurrent.dtype == torch.float32
    for start, stop in itertools.pairwise((0, 12, 13, 14, 15, 30)):
        out = module.extend(*(x[:, :, start:stop] for x in (query, key, value)), state)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, whole[:, :, start:stop], atol=1e-2, rtol=1e-2)


def test_softmax_window_writes_no_gradients_and_nothing_that_does_not_fit_into_a_state():
    module = windowed(4)
    query, key, value = exact_tokens(8)
    state = new_state(module)
    with pytest.raises(InputError, match="the state holds"):
        module.extend(query[..., :4], key[..., :4], value, state)
    with pytest.raises(InputError, match="path must be integers"):
        module.commit(query, key, value, state, torch.tensor([0, 1]))
    module.key_map.requires_grad_()
    with pytest.raises(InputError, match="carries no gradients"):
        module.extend(query, key, value, state)
    with pytest.raises(InputError, match="carries no gradients"):
        module.commit(query, key, value, state)
    assert state.length.tolist() == [0, 0] and not any(x.any() for x in state.tensors())
