"""What is found out about a machine, with made-up ones."""

from __future__ import annotations

from pathlib import Path

from espalier.compiler.packed import Accelerator
from espalier.doctor import machine
from espalier.mlperf.system import FIELDS, MUST_SAY, UNKNOWN, describe_machine, describe_system


def card(root: Path, name: str, speed: str, driver: str) -> None:
    """A network card as Linux shows it; without a driver it is no device, as a bridge is."""
    place = root / "sys/class/net" / name
    place.mkdir(parents=True)
    (place / "speed").write_text(f"{speed}\n")
    if driver:
        drivers = root / "sys/bus/pci/drivers" / driver
        drivers.mkdir(parents=True, exist_ok=True)
        (place / "device").mkdir()
        (place / "device" / "vendor").write_text("0x15b3\n")
        (place / "device" / "device").write_text("0x1021\n")
        (place / "device" / "driver").symlink_to(drivers)


def test_network_cards(tmp_path: Path) -> None:
    for name, speed, driver in (("eth0", "100000", "mlx5_core"), ("eth1", "-1", "mlx5_core"), ("docker0", "10000", "")):
        card(tmp_path, name, speed, driver)
    found = describe_machine(root=tmp_path)
    assert (found.nic, found.nics, found.nic_rate) == ("mlx5_core [15b3:1021]", "2", "100000 Mbit/s")
    assert found.fields["host_networking"] == "Ethernet, 100000 Mbit/s"
    assert found.fields["host_network_card_count"] == "2"


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    found = describe_machine(root=tmp_path)
    assert (found.nic, found.nics, found.nic_rate) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert found.fields["accelerators_per_node"] == "0"
    assert found.fields["accelerator_model_name"] == "N/A"
    about = describe_system(
        submitter="Garden", division="open", category="edge", framework="f", overrides=None, machines=[found]
    )
    assert list(about) == list(FIELDS)
    assert all(about[field] for field in MUST_SAY)


def test_an_accelerator_is_named(tmp_path: Path) -> None:
    gpu = Accelerator("Made-up H100", 80 << 30)
    found = describe_machine(gpu, tmp_path).fields
    assert found["system_name"].endswith(", Made-up H100")
    assert found["accelerators_per_node"] == "1"
    assert found["accelerator_model_name"] == "Made-up H100"
    assert found["accelerator_memory_capacity"] == "80 GiB"
    assert machine(gpu)["accelerators"] == [{"name": "Made-up H100", "memory": 80 << 30}]
    assert machine()["accelerators"] == []
