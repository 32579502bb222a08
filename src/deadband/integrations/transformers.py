"""transformers: `from_pretrained` brings a sparse model back that `save_pretrained` wrote.

A sparse checkpoint is a dense one plus a float32 `threshold` for each site (and `scale`, `center` and `mask` where its
rule has them), and a `quantization_config` in config.json; `deadband.integrations.transformers_saving` writes it.
transformers has no entry points for quantizers, so `import deadband` registers this one; without deadband the same
checkpoint loads as the dense model, unless its weights are quantised: those only deadband can read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deadband.layers.experts import PROJECTIONS, ExpertLinear, with_projections
from deadband.layers.formats import QuantizedWeight, empty_weight
from deadband.layers.gated import arrange_
from deadband.layers.memory import MappedFiles, on_huge_pages
from deadband.layers.quantized import (
    QUANTIZED_CLASSES,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedSite,
    QuantizedTable,
    make_quantized_,
    tie_table_,
    untie_table_,
)
from deadband.layers.rule import Rule
from deadband.layers.sites import shape_of, sparse_sites
from deadband.layers.sparse import (
    SPARSE_CLASSES,
    SparseSite,
    lay_out_,
    make_sparse_,
    new_counts,
    tensor_of,
    use_dense_product_,
)
from deadband.sparsify.config import RECIPE, SparsityConfig, config_of
from deadband.sparsify.sparsify import FOLLOWERS, densify_

METHOD = "deadband"


class SparseConv1D(SparseSite, Conv1D):
    """The sparse twin of the Conv1D of GPT-2 and its kin: a linear layer that stores its weight as [in, out]."""

    dense_class = Conv1D
    stored_in_out = True

    __repr__ = nn.Module.__repr__  # Conv1D's own would hide the threshold

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr().lstrip(', ')}"


class QuantizedConv1D(QuantizedLinear, Conv1D):  # type: ignore[misc]
    """A Conv1D with a quantised weight."""

    stored_in_out = True
    __repr__ = nn.Module.__repr__


class QuantizedSparseConv1D(QuantizedSite, SparseConv1D):  # type: ignore[misc]
    """A sparse Conv1D with a quantised weight."""

    dense_class = QuantizedConv1D
    stored_in_out = True


SPARSE_CLASSES |= {Conv1D: SparseConv1D, QuantizedConv1D: QuantizedSparseConv1D}
QUANTIZED_CLASSES |= {Conv1D: QuantizedConv1D, SparseConv1D: QuantizedSparseConv1D}
BUFFERS = ("threshold", "scale", "center", "mask", "codes", "scales", "minimum")
"""What a checkpoint has of sparse and quantised layers, beside weights and biases."""


@register_quantization_config(METHOD)
class DeadbandConfig(QuantizationConfigMixin):
    """`quantization_config` of a sparse model: the fields of `deadband.SparsityConfig`."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes names it does not know
        try:
            self.sparsity_config = SparsityConfig.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config in config.json: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {"quant_method": METHOD, **self.sparsity_config.to_dict()}


def is_ours(quantization_config: Any) -> bool:
    """Whether a model's `quantization_config` is deadband's."""
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method") == METHOD
    return isinstance(quantization_config, DeadbandConfig)


@register_quantizer(METHOD)
class DeadbandQuantizer(HfQuantizer):
    """Makes the sites sparse before transformers loads the weights, and checks and lays out what was loaded."""

    requires_calibration = True  # a dense checkpoint has no thresholds: calibrate it instead
    quantization_config: DeadbandConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.sparsity_config
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "a sparse checkpoint does not load under tensor parallelism or FSDP: deadband's layers are not "
                "sharded. Load it without distributed_config or tp_plan, or load the dense model"
            )
        find = _Finder(model, config)
        expected: dict[str, Tensor] = {}
        for written in config.sites:
            module = find(written)
            if module is not None:
                _make_site_(module, written, config)
        for written, form in config.weights.items():
            layer: Any = find(written)
            if layer is None:
                continue  # a base model has no output layer
            if type(layer) not in QUANTIZED_CLASSES:
                raise ValueError(f"layer {written!r} is a {type(layer).__name__}, which cannot have quantised weights")
            make_quantized_(layer, _empty_weight(layer, form))
            layer._is_hf_initialized = True  # transformers would dequantise it for a look
            if isinstance(layer, ExpertLinear):
                layer.owner._is_hf_initialized = True  # type: ignore[assignment]
        for written, source in config.tied_embeddings.items():
            self._tie(model, find, written, source)
        refresh_ties(model)
        if config.output_layer is not None and config.output_layer not in {*config.weights, *config.sites}:
            output = find(config.output_layer, needed=False)
            if type(output) is nn.Linear:
                use_dense_product_(output)
        if config.version > 3:  # before, names went through transformers' conversions
            for written in {*config.sites, *config.weights}:
                layer = find(written)
                if layer is not None:
                    place = _place_of(written) if isinstance(layer, ExpertLinear) else written
                    expected |= {f"{place}.{key}": value for key, value in layer._buffers.items() if key in BUFFERS}
            _check_files(kwargs.get("checkpoint_files") or (), expected)

    def _tie(self, model: Any, find: _Finder, written: str, source: str) -> None:
        embedding: Any = find(written)
        layer: Any = find(source, needed=False) if source else model.get_output_embeddings()
        if layer is None:
            layer = self._borrow(model, find, source, embedding)
        if not isinstance(layer, QuantizedMatrix):
            raise ValueError(f"tied_embeddings: {source or 'the output layer'!r} is no quantised layer of the model")
        if not isinstance(embedding, nn.Embedding) or tuple(embedding.weight.shape) != layer.matrix_shape:
            raise ValueError(f"tied_embeddings: {written!r} is no embedding of the shape of {source!r}")
        tie_table_(embedding, layer)
        if not source and hasattr(model.config, "tie_word_embeddings"):
            model.config.tie_word_embeddings = True  # format 3 has it off, as it told transformers of the tie so

    def _borrow(self, model: Any, find: _Finder, source: str, embedding: nn.Embedding) -> nn.Module | None:
        """The quantised layer of a model with a head that a base model has its embedding from, while it loads."""
        config = self.quantization_config.sparsity_config
        source = source or next((name for name in config.weights if find(name, needed=False) is None), "")
        if source not in config.weights:
            return None
        layer: Any = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        make_quantized_(layer, _empty_weight(layer, config.weights[source]))
        layer._is_hf_initialized = True
        *above, name = source.split(".")
        parent: nn.Module = model
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, layer)
        self._borrowed = {**getattr(self, "_borrowed", {}), layer: source}
        return layer

    def _give_back(self, model: Any) -> None:
        """A base model's embedding gets rows of its own, in the place of those of a head that it does not have."""
        borrowed = self.__dict__.pop("_borrowed", {})
        for table in [module for module in model.modules() if isinstance(module, QuantizedTable)]:
            if table.source in borrowed:
                untie_table_(table, nn.Parameter(table.source.matrix(table.table_dtype)))
        for source in borrowed.values():
            path = source
            while path:  # the layer, and what stands around it and is empty now
                parent, _, name = path.rpartition(".")
                del model.get_submodule(parent)._modules[name]
                if not parent or model.get_submodule(parent)._modules:
                    break
                path = parent

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = MappedFiles()  # transformers leaves weights in the mapped checkpoint
        for name, module in sparse_sites(model).items():
            _refuse_offloaded(name, tensor_of(module), module.threshold)
            for buffer in ("threshold", "scale", "center", "mask"):
                _check_loaded(name, module, buffer)
            _check_values(name, module)
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
                for tensor in ("scales", "minimum"):
                    _check_finite(name, module, tensor)
                if isinstance(module, ExpertLinear):
                    continue  # they stay in the mapped file, of which experts that nobody chooses are never read
                for tensor in ("codes", "scales", "minimum"):
                    if getattr(module, tensor) is not None:
                        setattr(module, tensor, on_huge_pages(getattr(module, tensor), files))
        arrange_(model)
        self._give_back(model)
        model.is_quantized = bool(self.quantization_config.sparsity_config.weights)  # sparse layers may be cast
        # what is saved comes from the layers: a configuration that says it too would make other models sparse
        for each in transformers_models(model):
            for key in ("quantization_config", "transformers_weights", "_is_quantized"):
                each.config.__dict__.pop(key, None)
        _tell(model, self.quantization_config.sparsity_config)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """transformers' renamings and conversions of weights, which leave what is deadband's alone."""
        conversions = super().update_weight_conversions(weight_conversions, *model)
        config = self.quantization_config.sparsity_config
        if config.version > 3:
            own = _own_names(config)
            for conversion in conversions:
                conversion.compiled_sources = _Except(conversion.compiled_sources, own)
        return conversions

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The dense model, for `model.dequantize()`."""
        densify_(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        """Sparse models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Sparse layers train as dense ones do."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether `Trainer` takes the model without adapters: quantised weights do not train."""
        return not self.quantization_config.sparsity_config.weights

    @property
    def is_compileable(self) -> bool:
        """The sparse operator works under torch.compile."""
        return True


class _Finder:
    """The layers of a model by the names that a checkpoint gives them.

    A model with a head and its base model load each other's checkpoints; their names differ by a prefix.
    """

    def __init__(self, model: Any, config: SparsityConfig) -> None:
        self.model, self.modules = model, dict(with_projections(model, every_name=True))
        self.prefix = f"{model.base_model_prefix}."
        is_base = bool(model.base_model_prefix) and not hasattr(model, model.base_model_prefix)
        # a base model has none of the layers outside of itself: the output layer, heads
        self.inside = is_base and any(name.startswith(self.prefix) for name in (*config.sites, *config.weights))

    def __call__(self, written: str, needed: bool = True) -> nn.Module | None:
        spellings = (written, written.removeprefix(self.prefix), self.prefix + written)
        for each in spellings:
            if each in self.modules:
                return self.modules[each]
        if not needed or (self.inside and not written.startswith(self.prefix)):
            return None
        raise ValueError(f"config.json names layer {written!r}, which {type(self.model).__name__} does not have")


def _empty_weight(layer: nn.Module, form: str) -> QuantizedWeight:
    experts = layer.count if isinstance(layer, ExpertLinear) else None
    return empty_weight(*shape_of(layer), form, device="meta", experts=experts)


def _place_of(written: str) -> str:
    """Where the tensors of a projection of experts lie in a checkpoint."""
    parent, _, name = written.rpartition(".")
    return ".".join(filter(None, (parent, PROJECTIONS, name)))


def _make_site_(module: nn.Module, written: str, config: SparsityConfig) -> None:
    if type(module) not in SPARSE_CLASSES:
        raise ValueError(f"site {written!r} is a {type(module).__name__}, expected a linear layer")
    (outputs, inputs), site = shape_of(module), config.sites[written]
    parts = (("scaled", outputs if site.gate else inputs, torch.float32), ("centered", inputs, torch.float32),
             ("masked", inputs, torch.bool))  # fmt: skip
    vectors = {
        part: torch.empty(features, dtype=dtype, device="meta") if getattr(site, part) else None
        for part, features, dtype in parts
    }
    # -1 keeps everything: a threshold that the checkpoint lacks is told apart from one that is zero
    rule = Rule(-1.0, vectors["scaled"], vectors["centered"], site.relative, site.gate)
    make_sparse_(
        module,
        rule,
        mask=vectors["masked"],
        gradient=site.gradient,
        expected=math.nan if site.expected is None else site.expected,
        site_range=site.range,
    )


class _Except:
    """A compiled pattern that does not match some names."""

    def __init__(self, pattern: Any, names: Collection[str]) -> None:
        self.pattern, self.names, self.groupindex = pattern, names, pattern.groupindex

    def search(self, key: str) -> Any:
        return None if key in self.names else self.pattern.search(key)

    def __deepcopy__(self, memo: Any) -> _Except:
        return self


def _own_names(config: SparsityConfig) -> frozenset[str]:
    """The names of deadband's tensors, and their ends: a conversion may look at one without the prefix of its part of
    the model."""
    names = {*config.sites, *config.weights}
    names |= set(map(_place_of, names))  # of those that are projections of experts
    parts = [(*name.split("."), buffer) for name in names for buffer in BUFFERS]
    return frozenset(".".join(each[first:]) for each in parts for first in range(len(each) - 1))


_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bool: "BOOL", torch.int8: "I8", torch.uint8: "U8"}


def _check_files(files: Collection[str], expected: Mapping[str, Tensor | None]) -> None:
    """A ValueError where the files lack something, or have it in another shape or type, before anything is loaded."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    there: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # it has no __iter__
                    if key in expected:
                        part = opened.get_slice(key)
                        there[key] = part.get_dtype(), list(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no complete safetensors file: {error}") from None
    for key, tensor in expected.items():
        if tensor is None:
            continue
        if key not in there:
            raise ValueError(_MISSING.format(key))
        wanted = _DTYPES[tensor.dtype], list(tensor.shape)
        if there[key] != wanted:
            raise ValueError(
                f"the checkpoint's {key} is {there[key][0]} {there[key][1]}, expected {wanted[0]} {wanted[1]}"
            )


def _refuse_offloaded(name: str, *tensors: torch.Tensor | None) -> None:
    if any(tensor is not None and tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"site {name!r} is offloaded by device_map, and an offloaded layer cannot be sparse; "
            "choose a device_map that keeps it on a device, or load the dense model"
        )


_MISSING = (
    "the checkpoint has no {}; it was not written by deadband, or is incomplete. "
    "Calibrate and sparsify the dense model again"
)


def _check_loaded(name: str, module: nn.Module, tensor: str) -> None:
    value = getattr(module, tensor)
    if value is not None and not getattr(value, "_is_hf_initialized", False):
        raise ValueError(_MISSING.format(f"{name}.{tensor}"))


def _check_finite(name: str, module: nn.Module, tensor: str) -> None:
    value = getattr(module, tensor)
    if value is not None and not value.isfinite().all():
        raise ValueError(f"the checkpoint's {name}.{tensor} has values that are NaN or infinite")


def _check_values(name: str, site: SparseSite) -> None:
    for tensor in ("threshold", "scale", "center"):
        _check_finite(name, site, tensor)
    for tensor in ("threshold", "scale"):
        value = getattr(site, tensor)
        if value is not None and (value < 0).any():
            raise ValueError(f"the checkpoint's {name}.{tensor} is negative")


def transformers_models(model: nn.Module) -> list[Any]:
    """All of transformers' models in `model`, itself among them, outer ones first."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def refresh_ties(model: nn.Module) -> None:
    """Tell transformers anew which weights are tied: an embedding that reads a quantised layer has none."""
    for each in transformers_models(model):
        if hasattr(each, "all_tied_weights_keys"):
            each.all_tied_weights_keys = each.get_expanded_tied_weights_keys(all_submodels=True)


def set_quantization_config(model: Any, config: SparsityConfig | None) -> None:
    """Tell the transformers models in `model` that they are sparse, or, with None, dense again."""
    if "transformers.modeling_utils" not in sys.modules:
        return  # then there are none
    refresh_ties(model)
    if config is not None:
        _unmark_gguf(model)
    _tell(model, config)


def _tell(model: Any, recipe: SparsityConfig | None) -> None:
    inner: set[nn.Module] = set()
    for each in transformers_models(model):
        if recipe is None:
            each.__dict__.pop(RECIPE, None)
        else:
            each.__dict__[RECIPE] = recipe
        if each in inner:
            continue
        inner |= set(each.modules())
        existing = getattr(each, "hf_quantizer", None)
        if existing is not None and not isinstance(existing, DeadbandQuantizer):
            continue  # another quantization has its say
        if recipe is None and existing is not None:
            existing.remove_quantization_config(each)
        elif recipe is not None:
            now = DeadbandConfig(**(config_of(each) or recipe).to_dict())
            each.hf_quantizer = DeadbandQuantizer(now, pre_quantized=True)


def _unmark_gguf(model: nn.Module) -> None:
    """transformers marks a model from a GGUF file as quantised, also where it has unpacked every weight."""
    for each in transformers_models(model):
        quantizer = getattr(each, "hf_quantizer", None)
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
        if getattr(method, "value", method) == "gguf" and not getattr(quantizer, "packed_modules", None):
            quantizer.remove_quantization_config(each)  # type: ignore[union-attr]


FOLLOWERS.append(set_quantization_config)
