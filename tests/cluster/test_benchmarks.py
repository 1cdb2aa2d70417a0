"""The logic of benchmarks/cluster: how stand-ins keep time, how rates are found, and how runs are judged."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(_BENCHMARKS / "cluster"), str(_BENCHMARKS / "serve")]

import faults  # noqa: E402
import load  # noqa: E402
import standin  # noqa: E402
import throughput  # noqa: E402


def test_work_is_done_one_after_another() -> None:
    pace = standin.Pace()
    assert pace.take(2.0, now=10.0) == (12.0, 2.0)
    assert pace.take(1.0, now=10.5) == (13.0, 3.0)  # waits for the one before
    assert pace.take(1.0, now=20.0) == (21.0, 4.0)  # idle time is not made up for


def test_a_stand_in_answers_each_row_and_says_who_and_how_busy() -> None:
    session = standin.TimedSession(3, lambda: 1e4)
    begin = time.monotonic()
    rows = [{standin.INPUT: np.array([1, 2, 3])}, {standin.INPUT: np.array([5])}]
    (answers,) = session.run_ragged([standin.OUTPUT], rows)
    seconds = (standin.BATCH_TOKENS + 4) / 1e4
    assert time.monotonic() - begin >= seconds
    assert [answer.tolist() for answer in answers] == [[6, 3, seconds], [5, 3, seconds]]


def test_the_search_finds_the_highest_rate() -> None:
    search = throughput.Search(unit=32.0)
    for _ in range(5):
        search.learn({}, kept=search.rate <= 21.0)
    assert search.best == {"rate": 21.0}


def tally(*answers: tuple[float, int]) -> load.Tally:
    """Answers that took so long, with these statuses, one a second."""
    return load.Tally([load.Answer(float(i), seconds, status) for i, (seconds, status) in enumerate(answers)])


def test_a_rate_is_kept_when_all_are_answered_in_time() -> None:
    quick = [(0.1, 200)] * 200
    assert throughput.keeps(tally(*quick), 0.2)
    assert throughput.keeps(tally((9.0, 200), *quick), 0.2)  # the start does not count
    assert not throughput.keeps(tally(*quick, *[(0.3, 200)] * 4), 0.2)
    assert not throughput.keeps(tally((0.1, 500), *quick), 0.2)
    assert not throughput.keeps(tally((0.1, 429), *quick), 0.2)


def test_any_stretch_of_requests_is_about_the_same_work() -> None:
    tokens = throughput.alike(1)
    assert len(tokens) == 61
    assert np.resize(tokens, 120).mean() == pytest.approx(tokens.mean(), rel=0.02)


def test_utilisations_are_compared_with_the_busiest() -> None:
    assert throughput.spread([0.9, 0.81, 0.9]) == pytest.approx(0.1)


def test_what_is_lost_is_counted() -> None:
    found = faults.summarise(tally((0.1, 200), (0.2, 429), (0.3, 500), (0.4, 503), (0.5, 0), (0.6, -1)), 6.0)
    assert (found["requests"], found["lost"], found["worst_s"]) == (6, 4, 0.6)
    with pytest.raises(SystemExit, match="did not run"):
        faults.summarise(tally(), 1.0)


def test_faults_are_judged_by_their_worst_repeat() -> None:
    good, slow, lossy = (
        {"lost": n, "p99_s": p, "worst_s": w} for n, p, w in ((0, 0.5, 2.0), (0, 1.5, 2.0), (1, 0.5, 2.0))
    )
    kill, cut, drain = (faults.FAULTS[name] for name in ("kill", "cut", "drain"))
    assert faults.judge(kill, [good, good], retry=True)["met"]
    assert not faults.judge(kill, [good, slow], retry=True)["met"]
    assert not faults.judge(kill, [good, lossy], retry=True)["met"]
    assert faults.judge(cut, [good, slow], retry=True)["met"]
    assert not faults.judge(drain, [lossy], retry=True)["met"]
    with pytest.raises(SystemExit, match="no repeat"):
        faults.judge(kill, [], retry=True)


def test_the_control_arm_must_lose_some() -> None:
    good, lossy = ({"lost": n, "p99_s": 0.5, "worst_s": 2.0} for n in (0, 3))
    assert faults.judge(faults.FAULTS["kill"], [good, lossy], retry=False)["met"]
    assert not faults.judge(faults.FAULTS["kill"], [good], retry=False)["met"]
    assert "met" not in faults.judge(faults.FAULTS["drain"], [good], retry=False)


def test_repeats_are_kept_and_one_that_hit_nothing_does_not_count(tmp_path: Path) -> None:
    kill = faults.FAULTS["kill"]
    run: dict[str, Any] = {"lost": 0, "p99_s": 0.5, "worst_s": 0.6}
    results = faults.Results(tmp_path / "found.json", fresh=False, retry=True)
    results.add(kill, {**run, "in_flight": 3})
    results.add(kill, {**run, "in_flight": 1})
    assert len(faults.Results(tmp_path / "found.json", fresh=False, retry=True).runs(kill)) == 1
    assert not faults.Results(tmp_path / "found.json", fresh=False, retry=False).runs(kill)
    assert not faults.Results(tmp_path / "found.json", fresh=True, retry=True).runs(kill)


def test_a_client_with_two_addresses_asks_the_second() -> None:
    async def run() -> tuple[list[int], int]:
        asked = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(length)
                asked += 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

        server = await asyncio.start_server(answer, "127.0.0.2", 0)
        port = server.sockets[0].getsockname()[1]
        samples = [{"ids": np.ones((1, 2), np.int64)}]
        both, one = (load.Http(port, "m", samples, "out", h) for h in (("127.0.0.1", "127.0.0.2"), ("127.0.0.1",)))
        statuses = [await both.send(0), await both.send(1)]
        failed = load.Tally()
        await failed.run(one.send, 0)
        await both.close()
        server.close()
        return [*statuses, failed.answers[0].status], asked

    assert asyncio.run(run()) == ([200, 200, 0], 2)
