"""What every walk over a graph shares: the ancestors of nodes, all of them or by the inputs that count."""

from __future__ import annotations

import operator

from linearize.passes.graphs import ancestors, attribute
from torch import nn
from torch.fx import Graph, GraphModule


def test_ancestors_are_the_nodes_and_all_they_are_computed_from() -> None:
    """Each once, also where two ways lead to it; what only uses them is left out."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    total = graph.call_function(operator.add, (a, b))
    twice = graph.call_function(operator.add, (total, total))
    other = graph.call_function(operator.neg, (twice,))
    assert ancestors([twice]) == {a, b, total, twice}
    assert ancestors([total, other]) == {a, b, total, twice, other}
    assert ancestors([]) == set()


def test_ancestors_follow_only_the_inputs_that_count() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    total = graph.call_function(operator.add, (a, b))
    root = graph.call_function(operator.neg, (total,))
    assert ancestors([root], lambda node: node.all_input_nodes[:1]) == {a, total, root}
    assert ancestors([root], lambda node: []) == {root}


def test_attribute_reads_what_the_node_names_in_the_owning_module() -> None:
    graph = Graph()
    weight = graph.get_attr("inner.weight")
    graph.output(weight)
    net = nn.ModuleDict({"inner": nn.Linear(2, 3)})
    assert attribute(next(iter(GraphModule(net, graph).graph.nodes))) is net["inner"].weight
