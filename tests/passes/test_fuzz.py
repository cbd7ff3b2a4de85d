"""Mutation fuzz: edit a matched graph; its record changes or the site is refused, and no rewrite is wrong.

An edit works on the graph, not on the module: it reaches spellings nobody would write. Edits that do not run
are discarded.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from functools import cache, partial

import hypothesis
import pytest
import torch
from graphs_of import graph_of, is_candidate
from hypothesis import strategies as st
from linearize.passes import MatchReport, Site, find_attention, raise_attention
from spellings import REGISTRY, Facts
from spellings._base import visible
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

BASES = (
    "llama_eager",
    "t5_bias_causal_padding",
    "sink_last_causal",
    "sdpa_enable_gqa",
    "sdpa_causal_and_padding",
    "softcap_before_mask",
    "bmm_with_4d_view_for_the_mask",
    "einsum_grouped_5d",
    "keys_by_queries",
    "softmax_by_hand",
    "packed_unbind",
    "gqa_repeat_interleave",
    "window_and_padding",
    "causal_where_then_padding_add",
    "cross_attention_padding",
)

Edit = Callable[[Graph], None]


class Impossible(Exception):
    """The edited graph does not run; nothing is to be learned from it."""


# ---- graphs


def editable(module: GraphModule) -> GraphModule:
    """A copy with positional inputs and as many outputs as it likes, on the same parameters."""
    graph = Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    return GraphModule(module, graph)


def refresh(module: GraphModule) -> None:
    """Trace the edited graph again on fake tensors, node by node."""
    nodes = list(module.graph.nodes)
    with next(n.meta["val"] for n in nodes if n.op == "placeholder").fake_mode, torch.no_grad():
        for node in nodes:
            if node.op == "call_function":
                try:
                    node.meta["val"] = node.target(*values(node.args), **values(node.kwargs))
                except Exception as error:  # whatever an operator raises on arguments it cannot take
                    raise Impossible(str(error)) from error
    module.graph.lint()
    module.recompile()


def values(argument: object) -> object:
    return map_arg(argument, lambda node: node.meta["val"])


def insert(after: Node, target: object, *args: object, **kwargs: object) -> Node:
    with after.graph.inserting_after(after):
        node = after.graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in after.meta.items() if k in ("nn_module_stack", "stack_trace")}
    return node


def through(node: Node, target: object, *rest: object, **kwargs: object) -> None:
    """Every user of `node` reads `target(node, *rest)` instead."""
    users = list(node.users)
    new = insert(node, target, node, *rest, **kwargs)
    for user in users:
        user.replace_input_with(node, new)


def outputs(module: GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        torch.manual_seed(0)  # an edit may switch dropout on
        with torch.no_grad():
            result = module(*inputs)
    except Exception as error:
        raise Impossible(str(error)) from error
    flat = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in flat if isinstance(x, Tensor)]


# ---- the edits: each yields the ways it can be applied to a graph


def by_name(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def inside(module: GraphModule, site: Site) -> list[Node]:
    """Tensor nodes of the site, and what it reads."""
    names = {n.name for n in (*site.body, site.output, site.query.node, site.key.node, site.value.node)}
    names |= {step.term.node.name for step in site.program if step.term is not None}
    names |= {a.name for n in site.body for a in n.all_input_nodes}
    nodes = [n for n in module.graph.nodes if n.name in names and isinstance(n.meta.get("val"), Tensor)]
    return [n for n in nodes if n.op == "call_function"]


def retarget(name: str, change: Callable[[Node], None], graph: Graph) -> None:
    change(by_name(graph, name))


def transpose_axes(module: GraphModule, site: Site) -> Iterator[Edit]:
    for node in inside(module, site):
        rank = node.meta["val"].dim()
        for first in range(rank):
            for second in range(first + 1, rank):
                yield partial(
                    retarget, node.name, lambda n, a=first, b=second: through(n, aten.transpose.int, a, b)
                )


def flip_axis(module: GraphModule, site: Site) -> Iterator[Edit]:
    for node in inside(module, site):
        for axis in range(node.meta["val"].dim()):
            yield partial(retarget, node.name, lambda n, a=axis: through(n, aten.flip.default, [a]))


def normalised_axis(module: GraphModule, site: Site) -> Iterator[Edit]:
    """Softmax, sum, cat and slice along another axis."""
    for node in inside(module, site):
        position = {aten.softmax.int: 1, aten.cat.default: 1, aten.slice.Tensor: 1}.get(node.target)
        if position is None:
            continue
        for axis in range(node.meta["val"].dim()):
            yield partial(
                retarget,
                node.name,
                lambda n, a=axis, p=position: setattr(n, "args", (*n.args[:p], a, *n.args[p + 1 :])),
            )


def mask_sign(module: GraphModule, site: Site) -> Iterator[Edit]:
    swapped = {
        aten.add.Tensor: aten.sub.Tensor,
        aten.sub.Tensor: aten.add.Tensor,
        aten.ge.Tensor: aten.lt.Tensor,
    }
    for node in inside(module, site):
        if node.meta["val"].dtype == torch.bool:
            yield partial(retarget, node.name, lambda n: through(n, aten.bitwise_not.default))
        if node.target in swapped:
            yield partial(retarget, node.name, lambda n: setattr(n, "target", swapped[n.target]))


def leak(module: GraphModule, site: Site) -> Iterator[Edit]:
    """Scores or weights become one more output."""

    def add_output(name: str, graph: Graph) -> None:
        end = graph.output_node()
        first = end.args[0]
        end.args = ((*(first if isinstance(first, (tuple, list)) else (first,)), by_name(graph, name)),)

    for node in site.body:
        if isinstance(node.meta.get("val"), Tensor):
            yield partial(add_output, node.name)


def second_use(module: GraphModule, site: Site) -> Iterator[Edit]:
    """The result of the attention also depends on a tensor of its inside."""

    def add_use(name: str, out: str, graph: Graph) -> None:
        result = by_name(graph, out)
        users = list(result.users)
        total = insert(result, aten.sum.default, by_name(graph, name))
        added = insert(total, aten.add.Tensor, result, total)
        for user in users:
            user.replace_input_with(result, added)

    for node in site.body:
        if isinstance(node.meta.get("val"), Tensor):
            yield partial(add_use, node.name, site.output.name)


def numbers(module: GraphModule, site: Site) -> Iterator[Edit]:
    """Every number in the site, changed: scales, caps, mask values, offsets of diagonals, dropout."""

    def change(name: str, position: int, value: float, graph: Graph) -> None:
        node = by_name(graph, name)
        node.args = (*node.args[:position], value, *node.args[position + 1 :])

    for node in inside(module, site):
        for position, argument in enumerate(node.args):
            if isinstance(argument, float):
                for value in (argument * 1.5, -argument, 0.5):
                    yield partial(change, node.name, position, value)
            elif isinstance(argument, int) and not isinstance(argument, bool):
                yield partial(change, node.name, position, argument + 1)
        if node.name == site.anchor.name and site.spelling.startswith("scaled"):
            yield partial(retarget, node.name, lambda n: setattr(n, "kwargs", {**n.kwargs, "scale": 0.7}))
            yield partial(retarget, node.name, lambda n: setattr(n, "args", n.args[:3]))


def swap_operands(module: GraphModule, site: Site) -> Iterator[Edit]:
    """Any two tensors that the site reads change places."""

    def swap(first: str, second: str, graph: Graph) -> None:
        a, b = by_name(graph, first), by_name(graph, second)
        marker = insert(b if a < b else a, aten.alias.default, b if a < b else a)
        for node in list(graph.nodes):
            if node is marker or node < marker:
                continue
            node.args = map_arg(node.args, lambda n: b if n is a else a if n is b else n)
            node.kwargs = map_arg(node.kwargs, lambda n: b if n is a else a if n is b else n)

    own = {node.name for node in (*site.body, site.output)}
    read = [n for n in inside(module, site) if n.name not in own]
    for i, first in enumerate(read):
        for second in read[i + 1 :]:
            yield partial(swap, first.name, second.name)


def other_repeat(module: GraphModule, site: Site) -> Iterator[Edit]:
    """Interleaved heads become tiled ones: for the key, the value, or both."""

    def tile(node: Node) -> None:
        if node.target is aten.repeat_interleave.self_int:
            count, axis = node.args[1], node.args[2]
            repeats = [1] * node.args[0].meta["val"].dim()
            repeats[axis] = count
            node.target, node.args = aten.repeat.default, (node.args[0], repeats)
        else:  # [B, Hkv, group, T, D] -> [B, group, Hkv, T, D] before the reshape
            new = insert(node, aten.transpose.int, node, 1, 2)
            for user in [u for u in node.users if u is not new]:
                user.replace_input_with(node, new)

    def both(names: tuple[str, ...], graph: Graph) -> None:
        for name in names:
            tile(by_name(graph, name))

    found = [
        n.name
        for n in module.graph.nodes
        if n.target is aten.repeat_interleave.self_int
        or (n.target is aten.expand.default and n.meta["val"].dim() == 5)
    ]
    for chosen in [(name,) for name in found] + [tuple(found)]:
        if chosen:
            yield partial(both, chosen)


def wrap(module: GraphModule, site: Site) -> Iterator[Edit]:
    """A pointwise function on a tensor of the site."""
    functions = (
        aten.relu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.neg.default,
        aten.exp.default,
    )
    for node in inside(module, site):
        if node.meta["val"].is_floating_point():
            for function in functions:
                yield partial(retarget, node.name, lambda n, f=function: through(n, f))


def add_bias(module: GraphModule, site: Site) -> Iterator[Edit]:
    """A row, a column or a whole matrix of positions is added to a tensor of the site."""

    def bias(name: str, axis: int, graph: Graph) -> None:
        node = by_name(graph, name)
        users = list(node.users)
        size = insert(node, aten.sym_size.int, node, axis)
        line = insert(size, aten.arange.default, size)
        line.kwargs = {"dtype": node.meta["val"].dtype}
        shape = [1] * node.meta["val"].dim()
        shape[axis] = -1
        shaped = insert(line, aten.view.default, line, shape)
        added = insert(shaped, aten.add.Tensor, node, shaped)
        for user in users:
            user.replace_input_with(node, added)

    for node in inside(module, site):
        if node.meta["val"].is_floating_point():
            for axis in range(node.meta["val"].dim()):
                yield partial(bias, node.name, axis)


def drop(module: GraphModule, site: Site) -> Iterator[Edit]:
    """One step of the site is left out: a cast, a scale, a mask, a view."""

    def skip(name: str, source: str, graph: Graph) -> None:
        node = by_name(graph, name)
        node.replace_all_uses_with(by_name(graph, source))
        graph.erase_node(node)

    for node in inside(module, site):
        for source in node.all_input_nodes:
            yield partial(skip, node.name, source.name)


def write_in_place(module: GraphModule, site: Site) -> Iterator[Edit]:
    """An operand, or a slice of it, is overwritten between two readers of the site."""

    def write(name: str, moment: str, partly: bool, graph: Graph) -> None:
        target, place = by_name(graph, name), by_name(graph, moment)
        if partly:
            place = target = insert(place, aten.select.int, target, 0, 0)
        insert(place, aten.mul_.Tensor, target, 1.5)

    read = [n for n in (site.query.node, site.key.node, site.value.node) if n.op == "call_function"]
    for node in read:
        for moment in (*site.body[:-1], *(n for n in read[:2] if n is not node)):
            for partly in (False, True):
                yield partial(write, node.name, moment.name, partly)


EDITS = {
    edit.__name__: edit
    for edit in (
        transpose_axes,
        flip_axis,
        normalised_axis,
        mask_sign,
        leak,
        second_use,
        numbers,
        swap_operands,
        other_repeat,
        wrap,
        add_bias,
        drop,
        write_in_place,
    )
}


# ---- what must hold


def record(report: MatchReport) -> tuple:
    """Everything a reader or a later pass can see of the sites, without identities of nodes."""

    def operand(x: object) -> object:
        return None if x is None else (x.node.name, x.relayout)

    return tuple(
        (
            site.path,
            operand(site.query),
            operand(site.key),
            operand(site.value),
            tuple((s.kind, repr(s.value), operand(s.term)) for s in site.program),
            site.mask,
            site.scale,
            site.softcap,
            site.kv_map,
            site.output.name,
            site.restore,
        )
        for site in report.sites
    )


@cache
def base(name: str) -> tuple[GraphModule, MatchReport, dict[str, list[Edit]]]:
    module = editable(graph_of(REGISTRY[name]).graph)
    report = find_attention(module)
    assert len(report.sites) == 1
    return module, report, {key: list(edit(module, report.sites[0])) for key, edit in EDITS.items()}


def touched(before: Site, edited: Graph) -> bool:
    """The edit reached into the site: one of its nodes is computed or used differently."""
    nodes = {node.name: node for node in edited.nodes}

    def definition(node: Node) -> str:
        return f"{node.target} {node.args} {node.kwargs}"

    def readers(node: Node) -> set[str]:
        return {user.name for user in node.users if user.users or user.op == "output"}

    for node in (*before.body, before.output):
        twin = nodes.get(node.name)
        if twin is None or definition(twin) != definition(node):
            return True
        if node is not before.output and readers(twin) != readers(node):
            return True
    return False


def check_mask(site: Site, raised: GraphModule, inputs: dict[str, Tensor]) -> None:
    """The label of the mask against the weights themselves.

    With the identity as values and nothing in queries and keys, the canonical call returns the weights that
    masks and biases leave: a key has weight exactly where the label says that it is visible.
    """
    pattern = site.mask.pattern.value
    if pattern == "other" or site.sinks or site.dropout:
        return
    shown: list[Tensor] = []

    class Weights(torch.fx.Interpreter):
        def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
            if str(target).startswith("linearize.attention"):
                query, key, value, *rest = args
                heads, keys = value.shape[1], value.shape[2]
                identity = torch.eye(keys, dtype=value.dtype).expand(value.shape[0], heads, keys, keys)
                shown.append(target(query * 0, key * 0, identity, *rest, **kwargs))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Weights(raised).run(*inputs.values())
    (weights,) = shown
    facts = Facts(mask=site.mask.label, top_left=site.mask.top_left)
    seen = visible(facts, *weights.shape[-2:]).expand(weights.shape)
    if site.mask.padding:  # whole columns are missing, whichever they are: the last query shows which
        if pattern not in ("full", "causal"):
            return
        seen = seen & (weights[..., -1:, :] > 0)
    some = seen.any(-1, keepdim=True).expand_as(seen)  # a row without any key may hold anything
    told = f"the mask is said to be {site.mask.label}"
    assert float(weights[some & ~seen].abs().sum()) < 1e-9, f"{told}, but a hidden key has weight"
    assert bool((weights[some & seen] > 0).all()), f"{told}, but a visible key has no weight"


def alive(module: GraphModule) -> bool:
    """Some output depends on a softmax or a fused node."""
    waiting, seen = [module.graph.output_node()], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return any(is_candidate(node) for node in seen)


Outcome = str


def check(name: str, edits: list[Edit]) -> Outcome:
    """Apply the edits and hold the matcher to its word. Returns what happened, for the coverage test."""
    entry = REGISTRY[name]
    module, before, _ = base(name)
    edited = editable(module)
    try:
        for edit in edits:
            edit(edited.graph)
            refresh(edited)
        inputs = [entry.example(*size, torch.float64) for size in entry.lengths]
        expected = [outputs(edited, tuple(x.values())) for x in inputs]
    except (Impossible, StopIteration, RuntimeError):
        return "impossible"
    old = [outputs(module, tuple(x.values())) for x in inputs]
    changed = any(
        len(a) != len(b) or not all(same(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(expected, old, strict=True)
    )
    report = find_attention(edited)
    if not report.sites:
        assert report.refusals or not alive(edited), f"{name}: a candidate is missing"
        return "refused"
    if changed and touched(before.sites[0], edited.graph):
        assert record(report) != record(before), f"{name}: other numbers, same record\n{edited.graph}"
    raised = raise_attention(edited)
    for x, wanted in zip(inputs, expected, strict=True):
        given = outputs(raised, tuple(x.values()))
        assert len(given) == len(wanted)
        for a, b in zip(given, wanted, strict=True):
            assert same(a, b, 1e-5), f"{name}: wrong rewrite, off by {(a - b).abs().max()}\n{edited.graph}"
        if len(report.sites) == 1:
            check_mask(report.sites[0], raised, x)
    return "accepted" if changed else "same numbers"


def same(a: Tensor, b: Tensor, limit: float = 1e-9) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.double(), b.double()
    scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1.0)
    return torch.allclose(a, b, rtol=0.0, atol=float(limit * scale), equal_nan=True)


@st.composite
def edited_graphs(draw: st.DrawFn, most: int) -> tuple[str, list[Edit]]:
    name = draw(st.sampled_from(BASES))
    ways = base(name)[2]
    kinds = sorted(kind for kind in ways if ways[kind])
    edits = []
    for _ in range(draw(st.integers(1, most))):
        edits.append(draw(st.sampled_from(ways[draw(st.sampled_from(kinds))])))
    return name, edits


fixed = partial(hypothesis.settings, derandomize=True, deadline=None, database=None)
quiet = list(hypothesis.HealthCheck)


HOW_OFTEN = [1, pytest.param(8, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", HOW_OFTEN)
def test_one_edit_changes_the_record_or_is_refused_and_never_misleads(times: int) -> None:
    fuzz(30 * times, most=1)


@pytest.mark.parametrize("times", HOW_OFTEN)
def test_several_edits_never_mislead(times: int) -> None:
    fuzz(12 * times, most=3)


def fuzz(examples: int, most: int) -> None:
    @fixed(max_examples=examples, suppress_health_check=quiet)
    @hypothesis.given(edited_graphs(most=most))
    def run(case: tuple[str, list[Edit]]) -> None:
        check(*case)

    run()


@pytest.mark.parametrize("kind", sorted(EDITS))
def test_every_kind_of_edit_bites(kind: str) -> None:
    """Each kind leaves graphs that run and differ: the fuzz tests something. Spread over bases and places."""
    seen: collections.Counter[str] = collections.Counter()
    for name in BASES:
        ways = base(name)[2][kind]
        for edit in ways[:: max(1, len(ways) // 3)]:
            seen[check(name, [edit])] += 1
        if seen["refused"] + seen["accepted"] >= 2:
            break
    assert seen["refused"] + seen["accepted"] >= 2, seen


def test_unedited_graph_is_accepted() -> None:
    """The baseline of the fuzz: refreshing alone changes no number and no record."""
    for name in BASES:
        module, before, _ = base(name)
        copy = editable(module)
        refresh(copy)
        assert record(find_attention(copy)) == record(before)
        assert check(name, []) == "same numbers"
