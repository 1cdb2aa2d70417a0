"""Which machine gets the next sequence: pure logic, without clocks or sockets, so that it can be simulated.

The measure of work is the token, and of a machine its tokens per second: measured when it joins, and learned from what
it answers. How the policies compare: docs/cluster.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from espalier.errors import InputError


class Node:
    """A machine as a router sees it. ``speed``: tokens per second; ``tokens``, ``items``: sent and not answered."""

    __slots__ = ("_busy_since", "_done", "_seconds", "down", "items", "name", "speed", "tokens")

    _LEARN_S = 0.5
    _SHARE = 0.3

    def __init__(self, name: str, speed: float) -> None:
        if not speed > 0:
            raise InputError(f"{name}: a node's speed must be positive; got {speed}")
        self.name = name
        self.speed = speed
        self.tokens = self.items = 0
        self.down = False
        self._busy_since = self._seconds = 0.0
        self._done = 0

    def seconds(self, more: int = 0) -> float:
        """Until it has done what it was sent, and ``more`` tokens."""
        return (self.tokens + more) / self.speed

    def sent(self, tokens: int, now: float) -> None:
        """A sequence was sent to it."""
        if not self.items:
            self._busy_since = now
        self.items += 1
        self.tokens += tokens

    def answered(self, tokens: int, now: float) -> None:
        """A sequence was answered. Every half a second of work the speed moves towards what was seen."""
        self.items -= 1
        self.tokens -= tokens
        self._done += tokens
        self._seconds += now - self._busy_since
        self._busy_since = now
        if self._seconds >= self._LEARN_S:
            self.speed += self._SHARE * (self._done / self._seconds - self.speed)
            self._done, self._seconds = 0, 0.0

    def lost(self) -> None:
        """What it was sent will not be answered."""
        self.tokens = self.items = 0


Policy = Callable[[Sequence[Node], int, random.Random], Node]
"""Chooses among the nodes that are up, for a sequence of so many tokens."""


def least_work(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """The node that would be done first."""
    return min(nodes, key=lambda node: node.seconds(tokens))


def least_connections(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """The node with the fewest sequences, whatever its speed."""
    return min(nodes, key=lambda node: (node.items, rng.random()))


def weighted_connections(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """The fewest sequences for its speed: what HAProxy's leastconn does with weights."""
    return min(nodes, key=lambda node: (node.items + 1) / node.speed)


def power_of_two(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """Of two at random, the one with fewer sequences: Ray Serve's own."""
    return least_connections(_two(nodes, rng), tokens, rng)


def power_of_two_work(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """Of two at random in proportion to their speeds, the one that would be done first."""
    pair = rng.choices(nodes, [node.speed for node in nodes], k=2)
    return least_work(pair, tokens, rng)


def at_random(nodes: Sequence[Node], tokens: int, rng: random.Random) -> Node:
    """Any, in proportion to the speeds."""
    return rng.choices(nodes, [node.speed for node in nodes])[0]


def _two(nodes: Sequence[Node], rng: random.Random) -> Sequence[Node]:
    return nodes if len(nodes) < 3 else rng.sample(nodes, 2)


POLICIES: dict[str, Policy] = {
    "least-work": least_work,
    "weighted-connections": weighted_connections,
    "least-connections": least_connections,
    "power-of-two": power_of_two,
    "power-of-two-work": power_of_two_work,
    "random": at_random,
}


class Router:
    """Chooses nodes, and keeps count of what they have.

    ``window``: seconds of work a node is given at most; what finds no room is the caller's to keep, and to offer
    again when something is answered. So a long queue waits in one place, and whoever is done first takes from it: no
    node runs dry while another still has much. None hands out everything at once.
    """

    def __init__(self, nodes: Sequence[Node], policy: str = "least-work", *, window: float | None = None) -> None:
        if policy not in POLICIES:
            raise InputError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
        if not nodes:
            raise InputError("a router needs at least one node")
        self.nodes = list(nodes)
        self.window = window
        self._policy = POLICIES[policy]
        self._rng = random.Random(0)

    def route(self, tokens: int, now: float) -> Node | None:
        """The node for a sequence, which counts as sent; None when no node has room, or none is up."""
        able = [node for node in self.nodes if not node.down and self._has_room(node)]
        if not able:
            return None
        node = self._policy(able, tokens, self._rng)
        node.sent(tokens, now)
        return node

    def _has_room(self, node: Node) -> bool:
        return self.window is None or not node.items or node.seconds() < self.window
