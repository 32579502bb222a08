"""Quality and speed of a sparse model beside the dense one, and the methods to compare with."""

from deadband.evaluation.generation import GenerationReport, compare_generation
from deadband.evaluation.methods import METHODS, Setup
from deadband.evaluation.quality import Comparison, Evaluation, compare, dense_logits, evaluate

__all__ = [
    "METHODS",
    "Comparison",
    "Evaluation",
    "GenerationReport",
    "Setup",
    "compare",
    "compare_generation",
    "dense_logits",
    "evaluate",
]
