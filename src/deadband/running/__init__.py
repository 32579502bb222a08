"""Batches, text, running a model over them, timing, and how far two models are apart."""

from deadband.running.batches import Counted, taken
from deadband.running.forward import evaluating, run
from deadband.running.text import read_text, token_windows

__all__ = ["Counted", "evaluating", "read_text", "run", "taken", "token_windows"]
