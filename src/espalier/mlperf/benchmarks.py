"""The benchmarks: one row each. A new one needs a library of samples with its scorer, and a row."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.errors import InputError

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """``model`` is the name that LoadGen's own configuration knows; ``library`` a key of ``library.LIBRARIES``.

    ``reference`` is the metric of MLPerf's reference model and ``share`` the part of it that the closed division
    demands; ``samples`` the size the data set must have. All three are None where MLPerf says nothing.
    ``latency_ms``: the bound of the Server scenario, over the 99th percentile.
    """

    name: str
    title: str
    model: str
    library: str
    metric: str
    official: bool
    reference: float | None = None
    share: float | None = None
    samples: int | None = None
    latency_ms: float = 130.0

    @property
    def target(self) -> float | None:
        """The least metric of the closed division, None where there is none."""
        return None if self.reference is None or self.share is None else self.reference * self.share


def _bert(name: str, share: float) -> Benchmark:
    return Benchmark(
        name=name,
        title=f"{name}: question answering on SQuAD v1.1",
        model="bert",
        library="squad",
        metric="F1",
        official=True,
        reference=90.874,
        share=share,
        samples=10833,
    )


BENCHMARKS = {
    row.name: row
    for row in (
        _bert("bert-99", 0.99),
        _bert("bert-99.9", 0.999),
        Benchmark(
            name="embeddings",
            title="embeddings: sentence similarity on STS-B (Espalier's own benchmark, not MLPerf's)",
            model="embeddings",
            library="pairs",
            metric="Spearman",
            official=False,
        ),
        Benchmark(
            name="custom",
            title="custom: question answering on your own data (not an MLPerf benchmark)",
            model="custom",
            library="squad",
            metric="F1",
            official=False,
        ),
    )
}


def find(name: str) -> Benchmark:
    """The row of that name. Raises InputError, which lists the names."""
    if name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def scenarios(names: str) -> list[str]:
    """``"all"`` or names separated by commas, in any case, in MLPerf's spelling. Raises InputError."""
    if names.lower() == "all":
        return list(SCENARIOS)
    spelled = {scenario.lower(): scenario for scenario in SCENARIOS}
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in spelled]
    if unknown or not wanted:
        raise InputError(f"unknown scenario {(unknown or [names])[0]!r}; known: {', '.join(SCENARIOS)}, all")
    return [spelled[name] for name in dict.fromkeys(wanted)]
