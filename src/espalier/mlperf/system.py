"""The description of a system, with every field that a submission must have, filled from the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from espalier.doctor import Cpu, cpu
from espalier.errors import DataError

NOT_APPLICABLE = "N/A"

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


def describe_system(
    *, submitter: str, division: str, category: str, framework: str, overrides: Path | None, root: Path = Path("/")
) -> dict[str, str]:
    """All of :data:`FIELDS`, each a string. ``overrides``: a JSON file of fields that know better than this machine.

    Raises DataError when that file is not an object of known fields, or empties one that must say something.
    """
    processor = cpu(root)
    found = {
        "division": division,
        "submitter": submitter,
        "status": "rdi",
        "system_type": category,
        "system_type_detail": f"{category} server",
        "system_name": f"{processor.model}, {os.cpu_count()} CPUs",
        "number_of_nodes": "1",
        "framework": framework,
        "operating_system": _operating_system(root),
        "other_software_stack": f"Python {platform.python_version()}, {'-'.join(platform.libc_ver())}",
        "cooling": "not known to the operating system",
        "hw_notes": "",
        "sw_notes": "Result not verified by MLCommons Association.",
        **_processor(processor, root),
        **_memory(root),
        **_storage(root),
        **_network(root),
        **_no_accelerator(),
    }
    if overrides is not None:
        found.update(_overrides(overrides))
    empty = [field for field in FIELDS if field in MUST_SAY and not found[field]]
    if empty:
        raise DataError(f"{overrides}: {', '.join(empty)} must not be empty in the description of a system")
    return {field: found[field] for field in FIELDS}


def _overrides(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object of fields, got {type(content).__name__}")
    unknown = [field for field in content if field not in FIELDS]
    if unknown:
        raise DataError(f"{path}: unknown fields {', '.join(unknown)}; known: {', '.join(FIELDS)}")
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
        "host_memory_configuration": "not known to the operating system",
    }


def _storage(root: Path) -> dict[str, str]:
    blocks = [path for path in sorted((root / "sys/block").glob("*")) if not path.name.startswith(("loop", "ram"))]
    size = sum(int(_read(path / "size") or 0) for path in blocks) * 512
    kinds = {"HDD" if _read(path / "queue/rotational").strip() == "1" else "SSD" for path in blocks}
    return {
        "host_storage_capacity": f"{size / 1e9:.0f} GB" if size else "not known to the operating system",
        "host_storage_type": " and ".join(sorted(kinds)) or "not known to the operating system",
    }


def _network(root: Path) -> dict[str, str]:
    cards = [path for path in (root / "sys/class/net").glob("*") if (path / "device").exists()]
    speeds = {_read(path / "speed").strip() for path in cards} - {"", "-1"}
    return {
        "host_networking": "Ethernet" + (f", {', '.join(sorted(speeds))} Mbit/s" if speeds else "")
        if cards
        else NOT_APPLICABLE,
        "host_networking_topology": NOT_APPLICABLE,
        "host_network_card_count": str(len(cards)) if cards else NOT_APPLICABLE,
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
