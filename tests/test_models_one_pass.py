"""The graph of one pass: what is seen of operations that no tracer follows."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.models.graph import Graph, Node
from batchnorm.models.tracing import graph_of


class Net(nn.Module):
    """A convolution and a norm, with control flow that depends on values."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.other = nn.Dropout(0.5), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.run(self, x) if x.sum() > -1e9 else x


def read(run, **options) -> tuple[Graph, Node, Node]:
    """The graph, the convolution's call and the norm's."""
    model = Net(run).eval()
    graph = graph_of(model, torch.randn(2, 3, 6, 6), **options)
    assert graph is not None
    assert graph.read_by == "hooks on one pass"
    calls = {node.module: node for node in graph.nodes}
    return graph, calls[model.conv], calls[model.norm]


def test_a_convolution_feeds_the_norm_alone():
    graph, conv, norm = read(lambda m, x: m.norm(m.conv(x)))
    assert norm.source is conv
    assert (conv.users, norm.users) == (1, 1)  # the output is a use
    assert graph.nodes[-1].inputs == (norm,)


USES = {
    "as a residual": lambda m, y: m.norm(y) + y,
    "by a view": lambda m, y: m.norm(y) + y.flatten(1).sum(),
    "without gradients": lambda m, y: m.norm(y) * (y > 0),
    "as an index": lambda m, y: m.norm(y)[:, y.mean((0, 2, 3)).argmax()],
    "detached": lambda m, y: m.norm(y) + y.detach(),
    "by what is returned": lambda m, y: {"y": m.norm(y), "raw": [y]},
    "by an attribute": lambda m, y: (setattr(m, "raw", y), m.norm(y))[1],
    "by an object": lambda m, y: (setattr(m, "raw", Held(y)), m.norm(y))[1],
}


class Held:
    """What nobody looks into."""

    def __init__(self, y) -> None:
        self.y = y


@pytest.mark.parametrize("use", USES)
def test_another_use_of_the_output_counts(use):
    _, conv, norm = read(lambda m, x: USES[use](m, m.conv(x)))
    assert norm.source is conv
    assert conv.users == 2


def test_what_is_let_go_is_no_use():
    def run(m, x):
        y = m.conv(x)
        assert len(y.shape) == 4
        m.drop(y)
        return m.norm(y)

    _, conv, norm = read(run)
    # dropout in eval mode gives the tensor itself
    assert norm.source.effect == "nothing"
    assert (norm.source.source, conv.users) == (conv, 1)


@pytest.mark.parametrize(
    "change", [lambda y: y.add_(1), lambda y: F.relu_(y), lambda y: torch._foreach_add_([y], 1.0)]
)
def test_a_change_in_place_stands_between(change):
    def run(m, x):
        y = m.conv(x)
        change(y)
        return m.norm(y)

    _, conv, norm = read(run)
    assert norm.source is not conv
    assert norm.source.source is conv


def test_two_inputs_are_both_seen_and_the_first_is_the_input():
    def run(m, x):
        y = m.conv(x)
        return torch.stack([m.norm(input=y), m.other(y)])

    graph, conv, norm = read(run)
    assert norm.source is conv
    assert norm in _all(graph.nodes[-1])  # in what is returned
    assert conv.users == 2


def _all(node: Node) -> set[Node]:
    found = {node}
    for source in node.inputs:
        found |= _all(source) if source is not None else set()
    return found


def test_weights_that_operations_take_themselves_are_listed():
    model = Net(lambda m, x: F.conv2d(m.norm(m.conv(x)), m.other.weight.mT)).eval()
    graph = graph_of(model, torch.randn(2, 3, 6, 6))
    assert [tensor is model.other.weight for tensor in graph.taken] == [True]


def test_a_module_that_fails_and_is_caught_does_not_hide_what_follows():
    def run(m, x):
        with suppress(RuntimeError):
            m.other(x)  # of another number of channels
        return m.norm(m.conv(x))

    _, conv, norm = read(run)
    assert norm.source is conv


def test_a_way_of_calling_of_ones_own_is_read_before_a_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    assert graph_of(model, x).read_by == "torch.fx"
    graph = graph_of(model, x, lambda m, x: m[0](x))
    assert graph.read_by == "hooks on one pass"
    assert [node.module for node in graph.nodes] == [model[0], None]
