"""The graph that autograd recorded, looked at: which leaves losses lead to, and where tensors stand in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]
"""A node of autograd's graph, and which of its outputs: a tensor's place in the graph."""

_OF_PYTORCH = re.compile(r"\w+Backward\d+")
"""How the classes of nodes are called that are generated from PyTorch's list of derivatives."""


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor that requires a gradient stands."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def leaf_of(node: Node) -> Tensor | None:
    """The tensor into whose ``.grad`` a node accumulates; None of a node that computes."""
    return getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None


def computes_what_is_asked(node: Node) -> bool:
    """Whether it is one of PyTorch's own, which leave out what no next node asks for, or what no gradient came for.

    A node of a user's ``autograd.Function``, of a compiled model or a checkpoint computes all it has.
    """
    return _is_of_pytorch(type(node))


@cache
def _is_of_pytorch(kind: type[Node]) -> bool:
    return _OF_PYTORCH.fullmatch(kind.__name__) is not None


def leaves_of(losses: Sequence[Tensor]) -> dict[Node, Tensor]:
    """The leaves that losses reach, by the nodes that accumulate into them."""
    leaves: dict[Node, Tensor] = {}
    waiting = [edge_of(loss)[0] for loss in losses]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if (leaf := leaf_of(node)) is not None:
            leaves[node] = leaf
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        waiting += fresh
    return leaves


class Crossing(NamedTuple):
    """Where a gradient goes from a head into a feature."""

    node: Node
    output: int
    """Of its gradients, which."""
    feature: int
    """A number."""


class Part(NamedTuple):
    """What some losses lead to that have computing nodes in common, on this side of the features."""

    losses: list[int]
    leaves: dict[Node, Tensor]
    """By the nodes that accumulate into them: the heads' parameters."""
    crossings: list[Crossing]
    foreign: list[Node]
    """Nodes that compute all they have."""


class Behind(NamedTuple):
    """What lies behind features."""

    leaves: dict[Node, Tensor]
    """By the nodes that accumulate into them: the trunk's parameters."""
    is_nested: bool
    """Whether a feature is computed from another."""


class Heads:
    """The graphs of losses down to the features that they are computed from.

    Args:
        features: where these stand, each with its number.

    Attributes:
        parts: of each loss, in the order in which they came, the part that it belongs to.
    """

    def __init__(self, features: Mapping[Edge, int]) -> None:
        self._features = features
        self._first: dict[Node, int] = {}  # of each node that computes, the loss that first came to it
        self.parts: list[Part] = []

    def add(self, loss: Tensor) -> int:
        """Take in the graph of the next loss, which is no feature itself. Its number."""
        number = len(self.parts)
        part = Part([number], {}, [], [])
        self.parts.append(part)
        waiting = [edge_of(loss)[0]]
        while waiting:
            node = waiting.pop()
            if (leaf := leaf_of(node)) is not None:
                part.leaves[node] = leaf
            elif node not in self._first:
                self._first[node] = number
                if not computes_what_is_asked(node):
                    part.foreign.append(node)
                for output, (following, place) in enumerate(node.next_functions):
                    if following is None:
                        continue
                    feature = self._features.get((following, place))
                    if feature is None:
                        waiting.append(following)
                    else:
                        part.crossings.append(Crossing(node, output, feature))
            elif (other := self.parts[self._first[node]]) is not part:
                self._join(other, part)
        return number

    def _join(self, other: Part, part: Part) -> None:
        """Make one part of two: ``part``."""
        part.losses.extend(other.losses)
        part.leaves.update(other.leaves)
        part.crossings.extend(other.crossings)
        part.foreign.extend(other.foreign)
        for loss in other.losses:
            self.parts[loss] = part


def look_behind(features: Mapping[Edge, int]) -> Behind:
    """What a gradient meets that goes on behind features, through the rest of the graph."""
    leaves: dict[Node, Tensor] = {}
    is_nested = False
    seen: set[Node] = set()
    waiting = [node for node, _ in features]
    while waiting:
        for edge in waiting.pop().next_functions:
            node = edge[0]
            if node is None:
                continue
            is_nested = is_nested or (node, edge[1]) in features
            if node not in seen:
                seen.add(node)
                if (leaf := leaf_of(node)) is not None:
                    leaves[node] = leaf
                waiting.append(node)
    return Behind(leaves, is_nested)
