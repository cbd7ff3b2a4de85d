"""What a mask means, by evaluation: run the score terms on sizes alone and read the pattern off the result.

Integers that positions are compared with (a window of 4096) are replaced by small ones first, so that
lengths of a few dozen tokens show what thousands would. Inputs that take part are tried in the roles that an
input can have in a mask: all tokens real, ordinary positions, and then with some keys switched off.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .axes import overloads
from .contraction import read_contraction
from .evaluate import Sizes, evaluate, value_ancestors, value_leaves
from .relayout import move_tensor
from .site import Mask, Operand, Pattern, Step, term_operands

aten = torch.ops.aten

MASKED = -9e3
"""A score term at or below this switches a key off; -1e4 is the least negative mask in use."""

SMALL = 24
"""Compared integers from here on are replaced by smaller ones; lengths tried exceed every integer below."""

TRIAL_LENGTHS = (29, 37, 41, 43)
"""Lengths tried beside the traced ones; distinct, so that two symbols never agree by accident."""

MAX_NODES = 600
"""A term with more ancestors than this computes from the model's activations and is not evaluated."""

COMPARES = frozenset(
    overloads(
        "add.Tensor",
        "add.Scalar",
        "sub.Tensor",
        "sub.Scalar",
        "rsub.Scalar",
        "gt.Scalar",
        "ge.Scalar",
        "lt.Scalar",
        "le.Scalar",
        "gt.Tensor",
        "ge.Tensor",
        "lt.Tensor",
        "le.Tensor",
        "floor_divide.default",
        "div.Tensor_mode",
        "div.Scalar_mode",
        "triu.default",
        "tril.default",
        "remainder.Scalar",
    )
)


@dataclass(frozen=True)
class Scene:
    """Visible keys `[b, h, T, S]` at one choice of sizes and inputs, and whether finite scores are added."""

    visible: Tensor
    biased: bool
    lengths: tuple[int, int]


class MaskReader:
    """Classifies the masks of one graph; sites that share their terms share the work."""

    def __init__(self, graph: Graph) -> None:
        self._hints = size_hints(graph)
        self._cache: dict[object, Mask] = {}

    def read(self, program: Sequence[Step], query: sympy.Expr, key: sympy.Expr) -> Mask:
        """The meaning of `program` for `query` queries and `key` keys (traced sizes)."""
        steps = [step for step in program if step.term is not None or step.kind in ("causal", "sdpa")]
        identity = (query, key, tuple((s.kind, repr(s.value), s.term) for s in steps))
        if identity not in self._cache:
            self._cache[identity] = _classify(steps, query, key, _trials(self._hints, query, key))
        return self._cache[identity]

    def is_gate(self, term: Operand) -> bool:
        """Whether a factor of the scores is zero or one and depends on sizes alone.

        Such a factor is half of a mask such as `scores * m - 1e4 * (1 - m)`.
        """
        if any(leaf.op == "placeholder" and _known(leaf) is None for leaf in value_leaves(term.node)):
            return False
        trials = _trials(self._hints, term.relayout.merged[2], term.relayout.merged[3])
        try:
            values = [evaluate(term.node, sizes, _no_feed) for sizes in trials[:2]]
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            return False
        return all(bool(((value == 0) | (value == 1)).all()) for value in values)


def _classify(steps: list[Step], query: sympy.Expr, key: sympy.Expr, trials: list[Sizes]) -> Mask:
    inputs, names, computed = _inputs(steps)
    if computed:
        return Mask(Pattern.OTHER, bias=True, leaves=names)
    replaced = _large_integers(steps)
    for roles in itertools.product(*[_roles(node) for node in inputs]):
        feed = dict(zip(inputs, roles, strict=True))
        tried = [(sizes, _scene(steps, sizes, query, key, feed, replaced)) for sizes in trials]
        ran = [(sizes, scene) for sizes, scene in tried if scene is not None]
        scenes = [scene for _, scene in ran]
        found = _pattern(scenes, query == key)
        if found is None:
            continue
        pattern, width, top_left = found
        padding = _padding(steps, ran, query, key, feed, replaced)
        if padding is None:
            continue
        originals = {small: large for large, small in replaced.items()}
        return Mask(
            pattern,
            width=originals.get(width, width) if width is not None else None,
            padding=padding,
            bias=any(scene.biased for scene in scenes),
            top_left=top_left,
            lengths=tuple(scene.lengths for scene in scenes),
            leaves=names,
        )
    scene = next((s for s in (_scene(steps, sizes, query, key, {}, replaced) for sizes in trials) if s), None)
    per_head = scene is not None and not bool((scene.visible == scene.visible[:, :1]).all())
    return Mask(Pattern.OTHER, bias=scene is None or scene.biased, per_head=per_head, leaves=names)


def _no_feed(node: Node, shape: tuple[int, ...]) -> Tensor:
    known = _known(node)
    if known is None:
        raise ValueError(f"{node} is an input")
    return known


def _terms(steps: Sequence[Step]) -> list[Node]:
    return [term.node for term in term_operands(steps)]


def _inputs(steps: Sequence[Step]) -> tuple[list[Node], tuple[str, ...], bool]:
    """Inputs that take part, the names of all leaves, and whether activations are involved."""
    found: dict[Node, None] = {}
    computed = False
    for term in _terms(steps):
        ancestors = value_ancestors(term)
        own = [leaf for leaf in value_leaves(term) if leaf.op == "placeholder" and _known(leaf) is None]
        found.update(dict.fromkeys(own))
        projected = any(n.target is aten.linear.default or read_contraction(n) is not None for n in ancestors)
        computed |= len(ancestors) > MAX_NODES or bool(own and projected)
        computed |= any(leaf.meta["val"].is_floating_point() for leaf in own)
    names = sorted({str(leaf.target) for term in _terms(steps) for leaf in value_leaves(term)})
    return list(found), tuple(names), computed


def _known(placeholder: Node) -> Tensor | None:
    """The tensor a lifted parameter or buffer holds (dynamo passes them as inputs)."""
    leaf = placeholder.meta.get("leaf")
    return None if leaf is None or leaf.kind == "input" else leaf.value


Role = str


def _roles(node: Node) -> tuple[Role, ...]:
    """What an input may stand for: a mask of real tokens, positions, token ids, a mask of padding."""
    if node.meta["val"].dtype == torch.bool:
        return ("ones", "zeros")
    return ("ones", "positions", "tokens", "zeros")


def _fill(role: Role, node: Node, shape: tuple[int, ...]) -> Tensor:
    dtype = node.meta["val"].dtype
    if role == "positions":
        return torch.arange(shape[-1] if shape else 1).expand(shape).to(dtype)
    if role == "tokens":
        return torch.full(shape, 7).to(dtype)
    return torch.full(shape, int(role == "ones")).to(dtype)


def _large_integers(steps: Sequence[Step]) -> dict[int, int]:
    """Compared integers that are too large to try, and small stand-ins, in the same order of size."""
    found = set()
    for term in _terms(steps):
        for node in value_ancestors(term):
            if node.target in COMPARES:
                found |= {abs(a) for a in node.args[1:] if type(a) is int and SMALL <= abs(a) < 2**31}
    return {large: 5 + 3 * i for i, large in enumerate(sorted(found))}


def _trials(hints: Mapping[sympy.Symbol, int], query: sympy.Expr, key: sympy.Expr) -> list[Sizes]:
    """The traced sizes; the same with the length symbols moved past `SMALL`; and with all of them different.

    Symbols traced at one number often have to agree (a mask and the tokens), so the second keeps them
    alike; the third tells queries from keys where it can be run at all.
    """
    lengths = sorted(query.free_symbols | key.free_symbols, key=str)
    traced = {**dict.fromkeys(lengths, 7), **hints}
    if not lengths:
        return [Sizes(traced)]
    distinct = sorted({traced[symbol] for symbol in lengths})
    trials_of = zip(
        distinct, itertools.chain(TRIAL_LENGTHS, itertools.repeat(TRIAL_LENGTHS[-1])), strict=False
    )
    longer = {hint: trial if hint <= 2 * SMALL else 2 * hint + trial for hint, trial in trials_of}
    alike = {symbol: longer.get(hint, hint) for symbol, hint in traced.items()}
    trials = [Sizes(traced), Sizes(alike)]
    if len(lengths) > len(distinct):
        different = dict(zip(lengths, TRIAL_LENGTHS, strict=False))
        trials.append(Sizes({**traced, **different}))
    return trials


def size_hints(graph: Graph) -> dict[sympy.Symbol, int]:
    """The number each size symbol of a graph had when it was traced."""
    hints: dict[sympy.Symbol, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
                for symbol in size.node.expr.free_symbols - hints.keys():
                    hints[symbol] = int(known.get(symbol, 7))
    return hints


def _scene(
    steps: Sequence[Step],
    sizes: Sizes,
    query: sympy.Expr,
    key: sympy.Expr,
    roles: Mapping[Node, Role | Tensor],
    replaced: dict[int, int],
) -> Scene | None:
    """The mask at one choice, None where the graph does not run at these sizes."""
    rows, columns = sizes.number(query), sizes.number(key)
    if rows < 1 or columns < 1:
        return None  # lengths that are computed from others need not exist at every trial
    visible = torch.ones(1, 1, rows, columns, dtype=torch.bool)
    gated = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    biased = False

    def feed(node: Node, shape: tuple[int, ...]) -> Tensor:
        known = _known(node)
        if known is not None:
            return known
        role = roles.get(node, "ones")
        return role if isinstance(role, Tensor) else _fill(role, node, shape)

    for step in steps:
        if step.kind == "causal" or (step.kind == "sdpa" and step.value["causal"]):
            visible = visible & torch.ones(rows, columns, dtype=torch.bool).tril()
        if step.term is None or step.kind in ("sink", "div"):
            continue
        try:
            term = move_tensor(
                evaluate(step.term.node, sizes, feed, replaced, COMPARES), step.term.relayout, sizes
            )
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            return None
        if step.kind == "scale":
            gated = gated | (term == 0)
        elif step.kind == "fill" or step.kind == "keep" or (step.kind == "sdpa" and term.dtype == torch.bool):
            if step.kind != "sdpa" and step.value >= -MASKED:
                return None
            masked = term.bool() if step.kind == "fill" else ~term.bool()
            if step.kind == "sdpa" or step.value <= MASKED:
                visible = visible & ~masked
            elif bool((masked & visible).any()):
                biased = True
        else:
            added = term.float() * (1.0 if step.kind == "sdpa" else step.value)
            if bool((added >= -MASKED).any()):
                return None  # a huge positive term masks all the others; nothing here reads that
            off = added <= MASKED
            biased |= bool((added.masked_fill(off, 0) != 0).any()) or bool(added.isnan().any())
            visible = visible & ~off
    biased |= bool((visible & gated).any())
    return Scene(visible, biased, (rows, columns))


def _explains(visible: Tensor, pattern: Pattern, width: int | None, top_left: bool) -> bool:
    rows, columns = visible.shape[-2:]
    i = torch.arange(rows)[:, None] + (0 if top_left else columns - rows)
    j = torch.arange(columns)[None]
    if pattern is Pattern.FULL:
        return bool(visible.all())
    if pattern is Pattern.CAUSAL:
        return bool((visible == (j <= i)).all())
    assert width is not None
    expected = {
        Pattern.WINDOW: (j <= i) & (j > i - width),
        Pattern.BAND: (j - i).abs() <= width,
        Pattern.CHUNK: (j <= i) & (j // max(width, 1) == i // max(width, 1)),
    }[pattern]
    return bool((visible == expected).all())


def _pattern(scenes: Sequence[Scene], square: bool) -> tuple[Pattern, int | None, bool] | None:
    """The pattern that explains every scene, read off the longest; None if none does."""
    if not scenes:
        return None
    longest = max(scenes, key=lambda scene: scene.lengths[1])
    rows, columns = longest.lengths
    seen = int(longest.visible[0, 0, -1].sum())
    first = int(longest.visible[0, 0, 0].sum())
    candidates: list[tuple[Pattern, int | None]] = [(Pattern.FULL, None), (Pattern.CAUSAL, None)]
    candidates += [(Pattern.WINDOW, seen), (Pattern.BAND, max(first, seen) - 1)]
    candidates += [(Pattern.CHUNK, width) for width in range(2, columns)]
    for pattern, width in candidates:
        for top_left in (False, True):
            if all(_explains(scene.visible, pattern, width, top_left) for scene in scenes):
                aligned = square or pattern in (Pattern.FULL, Pattern.BAND)
                return pattern, width, top_left and not aligned
    return None


def _padding(
    steps: Sequence[Step],
    ran: Sequence[tuple[Sizes, Scene]],
    query: sympy.Expr,
    key: sympy.Expr,
    roles: dict[Node, Role],
    replaced: dict[int, int],
) -> bool | None:
    """Whether switching input entries switches keys off, whole columns at a time; None if it does more."""
    found = False
    for node, role in roles.items():
        for sizes, before in ran:
            for changed in _changes(role, node, sizes.shape(node.meta["val"])):
                after = _scene(steps, sizes, query, key, {**roles, node: changed}, replaced)
                if after is None or bool((after.visible & ~before.visible).any()):
                    return None
                if after.biased and not before.biased:
                    return None  # the input discourages keys instead of switching them off
                gone = before.visible & ~after.visible
                columns = gone.any(dim=-2, keepdim=True)
                if bool((gone != (before.visible & columns)).any()):
                    return None
                found |= bool(gone.any())
    return found


def _changes(role: Role, node: Node, shape: tuple[int, ...]) -> list[Tensor]:
    """Other values an input of this role may hold: some keys switched off, all positions moved."""
    plain = _fill(role, node, shape)
    if not plain.numel():
        return []
    if role == "positions":
        return [plain + 3]
    off = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    if shape:
        off[..., -1] = False  # the last key stays, so that no row loses every key
    others = {"ones": (0,), "zeros": (1,), "tokens": (0, 1)}[role]
    return [torch.where(off, torch.full_like(plain, other), plain) for other in others]
