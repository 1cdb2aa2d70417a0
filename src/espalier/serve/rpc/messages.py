"""The protocol's messages.

They live in a descriptor pool of their own: clients of the same protocol (tritonclient, kserve) bring their own
definitions of the same names into the common pool, and a second definition there is an error.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"


def _read_pool() -> descriptor_pool.DescriptorPool:
    data = (resources.files("espalier.serve.rpc") / "open_inference.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    return pool


_POOL = _read_pool()


def message(name: str) -> Any:
    """The class of a message of the protocol, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def methods() -> dict[str, tuple[Any, Any]]:
    """The classes of request and response of every method of the service."""
    found = _POOL.FindServiceByName(SERVICE).methods
    return {method.name: (message(method.input_type.name), message(method.output_type.name)) for method in found}
