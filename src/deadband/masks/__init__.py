"""ActivationSparsifier and all around it."""

from deadband.masks.layers import LayerError
from deadband.masks.sparsifier import ActivationSparsifier

__all__ = ["ActivationSparsifier", "LayerError"]
