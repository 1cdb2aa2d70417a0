"""The rounds of MLPerf Inference: seeds, what the submission checker demands, and the layout it expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.errors import InputError

Seeds = Mapping[str, int]


@dataclass(frozen=True)
class Round:
    """``required``: scenarios of the closed division by category and benchmark. ``audits``: compliance tests it wants.

    ``audit_seeds`` are those of TEST05. ``one_folder``: everything of a scenario lies together.
    """

    name: str
    seeds: Seeds
    audit_seeds: Seeds
    required: Mapping[str, Mapping[str, tuple[str, ...]]]
    audits: tuple[str, ...]
    one_folder: bool


def _seeds(queries: int, samples: int, schedule: int) -> dict[str, int]:
    return {"qsl_rng_seed": queries, "sample_index_rng_seed": samples, "schedule_rng_seed": schedule}


_STREAM_OFFLINE = ("SingleStream", "Offline")
_SERVER_OFFLINE = ("Server", "Offline")

ROUNDS = {
    r.name: r
    for r in (
        Round(
            "v6.1",
            _seeds(2085463073848966840, 2747215439041700203, 16159082839903944936),
            _seeds(7975553102935885558, 11403566307062068064, 15816800565822761601),
            {"edge": {"bert-99": _STREAM_OFFLINE, "bert-99.9": _STREAM_OFFLINE}, "datacenter": {}},
            ("TEST01",),
            one_folder=True,
        ),
        Round(
            "v4.1",
            _seeds(3066443479025735752, 10688027786191513374, 14962580496156340209),
            _seeds(16799458546791641818, 5453809927556429288, 5435552105434836064),
            {
                "edge": {"bert-99": _STREAM_OFFLINE},
                "datacenter": {"bert-99": _SERVER_OFFLINE, "bert-99.9": _SERVER_OFFLINE},
            },
            ("TEST01", "TEST05"),
            one_folder=False,
        ),
    )
}


def find_round(name: str) -> Round:
    """The round of that name. Raises InputError, which lists the names."""
    if name not in ROUNDS:
        raise InputError(f"unknown round {name!r}; known: {', '.join(ROUNDS)}")
    return ROUNDS[name]
