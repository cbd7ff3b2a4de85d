"""What a mask means: its entries are read from the graph as formulas, and a formula is put into the language.

`mask_terms.py` reads an entry, `predicate.py` knows the language. This file puts the steps of a program
together: what they hide, which finite values they add, and what nobody can tell. Nothing is concluded from
running a mask; running it may only contradict what was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import sympy
import torch
from torch.fx import Graph, Node

from .algebra import (
    as_formula,
    as_number,
    both,
    cases,
    compare,
    either,
    equal_zero,
    index,
    is_exact,
    member,
    negated,
    plus,
    substitute,
    times,
)
from .entries import Reader, known_value
from .evaluate import value_ancestors, value_leaves
from .graphs import attribute
from .intervals import NONE, Integers, between, from_on, only, up_to
from .mask_terms import VALUES
from .moves import At, broadcast_to, reshaped, shape, size_sum
from .predicate import Meaning, classify, satisfiable, unknown
from .site import Mask, Operand, Relayout, Step, term_operands
from .terms import (
    FALSE,
    TRUE,
    Expression,
    Formula,
    Numeric,
    Sum,
    Term,
    UnreadableError,
    Value,
    constant,
    of_term,
)

aten = torch.ops.aten

MASKED = -9e3
"""A score term at or below this switches a key off; -1e4 is the least negative mask in use."""


LOWEST = -1e30
"""What is added to this or less, by positions, stays a mask; to a finite minimum such as -1e4 it may not."""


@dataclass
class _Reading:
    """What the steps so far show and add.

    visible: which keys a query sees. biased: where a finite value is added. gated: where the scores are
    multiplied by zero. weakest: the least negative finite value that hides a key. why: what cannot be told.
    """

    visible: Formula = TRUE
    biased: Formula = FALSE
    gated: Formula = FALSE
    weakest: float = -math.inf
    normalised: bool = False
    why: str = ""
    blamed: list[Expression] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)

    def give_up(self, why: str, *blamed: Expression) -> None:
        self.why = self.why or why
        self.blamed += blamed


class MaskReader:
    """Classifies the masks of one graph; sites that share their terms share the work."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._readers: dict[tuple[sympy.Expr, ...], Reader] = {}
        self._cache: dict[object, Mask] = {}

    def read(self, program: Sequence[Step], query: sympy.Expr, key: sympy.Expr) -> Mask:
        """The meaning of `program` for `query` queries and `key` keys (traced sizes)."""
        steps = [step for step in program if step.term is not None or step.kind in _WITHOUT_TERM]
        identity = (query, key, tuple((s.kind, repr(s.value), s.term) for s in steps))
        if identity not in self._cache:
            self._cache[identity] = self._read(steps, query, key)
        return self._cache[identity]

    def is_gate(self, term: Operand) -> bool:
        """Whether a factor of the scores is zero or one and depends on sizes alone.

        Such a factor is half of a mask such as `scores * m - 1e4 * (1 - m)`.
        """
        try:
            value = as_number(self._entry(term, term.relayout.merged[2], term.relayout.merged[3]))
            found = cases(value)
        except UnreadableError:
            return False
        return not value.inputs and all(not one.items and one.const in (0, 1) for _, one in found)

    def _read(self, steps: list[Step], query: sympy.Expr, key: sympy.Expr) -> Mask:
        terms = [term.node for term in term_operands(steps)]
        names = sorted({str(leaf.target) for term in terms for leaf in value_leaves(term)})
        reading = _Reading()
        for step in steps:
            try:
                self._step(reading, step, query, key)
            except UnreadableError as error:
                reading.give_up(f"its mask cannot be followed: {error}")
        sizes = _equal_sizes(term_operands(steps), query, key)
        renamed = {f"size:{symbol}()": size_sum(size) for symbol, size in sizes.items()}
        visible, biased = (_renamed(f, renamed) for f in (reading.visible, reading.biased))
        bias = reading.biased == TRUE or satisfiable(both([visible, either([biased, reading.gated])]))
        if reading.why:
            meaning = unknown(reading.why, reading.blamed)
        else:
            shift = plus(size_sum(key.subs(sizes)), size_sum(query.subs(sizes)), -1)
            meaning = classify(visible, shift)
        return Mask(
            meaning.pattern,
            meaning.width,
            padding=meaning.padding,
            own_column=meaning.own_column,
            documents=meaning.documents,
            bias=bias,
            per_head=meaning.per_head,
            top_left=meaning.top_left,
            leaves=tuple(names),
            why=_located(meaning, terms),
            inputs=meaning.inputs,
            zero_or_one=tuple(sorted(reading.assumed)),
            given=meaning.given,
        )

    def _entry(self, term: Operand, query: sympy.Expr, key: sympy.Expr) -> Value:
        """The entry of a term at batch b, head h, query i, key j."""
        heads = term.relayout.merged[1]
        reader = self._readers.setdefault((heads, query, key), Reader(self._graph, VALUES))
        lengths = (None, heads, query, key)
        at: At = tuple(
            of_term(index(name) if size is None else index(name, plus(size_sum(size), constant(-1))))
            for name, size in zip("bhij", lengths, strict=True)
        )
        return reader.entry(term.node, _before(term.relayout, at, term.node))

    def _step(self, reading: _Reading, step: Step, query: sympy.Expr, key: sympy.Expr) -> None:
        if step.kind == "causal" or (step.kind == "sdpa" and step.value["causal"]):
            i = of_term(index("i", plus(size_sum(query), constant(-1))))
            j = of_term(index("j", plus(size_sum(key), constant(-1))))
            reading.visible = both([reading.visible, compare("le", j, i)])
        reading.normalised |= "softmax" in step.kind
        if step.kind in ("scale", "div") and step.term is None:
            factor = abs(step.value) if step.kind == "scale" else 1 / abs(step.value)
            reading.weakest *= factor if reading.weakest > -math.inf else 1.0
            if reading.weakest > MASKED:
                reading.give_up("a scale behind the mask leaves hidden keys a score")
        if step.term is None or step.kind in ("sink", "div"):
            return
        value = self._entry(step.term, query, key)
        if step.kind == "scale":
            if step.is_gate:
                reading.gated = either([reading.gated, equal_zero(as_number(value))])
        elif step.kind in ("fill", "keep"):
            masked = as_formula(value)
            _fill(reading, masked if step.kind == "fill" else negated(masked), float(step.value))
        elif step.kind == "sdpa" and isinstance(value, Formula):
            reading.visible = both([reading.visible, value])
        else:
            _add(reading, as_number(value), 1.0 if step.kind == "sdpa" else step.value)


def _located(meaning: Meaning, terms: Sequence[Node]) -> str:
    """Why a mask is not known, with the node to look at."""
    node = meaning.culprit or (terms[-1] if terms else None)
    return f"{meaning.why} (node {node.name})" if meaning.why and node is not None else meaning.why


_WITHOUT_TERM = ("causal", "sdpa", "scale", "div", "softmax", "safe_softmax")
"""Steps that matter to a mask although they hold no tensor."""


def _renamed(formula: Formula, sizes: Mapping[str, Sum]) -> Formula:
    result = substitute(formula, sizes)
    assert isinstance(result, Formula)
    return result


def _equal_sizes(
    terms: Sequence[Operand], query: sympy.Expr, key: sympy.Expr
) -> dict[sympy.Symbol, sympy.Expr]:
    """Size symbols that equal others because a term is broadcast to the scores."""
    equal: dict[sympy.Symbol, sympy.Expr] = {}
    for term in terms:
        for size, other in zip(term.relayout.merged[2:], (query, key), strict=True):
            a, b = size.subs(equal), other.subs(equal)
            if size == 1 or a == b:
                continue
            a, b = (a, b) if a.is_Symbol and a not in b.free_symbols else (b, a)
            if a.is_Symbol and a not in b.free_symbols:
                equal = {symbol: known.subs({a: b}) for symbol, known in equal.items()} | {a: b}
    return equal


def _before(relayout: Relayout, at: At, node: Node) -> At:
    """Canonical indices as indices of the traced tensor: the moves of a relayout, backwards."""
    at = tuple(constant(0) if size == 1 else place for size, place in zip(relayout.merged, at, strict=True))
    at = broadcast_to(relayout.spread, reshaped(at, relayout.merged, relayout.full))
    permuted = [relayout.split[axis] for axis in relayout.order]
    at = reshaped(at, relayout.spread, permuted)
    split: list[Numeric] = [constant(0)] * len(at)
    for place, axis in zip(at, relayout.order, strict=True):
        split[axis] = place
    sizes = shape(node)
    long = [axis for axis, size in enumerate(sizes) if size != 1]
    if len(long) != len(split):
        return reshaped(tuple(split), relayout.split, sizes)
    places = dict(zip(long, split, strict=True))  # two expressions of one size need not look alike
    return tuple(places.get(axis, constant(0)) for axis in range(len(sizes)))


# --- steps --------------------------------------------------------------------------------------------------


def _fill(reading: _Reading, masked: Formula, value: float) -> None:
    if reading.normalised:
        if value != 0:
            reading.give_up("it writes a value other than zero into the weights", masked)
        reading.biased = either([reading.biased, masked])
    elif value >= -MASKED:
        reading.give_up("it writes a huge positive score, which hides all others", masked)
    elif value <= MASKED:
        reading.visible = both([reading.visible, negated(masked)])
        reading.weakest = max(reading.weakest, value)
    elif satisfiable(both([masked, negated(reading.visible)])):
        reading.give_up("a later step shows keys that an earlier one hid", masked)
    else:
        reading.biased = either([reading.biased, masked])


def _add(reading: _Reading, value: Numeric, factor: float) -> None:
    hidden: Formula = FALSE
    for path, one in cases(value):
        here = _added(reading, path, times(one, Fraction(factor) if math.isfinite(factor) else factor))
        hidden = either([hidden, both([path, here])])
    reading.visible = both([reading.visible, negated(hidden)])


def _added(reading: _Reading, path: Formula, value: Sum) -> Formula:
    """Where a value that is added to the scores hides them; what else it does goes into the reading."""
    if math.isnan(value.const):
        reading.give_up("it adds NaN to scores", path, value)
        return FALSE
    if not value.items:
        if value.const >= -MASKED:
            if satisfiable(path):
                reading.give_up("it adds a huge positive score, which hides all others", path)
        elif value.const > MASKED and value.const != 0:
            reading.biased = either([reading.biased, path])
        elif value.const <= MASKED:
            reading.weakest = max(reading.weakest, float(value.const))
        return TRUE if value.const <= MASKED else FALSE
    huge = [term for term, size in value.items.items() if not MASKED < size < -MASKED]
    if huge and len(value.items) == 1:
        return _switched(reading, path, value, huge[0])
    hiding = any(_may_hide(term) for term in value.terms)
    near = MASKED >= value.const > LOWEST and not all(term.kind == "read" for term in value.items)
    if huge or hiding or near or value.const >= -MASKED:
        reading.biased = TRUE
        reading.give_up("it adds values to the scores that may hide keys", path, value)
        return FALSE
    if value.const <= MASKED:
        return TRUE
    differs = compare("ne", value, constant(0)) if is_exact(value) else TRUE
    reading.biased = either([reading.biased, both([path, differs])])
    return FALSE


def _switched(reading: _Reading, path: Formula, value: Sum, term: Term) -> Formula:
    """Where `huge * term + const` hides: an integer input in arithmetic is zero or one."""
    factor, const = value.items[term], value.const
    if not term.integer or not math.isfinite(const):
        reading.biased = TRUE
        reading.give_up("it adds values to the scores that may hide keys", path, value)
        return FALSE
    low, high = ((Fraction(int(limit)) - Fraction(const)) / Fraction(factor) for limit in (MASKED, -MASKED))
    off = from_on(math.ceil(low)) if factor < 0 else up_to(math.floor(low))
    excess = up_to(math.floor(high)) if factor < 0 else from_on(math.ceil(high))
    zero = Fraction(-const) / Fraction(factor)
    still = only(int(zero)) if zero.denominator == 1 else NONE
    place = of_term(term)
    if term.kind == "read" and term.leaves:
        binary = between(0, 1)
        reading.assumed |= set(term.leaves)
        excess = excess & binary
        still = still | ~binary
    if satisfiable(both([path, member(place, excess)])):
        reading.give_up("it adds a huge positive score, which hides all others", path, value)
    rest: Integers = ~(off | excess | still)
    reading.biased = either([reading.biased, both([path, member(place, rest)])])
    reading.weakest = max(reading.weakest, float(MASKED))
    return member(place, off)


def _may_hide(term: Term) -> bool:
    """Whether an entry of a tensor may be so low that it hides a key."""
    node = term.source
    if node is None or term.integer:
        return False
    if node.op == "get_attr" or (node.op == "placeholder" and known_value(node) is not None):
        value = attribute(node) if node.op == "get_attr" else known_value(node)
        assert value is not None
        learned = isinstance(value, torch.nn.Parameter)
        return not learned and not bool((value.abs() < -MASKED).all())
    if term.leaves and (term.learned or any(_is_float_input(leaf) for leaf in value_leaves(node))):
        return True
    return any(_is_huge(argument) for inner in value_ancestors(node) for argument in inner.args)


def _is_float_input(leaf: Node) -> bool:
    return leaf.op == "placeholder" and known_value(leaf) is None and leaf.meta["val"].is_floating_point()


def _is_huge(argument: object) -> bool:
    return isinstance(argument, int | float) and argument <= MASKED
