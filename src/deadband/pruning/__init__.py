"""Pruning of weights, data and structure: what torch.ao.pruning had beside ActivationSparsifier, repaired."""

from deadband.layers.tensors import module_contains_param, swap_module
from deadband.masks.mask_weight import FakeSparsity, FakeStructuredSparsity
from deadband.pruning.data import BaseDataSparsifier, DataNormSparsifier
from deadband.pruning.names import fqn_to_module, get_arg_info_from_tensor_fqn, module_to_fqn
from deadband.pruning.report import PruningReport
from deadband.pruning.scheduler import BaseDataScheduler, BaseScheduler, CubicSL, LambdaSL
from deadband.pruning.sparsifier import BaseSparsifier
from deadband.pruning.structured import BaseStructuredSparsifier, FPGMPruner, LSTMSaliencyPruner, SaliencyPruner
from deadband.pruning.weight_norm import NearlyDiagonalSparsifier, WandaSparsifier, WeightNormSparsifier

__all__ = [
    "BaseDataScheduler",
    "BaseDataSparsifier",
    "BaseScheduler",
    "BaseSparsifier",
    "BaseStructuredSparsifier",
    "CubicSL",
    "DataNormSparsifier",
    "FPGMPruner",
    "FakeSparsity",
    "FakeStructuredSparsity",
    "LSTMSaliencyPruner",
    "LambdaSL",
    "NearlyDiagonalSparsifier",
    "PruningReport",
    "SaliencyPruner",
    "WandaSparsifier",
    "WeightNormSparsifier",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "module_contains_param",
    "module_to_fqn",
    "swap_module",
]
