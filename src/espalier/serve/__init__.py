"""Serving models over HTTP and gRPC: the Open Inference Protocol, OpenAI's embeddings, and tasks on texts.

``espalier.serve.server`` runs it; nothing here needs PyTorch or Ray.
"""

from __future__ import annotations

from espalier.serve.config import ServerConfig, Tls

__all__ = ["ServerConfig", "Tls"]
