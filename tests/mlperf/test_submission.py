"""Submissions: their layout, what is refused, and what the official checker says where it is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from espalier.compiler.packed import Accelerator
from espalier.errors import DataError, InputError, RulesError
from espalier.mlperf.rounds import ROUNDS
from espalier.mlperf.submission import PRUNED, RETRAINED, Submission, run_checker, submit
from espalier.mlperf.system import NETWORK_FIELDS, describe_machine


def to_round(results: Path, name: str) -> None:
    """Make the results those of another round: its seeds in place of v6.1's."""
    change(results, lambda about: about["identity"].update(round=name))
    for log in results.glob("*/*/*/mlperf_log_detail.txt"):
        text = log.read_text()
        for seed, value in ROUNDS["v6.1"].seeds.items():
            text = text.replace(
                f'"effective_{seed}", "value": {value},', f'"effective_{seed}", "value": {ROUNDS[name].seeds[seed]},'
            )
        log.write_text(text)


def change(results: Path, edit: Callable[[dict], None], name: str = "system.json") -> None:  # type: ignore[type-arg]
    """Edit the first file of that name under the results."""
    path = sorted(results.glob(f"*/{name}"))[0]
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def closed(results: Path) -> None:
    """Make the results those of a closed model that reaches its target."""
    change(results, lambda about: about["weights"].update(zeros=0.0))
    for path in results.glob("*/*/accuracy/step.json"):
        step = json.loads(path.read_text())
        step["figures"]["metric"] = 91.0
        path.write_text(json.dumps(step))
    for path in results.glob("*/*/*/*accuracy.txt"):
        hash_line = path.read_text().partition("\n")[2]
        path.write_text('{"exact_match": 83.0, "f1": 91.0}\n' + hash_line)


def test_the_layout_of_v6_1(full_results: Path, tmp_path: Path) -> None:
    submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree"))
    root = tmp_path / "tree" / "open" / "Garden"
    (system,) = (path.stem for path in (root / "systems").iterdir())
    scenario = root / "results" / system / "bert-99" / "Offline"
    names = {str(path.relative_to(scenario)) for path in scenario.rglob("*") if path.is_file()}
    logs = {"mlperf_log_summary.txt", "mlperf_log_detail.txt"}
    assert names == (
        {f"performance/run_1/{name}" for name in logs}
        | {f"accuracy/{name}" for name in (*logs, "accuracy.txt", "mlperf_log_accuracy.json")}
        | {"measurements.json", "user.conf", "README.md"}
        | {f"TEST01/performance/run_1/{name}" for name in logs}
        | {"TEST01/verify_performance.txt", "TEST01/verify_accuracy.txt"}
        | {"TEST01/accuracy/mlperf_log_accuracy.json", "TEST01/accuracy/accuracy.txt"}
    )
    assert (scenario / "accuracy" / "mlperf_log_accuracy.json").stat().st_size < 10 * 1024
    assert (root / "src" / "bert-99" / "espalier" / "mlperf" / "sut.py").is_file()
    assert "Result not verified by MLCommons Association." in (scenario / "README.md").read_text()
    assert "hash=" in (scenario / "accuracy" / "accuracy.txt").read_text()


def test_the_layout_of_v4_1(full_results: Path, tmp_path: Path) -> None:
    to_round(full_results, "v4.1")
    submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree", round="v4.1"))
    root = tmp_path / "tree" / "open" / "Garden"
    assert sorted(path.name for path in root.iterdir()) == [
        "code",
        "compliance",
        "documentation",
        "measurements",
        "results",
        "systems",
    ]
    (measurements,) = (root / "measurements").glob("*/bert-99/Offline")
    assert {path.name for path in measurements.iterdir()} == {
        "mlperf.conf",
        "user.conf",
        "README.md",
        "noop-nothing_espalier_Offline.json",
    }


def test_quick_runs_are_refused_unless_drafted(quick_results: Path, tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"performance does not conform: it had to last 0\.3 s"):
        submit(quick_results, Submission(submitter="Garden", out=tmp_path / "tree"))
    assert submit(quick_results, Submission(submitter="Garden", out=tmp_path / "tree", draft=True)).is_dir()


def test_runs_that_do_not_count_are_refused(full_results: Path, tmp_path: Path) -> None:
    change(full_results, lambda step: step.update(problems=["it was interrupted"]), "Offline/performance/step.json")
    with pytest.raises(RulesError, match="does not count: it was interrupted"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree", draft=True))


def test_runs_of_another_model_are_refused(full_results: Path, tmp_path: Path) -> None:
    change(full_results, lambda about: about["identity"].update(model="0" * 64))
    with pytest.raises(RulesError, match="was made with another model file"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree"))


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        ({"zeros": 0.9}, {}, f'90% of its weights are zero, and the rules disallow "{PRUNED}"'),
        ({"zeros": 0.0}, {}, RETRAINED),
        ({"zeros": None}, {}, "whether its model is pruned is not known"),
        ({"zeros": 0.0}, {"unmodified": True, "category": "datacenter"}, "has no bert-99 in the closed division"),
        ({"zeros": 0.0}, {"unmodified": True}, "its F1 is 0.000, below 89.965"),
    ],
)
def test_what_cannot_be_closed(
    full_results: Path, tmp_path: Path, edit: dict[str, object], options: dict[str, object], message: str
) -> None:
    change(full_results, lambda about: about["weights"].update(edit))
    wanted = Submission(submitter="Garden", out=tmp_path / "tree", division="closed", **options)  # type: ignore[arg-type]
    with pytest.raises(RulesError) as caught:
        submit(full_results, wanted)
    assert message in str(caught.value)


def test_a_closed_submission_needs_its_compliance_test(full_results: Path, tmp_path: Path) -> None:
    closed(full_results)
    for path in full_results.glob("*/SingleStream/TEST01/step.json"):
        path.unlink()
    with pytest.raises(RulesError, match="SingleStream TEST01 was not run"):
        submit(full_results, Submission(submitter="G", out=tmp_path / "t", division="closed", unmodified=True))


def test_results_of_another_round(full_results: Path, tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"seeds of v6\.1, not of v4\.1; measure with .* --round v4\.1"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree", round="v4.1"))


def test_other_benchmarks_are_not_mlperfs(full_results: Path, tmp_path: Path) -> None:
    change(full_results, lambda about: about["identity"].update(benchmark="embeddings"))
    with pytest.raises(RulesError, match="embeddings is not an MLPerf benchmark"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree"))


def test_overrides_of_the_system_description(full_results: Path, tmp_path: Path) -> None:
    path = tmp_path / "system.json"
    path.write_text(json.dumps({"cooling": "air", "number_of_nodes": 1}))
    submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree", system=path))
    (written,) = (tmp_path / "tree").rglob("systems/*.json")
    assert json.loads(written.read_text())["cooling"] == "air"
    path.write_text(json.dumps({"colour": "green"}))
    with pytest.raises(DataError, match="unknown fields colour"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "other", system=path))


def written(results: Path, out: Path, **options: Any) -> dict[str, str]:
    """The description of the system in the submission of some results."""
    submit(results, Submission(submitter="Garden", out=out, **options))
    (path,) = out.rglob("systems/*.json")
    found: dict[str, str] = json.loads(path.read_text())
    return found


def over_network(results: Path, addresses: list[str], **accelerators: Accelerator) -> None:
    """Make the results those of made-up machines at addresses; ``accelerators`` by their names, ``n0``, ``n1``..."""
    machines = [describe_machine(accelerators.get(f"n{i}")) for i in range(len(addresses))]
    machines = [replace(machine, nic=f"card {i % 2}") for i, machine in enumerate(machines)]
    change(results, lambda about: about["identity"].update(network=addresses))
    for path in results.glob("*/*/performance/step.json"):
        step = json.loads(path.read_text())
        step["figures"]["machines"] = [asdict(machine) for machine in machines]
        step["figures"]["loadgen_machine"] = asdict(replace(describe_machine(), nic="own card"))
        path.write_text(json.dumps(step))


def test_the_system_is_the_machine_that_ran(full_results: Path, tmp_path: Path) -> None:
    here = describe_machine()
    for path in full_results.glob("*/*/performance/step.json"):
        step = json.loads(path.read_text())
        assert step["figures"]["machines"] == [asdict(here)]
        there = replace(here, fields={**here.fields, "host_processor_model_name": "Another"})
        step["figures"]["machines"] = [asdict(there)]
        path.write_text(json.dumps(step))
    found = written(full_results, tmp_path / "tree")
    assert found["host_processor_model_name"] == "Another"
    assert found["accelerators_per_node"] == "0"
    assert "is_network" not in found


def test_results_without_their_machine_are_submitted_where_they_were_made(full_results: Path, tmp_path: Path) -> None:
    for path in full_results.glob("*/*/performance/step.json"):
        step = json.loads(path.read_text())
        del step["figures"]["machines"]
        path.write_text(json.dumps(step))
    assert written(full_results, tmp_path / "here")["number_of_nodes"] == "1"
    change(full_results, lambda about: about["machine"].update(cpu="Another"))
    with pytest.raises(RulesError, match="write the submission there"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "there"))


def test_a_network_of_nodes(full_results: Path, tmp_path: Path) -> None:
    gpu = Accelerator("Made-up H100", 80 << 30)
    over_network(full_results, ["10.0.0.2:8010", "10.0.0.3:8010", "10.0.0.3:8011"], n0=gpu, n1=gpu, n2=gpu)
    found = written(full_results, tmp_path / "tree")
    assert set(NETWORK_FIELDS) <= set(found)
    assert all(found[field] for field in NETWORK_FIELDS)
    assert found["is_network"] == "True"
    assert found["number_of_nodes"] == "2"
    assert found["number_connections"] == "6"
    assert found["network_protocol"] == "TCP/IPv4 over Ethernet"
    assert (found["nic_loadgen"], found["nic_sut"]) == ("own card", "card 0; card 1")
    assert "each of 2 nodes" in found["network_topology"]
    assert found["host_networking_topology"] == found["network_topology"]
    assert found["accelerator_model_name"] == "Made-up H100"
    assert (found["accelerators_per_node"], found["accelerator_memory_capacity"]) == ("1", "80 GiB")
    known = tmp_path / "system.json"
    known.write_text(json.dumps({"network_media": "Copper"}))
    assert written(full_results, tmp_path / "other", system=known)["network_media"] == "Copper"


def test_networks_that_cannot_be_submitted(full_results: Path, tmp_path: Path) -> None:
    over_network(full_results, ["10.0.0.2:8010"])
    with pytest.raises(RulesError, match="the closed division does not allow"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree", division="closed"))
    over_network(full_results, ["[::1]:8010"])
    with pytest.raises(RulesError, match="the rules want separate ones"):
        submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree"))
    found = written(full_results, tmp_path / "tree", draft=True)
    assert found["network_protocol"] == "TCP/IPv6 over Ethernet"


@pytest.mark.parametrize(
    ("types", "settings", "said"),
    [
        (["float32"], {}, "fp32"),
        (["float32", "int8 per token"], {}, "fp32, int8"),
        (["float32"], {"device": "cuda"}, "bf16"),
        (["float32"], {"device": "cuda:1", "precision": "fp16"}, "fp16"),
        (["float32"], {"device": "cuda", "calibration": "/there/scales.json"}, "bf16, fp8"),
    ],
)
def test_the_types_of_weights(
    full_results: Path, tmp_path: Path, types: list[str], settings: dict[str, str], said: str
) -> None:
    change(full_results, lambda about: about["weights"].update(types=types))
    change(full_results, lambda about: about["identity"]["settings"].update(settings))
    if "calibration" in settings:
        change(full_results, lambda about: about["identity"].update(calibration="0123abcd"))
    submit(full_results, Submission(submitter="Garden", out=tmp_path / "tree"))
    for path in (tmp_path / "tree").rglob("measurements.json"):
        assert json.loads(path.read_text())["weight_data_types"] == said
    (text,) = (tmp_path / "tree").rglob("calibration.md")
    assert ("SHA-256 0123abcd" in text.read_text()) == ("calibration" in settings)


@pytest.mark.parametrize("name", ["", "two words", "a/b", ".hidden"])
def test_names_that_are_no_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a submitter's name"):
        Submission(submitter=name, out=tmp_path)


def _checker(tmp_path: Path) -> Path:
    place = os.environ.get("ESPALIER_MLPERF_CHECKER")
    if not place:
        pytest.skip("ESPALIER_MLPERF_CHECKER does not say where mlcommons/inference lies")
    return Path(place)


@pytest.mark.parametrize("category", ["edge", "datacenter"])
def test_the_official_checker_accepts_open(full_results: Path, tmp_path: Path, category: str) -> None:
    submission = Submission(submitter="Garden", out=tmp_path / "tree", category=category)
    submit(full_results, submission)
    good, printed = run_checker(_checker(tmp_path), submission)
    assert good, printed
    assert "Results=2, NoResults=0" in printed


def test_the_official_checker_accepts_a_network(full_results: Path, tmp_path: Path) -> None:
    over_network(full_results, ["10.0.0.2:8010"])
    for log in full_results.glob("*/*/*/mlperf_log_detail.txt"):
        log.write_text(log.read_text().replace('"sut_name", "value": "', '"sut_name", "value": "Network SUT: '))
    submission = Submission(submitter="Garden", out=tmp_path / "tree", category="datacenter")
    submit(full_results, submission)
    good, printed = run_checker(_checker(tmp_path), submission)
    assert good, printed


def test_the_official_checker_accepts_closed(full_results: Path, tmp_path: Path) -> None:
    closed(full_results)
    submission = Submission(submitter="Garden", out=tmp_path / "tree", division="closed", unmodified=True)
    submit(full_results, submission)
    good, printed = run_checker(_checker(tmp_path), submission)
    assert good, printed


def test_the_official_checker_finds_out_a_draft(quick_results: Path, tmp_path: Path) -> None:
    submission = Submission(submitter="Garden", out=tmp_path / "tree", draft=True)
    submit(quick_results, submission)
    good, printed = run_checker(_checker(tmp_path), submission)
    assert not good
    assert "Test duration less than 600s" in printed


def test_the_older_official_checker(full_results: Path, tmp_path: Path) -> None:
    place = os.environ.get("ESPALIER_MLPERF_CHECKER_V4_1")
    if not place:
        pytest.skip("ESPALIER_MLPERF_CHECKER_V4_1 does not say where tag v4.1 of mlcommons/inference lies")
    to_round(full_results, "v4.1")
    submission = Submission(submitter="Garden", out=tmp_path / "tree", round="v4.1")
    submit(full_results, submission)
    good, printed = run_checker(Path(place), submission)
    assert good, printed


def test_a_checker_that_is_none(full_results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected mlcommons/inference"):
        run_checker(tmp_path, Submission(submitter="Garden", out=tmp_path / "tree"))
