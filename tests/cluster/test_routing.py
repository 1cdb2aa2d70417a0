"""The router: who gets what, and what it learns."""

from __future__ import annotations

import random

import pytest

from espalier.cluster.routing import POLICIES, Node, Router
from espalier.errors import InputError


def shares(policy: str, speeds: list[float], count: int = 2000) -> list[float]:
    """The share of the work each node gets when all work flat out and answer at their speeds."""
    nodes = [Node(str(i), speed) for i, speed in enumerate(speeds)]
    router = Router(nodes, policy)
    for _ in range(count):
        router.route(random.Random(count).randint(10, 300), 0.0)
    total = sum(node.tokens for node in nodes)
    return [node.tokens / total for node in nodes]


@pytest.mark.parametrize("policy", ["least-work", "weighted-connections", "power-of-two-work", "random"])
def test_work_goes_by_speed(policy: str) -> None:
    assert shares(policy, [1000, 1000, 2000, 4000]) == pytest.approx([0.125, 0.125, 0.25, 0.5], abs=0.05)


@pytest.mark.parametrize("policy", ["least-connections", "power-of-two"])
def test_some_policies_do_not_look_at_the_speed(policy: str) -> None:
    assert shares(policy, [1000, 1000, 2000, 4000]) == pytest.approx([0.25] * 4, abs=0.05)


def test_long_sequences_count_as_what_they_are() -> None:
    nodes = [Node("a", 100), Node("b", 100)]
    router = Router(nodes)
    assert [router.route(tokens, 0.0).name for tokens in (300, 10, 10, 10)] == ["a", "b", "b", "b"]


def test_a_window_keeps_the_rest_in_one_place() -> None:
    nodes = [Node("slow", 100), Node("fast", 400)]
    router = Router(nodes, window=1.0)
    sent = 0
    while router.route(50, 0.0) is not None:
        sent += 50
    assert [node.tokens for node in nodes] == [100, 400]
    nodes[1].answered(50, 0.1)
    assert router.route(50, 0.1) is nodes[1]


def test_a_sequence_longer_than_the_window_still_goes_to_an_idle_node() -> None:
    router = Router([Node("a", 10)], window=0.5)
    assert router.route(100, 0.0) is not None
    assert router.route(1, 0.0) is None


def test_a_node_that_is_down_gets_nothing() -> None:
    nodes = [Node("a", 100), Node("b", 1)]
    router = Router(nodes)
    nodes[0].down = True
    assert router.route(1, 0.0) is nodes[1]
    nodes[1].down = True
    assert router.route(1, 0.0) is None


def test_the_speed_is_learned_from_what_is_answered() -> None:
    node = Node("a", 1000)
    now = 0.0
    for _ in range(200):
        node.sent(10, now)
        now += 0.1  # 100 tokens a second
        node.answered(10, now)
        now += 5.0  # idle time does not count
    assert node.speed == pytest.approx(100, rel=0.05)
    assert (node.items, node.tokens) == (0, 0)


def test_what_a_lost_node_had_is_forgotten() -> None:
    node = Node("a", 100)
    node.sent(10, 0.0)
    node.lost()
    assert node.seconds() == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="positive"):
        Node("a", 0)
    with pytest.raises(InputError, match="least-work"):
        Router([Node("a", 1)], "best")
    with pytest.raises(InputError, match="at least one"):
        Router([])
    assert "least-work" in POLICIES
