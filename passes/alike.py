"""Attention of a model with many blocks that are alike, from the trace of two of them.

`torch.export` takes a third of a second for each layer of a decoder, and of thirty layers twenty-nine say
nothing new. So while the model is traced, a block that must give the graph of an earlier one is not run: it
gives unknown tensors of the earlier one's shapes, and what is proved of the earlier one is said of it.

It must give that graph when it is of the same classes, holds the same (`blocks.py`), and is called with the
same tensors, but for those that change from call to call, such as the hidden states. In the block that
stands for others these are unknown too, so that nothing that is proved of it rests on them. What the two
hold may differ where the forward of the one that is traced never looked: a layer's number, mostly.

Whatever is not as plain as that, a single refused candidate included, is found by tracing everything.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from .blocks import State, blocks_of, differences, is_whole_number, state_of, values_of
from .capture import captured_once
from .dialect import module_path
from .evaluate import value_ancestors
from .raise_ import fixed_tensors
from .reading import Watched, watched
from .sequence import find_attention
from .site import MatchReport, Site, term_operands
from .twins import twins_of
from .verify import number_sites

_library = torch.library.Library("linearize", "FRAGMENT")
_library.define("unknown(Tensor tensor, Tensor[] of, int call, int place) -> Tensor")
_library.impl("unknown", lambda tensor, of, call, place: tensor.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("linearize::unknown", lambda tensor, of, call, place: torch.empty_like(tensor))
unknown = torch.ops.linearize.unknown.default

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _NotAlikeError(Exception):
    """Blocks cannot stand for each other here."""


def find_alike(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> MatchReport | None:
    """As `find_attention` of a capture of a model, from two of each kind of its blocks.

    Of a site in a block that was not traced the anchor is the node that stands for the block, and the other
    nodes are those of the block that was.

    Args:
        model: Any module. It is not changed.
        args: Positional example inputs.
        kwargs: Example inputs by name.

    Returns:
        The report, or None where everything has to be traced.
    """
    blocks = blocks_of(model)
    if not blocks:
        return None
    values = values_of(blocks)
    twin, twins = twins_of(model, hollow=_others(blocks, values))
    tracing = _Tracing(values)
    for block, form in blocks.items():
        tracing.take_over(twins[block], block, form)
    try:
        report = find_attention(captured_once(twin, args, kwargs))
        return _spread(model, report, tracing)
    except Exception:  # torch.export raises nearly every class; the trace of everything says what is wrong
        return None


def _others(blocks: Mapping[nn.Module, Any], values: Mapping[int, Any]) -> set[nn.Module]:
    """Blocks that will hardly have to be traced: all but two of each kind that differ in whole numbers only.

    What they hold is left out of the trace, which looks at every parameter. Where that was too much, the
    trace fails.
    """
    kinds: Counter[Any] = Counter()
    found = set()
    for block, form in blocks.items():
        words = state_of(block, values).items()
        kind = form, frozenset((place, word) for place, word in words if not is_whole_number(word))
        kinds[kind] += 1
        if kinds[kind] > 2:
            found.add(block)
    return found


@dataclass
class _Call:
    """One traced call of a block.

    number: Of the call. state: Of the block. leaves, spec: The arguments. read: What the forward looked at.
    changing: Which of the arguments are unknown in it. results, shape: What it gave, taken apart, where it
    can stand for others.
    """

    number: int
    state: State
    leaves: list[Any]
    spec: Any
    read: Watched
    changing: tuple[int, ...] = ()
    results: list[Any] | None = None
    shape: Any = None

    def takes(self, state: State, spec: Any) -> bool:
        """Whether a block is like this one in all that its forward looked at, and called in the same form."""
        return bool(spec == self.spec) and not differences(self.state, state) & self.read.places

    def is_like(self, state: State, leaves: Sequence[Any], spec: Any) -> bool:
        """Whether a call of another block gives the graph of this one."""
        if self.results is None or not self.takes(state, spec):
            return False
        for place, (mine, other) in enumerate(zip(self.leaves, leaves, strict=True)):
            if place in self.changing:
                if _described(mine) != _described(other):
                    return False
            elif not _is_same(mine, other):
                return False
        return True


@dataclass
class _Tracing:
    """What happens in the blocks of a model while it is traced.

    values: As `state_of` takes them. calls: Those that were traced, by form of block. stands: By number of
    a call that was not traced the one that stands for it. called: Blocks that were called.
    """

    values: Mapping[int, Any]
    calls: dict[Any, list[_Call]] = field(default_factory=dict)
    stands: dict[int, _Call] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)

    def take_over(self, twin: nn.Module, block: nn.Module, form: Any) -> None:
        """Let the twin of a block be called through here; it may be hollow."""
        kind: Any = type(twin)
        hollow = len(list(twin.modules())) < len(list(block.modules()))

        def run(live: Any, *args: Any, **kwargs: Any) -> Any:
            if hollow:
                raise _NotAlikeError("a block that was left out is not like another")
            return kind.forward(live, *args, **kwargs)

        def forward(live: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(block if hollow else twin, form, functools.partial(run, live), args, kwargs)

        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
        twin.__class__ = type(kind.__name__, (kind,), members)

    def _call(
        self, block: nn.Module, form: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if block in self.called:
            raise _NotAlikeError("a block is called twice")
        self.called.add(block)
        number = len(self.called)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        state = state_of(block, self.values)
        if not all(isinstance(leaf, (Tensor, torch.SymInt, *_PLAIN)) for leaf in leaves):
            return run(*args, **kwargs)
        known = self.calls.setdefault(form, [])
        for one in known:
            if one.is_like(state, leaves, spec):
                self.stands[number] = one
                return _instead(number, one, leaves)
        before = next((one for one in reversed(known) if one.takes(state, spec)), None)
        call = _Call(number, state, leaves, spec, Watched())
        if before is not None:
            call.changing = tuple(
                place
                for place, pair in enumerate(zip(before.leaves, leaves, strict=True))
                if all(isinstance(leaf, Tensor) for leaf in pair) and pair[0] is not pair[1]
            )
            given = [
                unknown(leaf, [], number, place) if place in call.changing else leaf
                for place, leaf in enumerate(leaves)
            ]
            args, kwargs = pytree.tree_unflatten(given, spec)
            call.leaves = given
        known.append(call)
        with watched(block, call.read):
            result = run(*args, **kwargs)
        after, after_spec = pytree.tree_flatten((args, kwargs))
        untouched = after_spec == spec and all(a is b for a, b in zip(after, call.leaves, strict=True))
        if call.changing and untouched and not differences(state, state_of(block, self.values)):
            results, call.shape = pytree.tree_flatten(result)
            if all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in results):
                call.results = results
        return result


def _instead(number: int, call: _Call, leaves: Sequence[Any]) -> Any:
    """The results of a block that another stands for: unknown, or what it hands on."""
    results = []
    of = [leaves[place] for place in call.changing]
    for place, result in enumerate(call.results or ()):
        handed_on = next((i for i, leaf in enumerate(call.leaves) if leaf is result), None)
        if not isinstance(result, Tensor):
            results.append(result)
        elif handed_on is not None:
            results.append(leaves[handed_on])
        else:
            results.append(unknown(result, of, number, place))
    return pytree.tree_unflatten(results, call.shape)


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, (Tensor, torch.SymInt)):
        return first is second
    return type(first) is type(second) and bool(first == second)


def _described(tensor: Tensor) -> Any:
    sizes = [tuple(map(_size, numbers)) for numbers in (tensor.shape, tensor.stride())]
    return (*sizes, tensor.dtype, tensor.device, tensor.requires_grad)


def _size(number: Any) -> Any:
    """A size as a number or an expression, so that to compare two is no question to the trace."""
    return number.node.expr if isinstance(number, torch.SymInt) else number


# --- from the blocks that were traced to the others ---------------------------------------------------------


def _spread(model: nn.Module, report: MatchReport, tracing: _Tracing) -> MatchReport | None:
    """The report with the sites of all blocks; None where that cannot be said."""
    if report.refusals or not tracing.stands:
        return None
    inside, instead = _unknowns(report, tracing)
    of_call: dict[int, list[Site]] = {number: [] for number in inside}
    for site in report.sites:
        terms = [node for term in term_operands(site.program) for node in value_ancestors(term.node)]
        if any(node.target is unknown for node in terms):
            return None
        for number, path in inside.items():
            if _is_in(site.path, path):
                of_call[number].append(site)
    sites = {site.anchor: [site] for site in report.sites}
    for number, (node, path) in instead.items():
        call = tracing.stands[number]
        theirs = inside[call.number]
        copies = [_moved(site, theirs, path, node) for site in of_call[call.number]]
        for site in of_call[call.number]:
            _check_weights(model, site, theirs, path)
        sites[node] = copies
    ordered = [site for node in report.graph_module.graph.nodes for site in sites.get(node, ())]
    return replace(report, sites=number_sites(ordered))


def _unknowns(report: MatchReport, tracing: _Tracing) -> tuple[dict[int, str], dict[int, tuple[Node, str]]]:
    """The path of every block that stands for others, by number of its call; and for every other block the
    first node of its results with its path.

    Raises _NotAlikeError where results are used of one and not of another.
    """
    inside: dict[int, str] = {}
    instead: dict[int, tuple[Node, str]] = {}
    used: dict[int, set[int]] = {number: set() for number in tracing.stands}
    for node in report.graph_module.graph.find_nodes(op="call_function", target=unknown):
        _, _, number, place = node.args
        path = module_path(node)[-1][0]
        if number in tracing.stands:
            instead.setdefault(number, (node, path))
            used[number].add(place)
        else:
            inside.setdefault(number, path)
    same: dict[int, set[int]] = {}
    for number, call in tracing.stands.items():
        if not used[number] or same.setdefault(call.number, used[number]) != used[number]:
            raise _NotAlikeError("some results are used of one block and not of another")
        if call.number not in inside:
            raise _NotAlikeError("a block does not depend on what it is given")
    return inside, instead


def _is_in(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _moved(site: Site, theirs: str, path: str, node: Node) -> Site:
    """A site of one block as that of another."""

    def renamed(name: str) -> str:
        return path + name[len(theirs) :] if _is_in(name, theirs) else name

    mask = replace(site.mask, leaves=tuple(renamed(name) for name in site.mask.leaves))
    return replace(site, path=renamed(site.path), anchor=node, mask=mask)


def _check_weights(model: nn.Module, site: Site, theirs: str, path: str) -> None:
    """Raise _NotAlikeError where a proof looked at the values of a parameter that are others elsewhere."""
    for name in fixed_tensors(site).union(site.mask.leaves):
        if not _is_in(name, theirs):
            continue
        with suppress(AttributeError):  # a constant of the trace is no parameter
            mine = model.get_parameter(name)
            other = model.get_parameter(path + name[len(theirs) :])
            if not torch.equal(mine, other):
                raise _NotAlikeError(f"{name} is read")
