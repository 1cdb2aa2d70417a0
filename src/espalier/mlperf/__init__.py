"""MLPerf Inference: models under LoadGen's scenarios, submissions that the official checker accepts, and reports."""

from __future__ import annotations
