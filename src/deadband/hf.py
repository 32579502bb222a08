"""transformers: `save_pretrained` writes a sparse model, `from_pretrained` brings it back sparse.

A sparse checkpoint is a dense one plus a float32 `threshold` for each site (and `scale`, `center` and `mask` where its
rule has them), and a `quantization_config` in config.json.
transformers has no entry points for quantizers, so `import deadband` registers this one; without deadband the same
checkpoint loads as the dense model, unless its weights are quantised: those only deadband can read.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deadband.criterion import Rule
from deadband.linear import (
    SPARSE_CLASSES,
    SparseSite,
    lay_out_,
    make_sparse_,
    new_counts,
    tensor_of,
    use_dense_product_,
)
from deadband.mapped import MappedFiles, on_huge_pages
from deadband.quantization import empty_weight
from deadband.quantized import (
    QUANTIZED_CLASSES,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedSite,
    make_quantized_,
)
from deadband.sites import shape_of
from deadband.sparsify import SparsityConfig, sparse_sites, tie_

METHOD = "deadband"


class SparseConv1D(SparseSite, Conv1D):
    """The sparse twin of the Conv1D of GPT-2 and its kin: a linear layer that stores its weight as [in, out]."""

    dense_class = Conv1D
    stored_in_out = True

    __repr__ = nn.Module.__repr__  # Conv1D's own would hide the threshold

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr().lstrip(', ')}"


class QuantizedConv1D(QuantizedLinear, Conv1D):  # type: ignore[misc, override]
    """A Conv1D with a quantised weight."""

    stored_in_out = True
    __repr__ = nn.Module.__repr__


class QuantizedSparseConv1D(QuantizedSite, SparseConv1D):  # type: ignore[misc]
    """A sparse Conv1D with a quantised weight."""

    dense_class = QuantizedConv1D
    stored_in_out = True


SPARSE_CLASSES |= {Conv1D: SparseConv1D, QuantizedConv1D: QuantizedSparseConv1D}
QUANTIZED_CLASSES |= {Conv1D: QuantizedConv1D, SparseConv1D: QuantizedSparseConv1D}


@register_quantization_config(METHOD)
class DeadbandConfig(QuantizationConfigMixin):
    """`quantization_config` of a sparse model: the fields of `deadband.SparsityConfig`."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes names it does not know
        self.sparsity_config = SparsityConfig(**fields)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {"quant_method": METHOD, **self.sparsity_config.to_dict()}


@register_quantizer(METHOD)
class DeadbandQuantizer(HfQuantizer):
    """Makes the sites sparse before transformers loads the weights, and checks and lays out what was loaded."""

    requires_calibration = True  # a dense checkpoint has no thresholds: calibrate it instead
    quantization_config: DeadbandConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config.sparsity_config
        names = {name for name, _ in model.named_modules()}
        prefix = f"{model.base_model_prefix}."

        def found(written: str) -> str:
            # a model with a head and its base model load each other's checkpoints; their names differ by a prefix
            spellings = (written, written.removeprefix(prefix), prefix + written)
            return next((each for each in spellings if each in names), "")

        def find(written: str) -> str:
            name = found(written)
            if not name:
                raise ValueError(f"config.json names layer {written!r}, which {type(model).__name__} does not have")
            return name

        for written in config.sites:
            name = find(written)
            module = model.get_submodule(name)
            features = shape_of(module)[1]
            vectors = {
                part: torch.empty(features, dtype=dtype, device="meta") if written in getattr(config, part) else None
                for part, dtype in (("scaled", torch.float32), ("centered", torch.float32), ("masked", torch.bool))
            }
            # -1 keeps everything: a threshold that the checkpoint lacks is told apart from one that is zero
            rule = Rule(-1.0, vectors["scaled"], vectors["centered"], written in config.relative)
            make_sparse_(
                module,
                rule,
                mask=vectors["masked"],
                gradient=config.gradient,
                expected=config.expected.get(written, math.nan),
                site_range=config.site_range.get(written),
            )
        for written, form in config.weights.items():
            name = find(written) if written in config.sites else found(written)
            if not name:
                continue  # a base model has no output layer
            layer: Any = model.get_submodule(name)
            make_quantized_(layer, empty_weight(*shape_of(layer), form, device="meta"))
            layer._is_hf_initialized = True  # transformers would dequantise it for a look
        if config.tied_embedding is not None:
            layer = cast(Any, model).get_output_embeddings()
            if not isinstance(layer, QuantizedMatrix):
                raise ValueError(
                    f"in this checkpoint the embedding is stored as the quantised output layer, which "
                    f"{type(model).__name__} does not have; load it as a model that has one (AutoModelForCausalLM)"
                )
            tie_(model, find(config.tied_embedding), layer)
        plain = config.output_layer if config.output_layer not in config.weights else None
        if plain is not None and plain in names:
            use_dense_product_(model.get_submodule(plain))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = MappedFiles()  # transformers leaves weights in the mapped checkpoint
        for name, module in sparse_sites(model).items():
            _refuse_offloaded(name, tensor_of(module), module.threshold)
            for buffer in ("threshold", "scale", "center", "mask"):
                _check_loaded(name, module, buffer)
            module.register_buffer("counts", new_counts(tensor_of(module).device), persistent=False)
            before = tensor_of(module).detach()
            lay_out_(module)
            if tensor_of(module).data_ptr() != before.data_ptr():
                files.give_back(before)
            module.refresh_offset_()

        for name, module in model.named_modules():
            if isinstance(module, QuantizedMatrix):
                _refuse_offloaded(name, module.codes, module.bias)
                for tensor in ("codes", "scales", "minimum", "bias"):
                    _check_loaded(name, module, tensor)
                module.codes = on_huge_pages(module.codes, files)

    def is_serializable(self) -> bool:
        """Sparse models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Sparse layers train as dense ones do."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without this, `Trainer` refuses every model that has a quantization_config."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The sparse operator works under torch.compile."""
        return True


def _refuse_offloaded(name: str, *tensors: torch.Tensor | None) -> None:
    if any(tensor is not None and tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"site {name!r} is offloaded by device_map, and an offloaded layer cannot be sparse; "
            "choose a device_map that keeps it on a device, or load the dense model"
        )


def _check_loaded(name: str, module: nn.Module, tensor: str) -> None:
    value = getattr(module, tensor)
    if value is not None and not getattr(value, "_is_hf_initialized", False):
        raise ValueError(
            f"the checkpoint has no {name}.{tensor}; it was not written by deadband, or is incomplete. "
            "Calibrate and sparsify the dense model again"
        )


def set_quantization_config(model: Any, config: SparsityConfig | None) -> None:
    """Make `model.save_pretrained` describe the model as sparse, or, with None, as dense again."""
    if config is None:
        quantizer = getattr(model, "hf_quantizer", None)
        if isinstance(quantizer, DeadbandQuantizer):
            quantizer.remove_quantization_config(model)
        return
    existing = getattr(model, "hf_quantizer", None)
    if existing is not None and not isinstance(existing, DeadbandQuantizer):
        return  # another quantization owns config.json; the thresholds still travel in the state dict
    model.config.quantization_config = DeadbandConfig(**config.to_dict())
    model.hf_quantizer = DeadbandQuantizer(model.config.quantization_config, pre_quantized=True)
