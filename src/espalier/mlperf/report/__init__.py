"""Reports of results: HTML in one file, Markdown and JSON."""

from __future__ import annotations

from espalier.mlperf.report.rows import UNVERIFIED, Row, rows

__all__ = ["UNVERIFIED", "Row", "rows"]
