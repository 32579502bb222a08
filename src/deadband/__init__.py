"""deadband: PyTorch models made faster by skipping activations close to zero.

    calibration = deadband.calibrate(model, batches)
    deadband.sparsify_(model, calibration.allocate(0.4))

Public names load on first use: importing deadband imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadband import pruning, quantization
    from deadband.allocation import Thresholds, allocate
    from deadband.calibration import Calibration, Inspection, calibrate, inspect
    from deadband.compaction import CompactionReport, load_compact_
    from deadband.decoding import (
        DecodeReport,
        DecodeWarning,
        breakeven,
        decode_report,
        prepare_decode_,
        unprepare_decode_,
    )
    from deadband.evaluation import (
        Comparison,
        Evaluation,
        GenerationReport,
        compare,
        compare_generation,
        evaluate,
    )
    from deadband.integrations import gguf as gguf_model
    from deadband.integrations.lightning import SparsifierLightningCallback
    from deadband.integrations.lm_eval import run_tasks
    from deadband.integrations.trainer import SparsifierTrainerCallback
    from deadband.layers import Rule, SparseLinear
    from deadband.masks import ActivationSparsifier, LayerError, aggregate, mask, reduce
    from deadband.quantization import gguf_weights, mixed_precision
    from deadband.sparsify import (
        DriftWarning,
        SparsityConfig,
        SparsityReport,
        dense,
        densify_,
        sparse_prefill,
        sparsify_,
        sparsity,
    )

__version__ = "0.1.0"

_HOME = {
    "ActivationSparsifier": "masks",
    "Calibration": "calibration",
    "CompactionReport": "compaction",
    "Comparison": "evaluation",
    "DecodeReport": "decoding",
    "DecodeWarning": "decoding",
    "DriftWarning": "sparsify",
    "Evaluation": "evaluation",
    "GenerationReport": "evaluation",
    "Inspection": "calibration",
    "LayerError": "masks",
    "Rule": "layers",
    "SparseLinear": "layers",
    "SparsityConfig": "sparsify",
    "SparsityReport": "sparsify",
    "Thresholds": "allocation",
    "allocate": "allocation",
    "calibrate": "calibration",
    "compare": "evaluation",
    "compare_generation": "evaluation",
    "SparsifierLightningCallback": "integrations.lightning",
    "SparsifierTrainerCallback": "integrations.trainer",
    "decode_report": "decoding",
    "dense": "sparsify",
    "densify_": "sparsify",
    "evaluate": "evaluation",
    "inspect": "calibration",
    "load_compact_": "compaction",
    "prepare_decode_": "decoding",
    "run_tasks": "integrations.lm_eval",
    "sparse_prefill": "sparsify",
    "sparsify_": "sparsify",
    "sparsity": "sparsify",
    "unprepare_decode_": "decoding",
}
_MODULES = {
    "aggregate": "masks.aggregate",
    "breakeven": "decoding.breakeven",
    "gguf_model": "integrations.gguf",
    "gguf_weights": "quantization.gguf_weights",
    "mask": "masks.mask",
    "mixed_precision": "quantization.mixed_precision",
    "pruning": "pruning",
    "quantization": "quantization",
    "reduce": "masks.reduce",
}
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"deadband.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'deadband' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"deadband.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_FOLLOWERS = {
    "deadband.calibration.calibration": "deadband.allocation",
    "transformers.quantizers.auto": "deadband.integrations.transformers",
    "transformers.modeling_utils": "deadband.integrations.transformers_saving",
    "transformers.models.falcon.modeling_falcon": "deadband.integrations.transformers_falcon",
}
"""What is imported right after a module: transformers knows sparse models from then on, a Calibration allocates."""


class _Follow(importlib.abc.MetaPathFinder):
    """Imports `_FOLLOWERS`."""

    def __init__(self) -> None:
        self.waiting = dict(_FOLLOWERS)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        follower = self.waiting.pop(name, None)
        if follower is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                importlib.import_module(follower)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Follow()
for _name, _follower in _FOLLOWERS.items():
    if _name in sys.modules:
        del _finder.waiting[_name]
        importlib.import_module(_follower)
sys.meta_path.insert(0, _finder)
