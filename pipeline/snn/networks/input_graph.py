"""Autograd's graph behind the input of a spiking layer: what feeding.py asks of it."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

Node = Any
"""A node of autograd's graph; those of parameters and meters have them as `variable`."""
_PRODUCT = re.compile("conv|mm|linear", re.IGNORECASE)
"""In the names of autograd's nodes that multiply with a weight."""


class InputGraph:
    """Autograd's graph behind the input x of a layer, up to the spikes of other layers.

    A part that is compiled is an end, since it hides what it does with its leaves.

    Args:
        x: has a gradient.
        meters: by the id of a layer's meter, which its spikes lead to, how many layers lie behind them.
        end: a node at which to end too.
    """

    def __init__(self, x: Tensor, meters: dict[int, int], end: Node) -> None:
        self.root: Node = x.grad_fn or x.view_as(x).grad_fn
        self.meters = meters
        self.distance: dict[Node, int] = {self.root: 0}
        """Nodes from x to each node, nearest first."""
        self._inputs: dict[Node, list[Node]] = {}
        self._followers: dict[Node, list[Node]] = {}
        for node in (following := [self.root]):
            ended = node is end or node.name().startswith("CompiledFunction") or hasattr(node, "variable")
            behind = [] if ended else [one for one, _ in node.next_functions if one is not None]
            self._inputs[node] = [one for one in behind if self.is_meter(one)] or behind
            for one in self._inputs[node]:
                self._followers.setdefault(one, []).append(node)
                if one not in self.distance:
                    self.distance[one] = self.distance[node] + 1
                    following.append(one)
        self.depth: dict[Node, int] = {}
        """The most spiking layers, one behind the other, that lie behind each node."""
        self._carries: dict[Node, bool] = {}
        """Whether a node has something that comes of spikes or of a product with a weight."""
        self._sum_up()

    def is_meter(self, node: Node) -> bool:
        return id(getattr(node, "variable", None)) in self.meters

    def _sum_up(self) -> None:
        waiting = [self.root]
        while waiting:
            node = waiting[-1]
            if missing := [one for one in self._inputs[node] if one not in self.depth]:
                waiting += missing
                continue
            waiting.pop()
            inputs, meter = self._inputs[node], self.is_meter(node)
            self.depth[node] = (
                self.meters[id(node.variable)] if meter else max((self.depth[one] for one in inputs), default=0)
            )
            self._carries[node] = meter or _is_product(node) or any(self._carries[one] for one in inputs)

    def product_of(self, leaf: Node) -> Node:
        """The product of the weight `leaf` with what it gets: the nearest node towards x that is one by its name, or
        has spikes behind it."""
        level = [leaf]
        while level:
            level = [follower for node in level for follower in self._followers.get(node, ())]
            for node in level:
                if _is_product(node) or self.depth[node]:
                    return node
        return self.root

    def first(self, products: Collection[Node]) -> set[Node]:
        """Those of `products` that are met on a way from x without another before them, and of these only such as have
        no other of them behind: not a gate, which is computed from the output of another."""
        met = self._met(self.root, products)
        return {one for one in met if not any(self._met(behind, met) for behind in self._inputs[one])}

    def _met(self, start: Node, products: Collection[Node]) -> set[Node]:
        """Those of `products` that are met from `start` on, `start` too, without another before them."""
        met, seen, waiting = set(), set(), [start]
        while waiting:
            node = waiting.pop()
            if node in products:
                met.add(node)
            elif node not in seen:
                seen.add(node)
                waiting += self._inputs[node]
        return met

    def on_the_way(self) -> Iterator[Node]:
        """The nodes from x to the nearest product with a weight, sum, or other meeting of two currents."""
        node = self.root
        while not _is_product(node):
            yield node
            current = [one for one in self._inputs[node] if self._carries[one]]
            if len(current) != 1:
                return
            node = current[0]

    def leaves_of(self, node: Node) -> list[Tensor]:
        """The leaves that a node uses directly."""
        return [one.variable for one in self._inputs[node] if hasattr(one, "variable")]


def _is_product(node: Node) -> bool:
    return _PRODUCT.search(node.name()) is not None
