"""Structural shrinking: what a mask drops is removed from the weights."""

from deadband.compaction.compact import CompactionReport, compact_, load_compact_

__all__ = ["CompactionReport", "compact_", "load_compact_"]
