"""The ordered rewrites between an importer and the compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from espalier.ir.graph import Graph
from espalier.ir.verify import verify
from espalier.passes.cleanup import cleanup
from espalier.passes.fold import fold
from espalier.passes.lift import lift


@dataclass(frozen=True)
class Pass:
    """A named rewrite. ``run`` may change the graph it is given or return a new one."""

    name: str
    run: Callable[[Graph], Graph]


PASSES: tuple[Pass, ...] = (
    Pass("fold", fold),
    Pass("lift", lift),
    Pass("cleanup", cleanup),
)


def run(graph: Graph, *, dump: Callable[[str, Graph], None] | None = None, until: str = "") -> Graph:
    """Run every pass in order and verify the graph after each.

    ``dump(name, graph)`` is called after each pass; ``until`` names the last pass to run (all when empty). The
    graph given may be changed. Raises GraphError when a pass breaks the graph or ``until`` is no pass.
    """
    from espalier.errors import GraphError

    if until and until not in {step.name for step in PASSES}:
        raise GraphError(f"there is no pass {until!r}; expected one of {', '.join(step.name for step in PASSES)}")
    for step in PASSES:
        graph = step.run(graph)
        verify(graph)
        if dump is not None:
            dump(step.name, graph)
        if step.name == until:
            break
    return graph


__all__ = ["PASSES", "Pass", "run"]
