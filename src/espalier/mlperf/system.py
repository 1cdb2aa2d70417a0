"""The description of a system, with every field that a submission must have, filled from the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.doctor import Cpu, cpu
from espalier.errors import DataError

if TYPE_CHECKING:
    from espalier.compiler.packed import Accelerator

NOT_APPLICABLE = "N/A"
UNKNOWN = "not known to the operating system"

FIELDS = (
    "division", "submitter", "status", "system_type", "system_type_detail", "system_name", "number_of_nodes",
    "host_processor_model_name", "host_processors_per_node", "host_processor_core_count", "host_processor_frequency",
    "host_processor_caches", "host_processor_interconnect", "host_memory_capacity", "host_memory_configuration",
    "host_storage_capacity", "host_storage_type", "host_networking", "host_networking_topology",
    "host_network_card_count", "accelerators_per_node", "accelerator_model_name", "accelerator_memory_capacity",
    "accelerator_frequency", "accelerator_host_interconnect", "accelerator_interconnect",
    "accelerator_interconnect_topology", "accelerator_memory_configuration", "accelerator_on-chip_memories", "cooling",
    "framework", "operating_system", "other_software_stack", "hw_notes", "sw_notes",
)  # fmt: skip
"""What the submission rules ask for, in order."""

MUST_SAY = frozenset(FIELDS) - {
    "system_type_detail", "host_processor_frequency", "host_processor_caches", "host_processor_interconnect",
    "accelerator_frequency", "accelerator_interconnect_topology", "accelerator_on-chip_memories", "hw_notes",
    "sw_notes",
}  # fmt: skip
"""Those that must not be empty."""


NETWORK_FIELDS = (
    "is_network", "network_type", "network_media", "network_rate", "nic_loadgen", "number_nic_loadgen",
    "net_software_stack_loadgen", "network_protocol", "number_connections", "nic_sut", "number_nic_sut",
    "net_software_stack_sut", "network_topology",
)  # fmt: skip
"""What they ask for besides when the system is reached over a network; none may be empty."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine: the fields it fills by itself, its network cards (model, number, Mbit/s), and its network stack."""

    fields: dict[str, str]
    nic: str
    nics: str
    nic_rate: str
    network_stack: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the machines of a system are reached: from LoadGen's own machine, at ``addresses`` (``HOST:PORT``)."""

    loadgen: Machine
    addresses: Sequence[str]
    connections: int


def describe_machine(accelerator: Accelerator | None = None, root: Path = Path("/")) -> Machine:
    """This machine, with the accelerator that a model ran on. ``root`` is for tests: a made-up ``/``."""
    processor, cards = cpu(root), _cards(root)
    release = platform.release()
    return Machine(
        fields={
            "system_name": f"{processor.model}, {os.cpu_count()} CPUs"
            + (f", {accelerator.name}" if accelerator else ""),
            "operating_system": _operating_system(root),
            "other_software_stack": f"Python {platform.python_version()}, {'-'.join(platform.libc_ver())}",
            "cooling": UNKNOWN,
            **_processor(processor, root),
            **_memory(root),
            **_storage(root),
            **_networking(cards),
            **(_no_accelerator() if accelerator is None else _accelerator(accelerator)),
        },
        nic=", ".join(sorted({card.model for card in cards})) or UNKNOWN,
        nics=str(len(cards)) if cards else UNKNOWN,
        nic_rate=_rates(cards) or UNKNOWN,
        network_stack=f"TCP of {platform.system()} {release}",
    )


def describe_system(
    *,
    submitter: str,
    division: str,
    category: str,
    framework: str,
    overrides: Path | None,
    machines: Sequence[Machine],
    network: Network | None = None,
) -> dict[str, str]:
    """All of :data:`FIELDS`, and of :data:`NETWORK_FIELDS` with a ``network``, each a string.

    ``machines``: those that ran the model; where they differ a field names every value. ``overrides``: a JSON file of
    fields that are known better.

    Raises DataError when that file is not an object of known fields, or empties one that must say something.
    """
    nodes = len(machines) if network is None else len({host_of(address) for address in network.addresses})
    found = {
        "division": division,
        "submitter": submitter,
        "status": "rdi",
        "system_type": category,
        "system_type_detail": f"{category} server",
        "number_of_nodes": str(nodes),
        "framework": framework,
        "hw_notes": "",
        "sw_notes": "Result not verified by MLCommons Association.",
        **_together([machine.fields for machine in machines]),
    }
    fields: tuple[str, ...] = FIELDS
    if network is not None:
        fields += NETWORK_FIELDS
        found |= _over_network(machines, network, nodes)
    if overrides is not None:
        found.update(_overrides(overrides, fields))
    must_say = MUST_SAY | set(NETWORK_FIELDS)
    empty = [field for field in fields if field in must_say and not found[field]]
    if empty:
        raise DataError(f"{overrides}: {', '.join(empty)} must not be empty in the description of a system")
    return {field: found[field] for field in fields}


def _together(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {field: "; ".join(dict.fromkeys(fields[field] for fields in each)) for field in each[0]}


def _over_network(machines: Sequence[Machine], network: Network, nodes: int) -> dict[str, str]:
    loadgen = network.loadgen
    own = _together(
        [{"nic": machine.nic, "nics": machine.nics, "stack": machine.network_stack} for machine in machines]
    )
    version = "IPv6" if any(":" in host_of(address) for address in network.addresses) else "IPv4"
    topology = f"LoadGen's machine connected to each of {nodes} nodes; what lies between is {UNKNOWN}"
    return {
        "host_networking_topology": topology,
        "is_network": "True",
        "network_type": "Ethernet",
        "network_media": UNKNOWN,
        "network_rate": loadgen.nic_rate,
        "nic_loadgen": loadgen.nic,
        "number_nic_loadgen": loadgen.nics,
        "net_software_stack_loadgen": loadgen.network_stack,
        "network_protocol": f"TCP/{version} over Ethernet",
        "number_connections": str(network.connections),
        "nic_sut": own["nic"],
        "number_nic_sut": own["nics"],
        "net_software_stack_sut": own["stack"],
        "network_topology": topology,
    }


def host_of(address: str) -> str:
    """The host of ``HOST:PORT``."""
    return address.rpartition(":")[0].strip("[]")


def _overrides(path: Path, known: Sequence[str]) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object of fields, got {type(content).__name__}")
    unknown = [field for field in content if field not in known]
    if unknown:
        raise DataError(f"{path}: unknown fields {', '.join(unknown)}; known: {', '.join(known)}")
    return {field: str(value) for field, value in content.items()}


def _processor(processor: Cpu, root: Path) -> dict[str, str]:
    lines = _read(root / "proc/cpuinfo").splitlines()
    sockets = len({line for line in lines if line.startswith("physical id")}) or 1
    cores = processor.physical or processor.logical
    megahertz = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    caches = ", ".join(f"L{c.level}{c.kind[0].lower() if c.kind != 'Unified' else ''} {c.size >> 10} KiB"
                       for c in processor.caches)  # fmt: skip
    return {
        "host_processor_model_name": processor.model,
        "host_processors_per_node": str(sockets),
        "host_processor_core_count": str(max(1, cores // sockets)),
        "host_processor_frequency": f"{max(megahertz):.0f} MHz as running" if megahertz else "",
        "host_processor_caches": caches,
        "host_processor_interconnect": "",
    }


def _memory(root: Path) -> dict[str, str]:
    line = next((line for line in _read(root / "proc/meminfo").splitlines() if line.startswith("MemTotal")), "0 0")
    return {
        "host_memory_capacity": f"{int(line.split()[1]) / 2**20:.0f} GiB",
        "host_memory_configuration": UNKNOWN,
    }


def _storage(root: Path) -> dict[str, str]:
    blocks = [path for path in sorted((root / "sys/block").glob("*")) if not path.name.startswith(("loop", "ram"))]
    size = sum(int(_read(path / "size") or 0) for path in blocks) * 512
    kinds = {"HDD" if _read(path / "queue/rotational").strip() == "1" else "SSD" for path in blocks}
    return {
        "host_storage_capacity": f"{size / 1e9:.0f} GB" if size else UNKNOWN,
        "host_storage_type": " and ".join(sorted(kinds)) or UNKNOWN,
    }


@dataclass(frozen=True)
class _Card:
    """A network card: its driver and its maker's ids, and its speed in Mbit/s, "" where it does not say."""

    model: str
    speed: str


def _cards(root: Path) -> list[_Card]:
    found = []
    for path in sorted((root / "sys/class/net").glob("*")):
        device = path / "device"
        if device.exists():
            driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
            ids = ":".join(_read(device / name).strip().removeprefix("0x") for name in ("vendor", "device"))
            model = " ".join(part for part in (driver, f"[{ids}]" if ids != ":" else "") if part)
            speed = _read(path / "speed").strip()
            found.append(_Card(model or UNKNOWN, "" if speed == "-1" else speed))
    return found


def _rates(cards: Sequence[_Card]) -> str:
    speeds = sorted({card.speed for card in cards} - {""})
    return f"{', '.join(speeds)} Mbit/s" if speeds else ""


def _networking(cards: Sequence[_Card]) -> dict[str, str]:
    rates = _rates(cards)
    return {
        "host_networking": "Ethernet" + (f", {rates}" if rates else "") if cards else NOT_APPLICABLE,
        "host_networking_topology": NOT_APPLICABLE,
        "host_network_card_count": str(len(cards)) if cards else NOT_APPLICABLE,
    }


def _accelerator(accelerator: Accelerator) -> Mapping[str, str]:
    """A session runs on one."""
    return {
        **_no_accelerator(),
        "accelerators_per_node": "1",
        "accelerator_model_name": accelerator.name,
        "accelerator_memory_capacity": f"{accelerator.memory / 2**30:.0f} GiB",
        "accelerator_memory_configuration": UNKNOWN,
        "accelerator_frequency": "",
        "accelerator_host_interconnect": UNKNOWN,
        "accelerator_on-chip_memories": "",
    }


def _no_accelerator() -> Mapping[str, str]:
    names = (field for field in FIELDS if field.startswith("accelerator"))
    return {**dict.fromkeys(names, NOT_APPLICABLE), "accelerators_per_node": "0"}


def _operating_system(root: Path) -> str:
    lines = _read(root / "etc/os-release").splitlines()
    name = next((line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME")), "")
    return f"{name or platform.system()}, kernel {platform.release()}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
