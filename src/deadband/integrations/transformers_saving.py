"""transformers: what `save_pretrained` writes of a sparse model comes from its layers, as they are then.

It holds for every transformers model that has deadband's layers somewhere, whatever was given to `sparsify_`: the
model, a wrapper of it, a part of it. `import deadband` puts it in `PreTrainedModel`, as nothing else is called for all
of them.

A plain transformers would fill quantised weights in with random ones. So their files are not named as a model's, and
config.json names them in a way (`transformers_weights`) that transformers refuses, with a message that tells why.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from deadband.integrations.transformers import BUFFERS, DeadbandConfig, DeadbandQuantizer, is_ours, refresh_ties
from deadband.layers.experts import ExpertLinear, with_projections
from deadband.layers.quantized import QuantizedMatrix, QuantizedTable, unmake_quantized_, untie_table_
from deadband.layers.sites import how_computed, shape_of
from deadband.layers.sparse import SparseSite
from deadband.sparsify.config import SparsityConfig, config_of

NOTE = " (quantised weights: import deadband before loading them)"


def _save_pretrained(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    existing = getattr(model, "hf_quantizer", None)
    config = None if getattr(model, "_hf_peft_config_loaded", False) else config_of(model)
    if config is None and not (isinstance(existing, DeadbandQuantizer) or is_ours(_quantization_of(model))):
        from deadband.masks.mask_weight import masked_state_dict  # what imports transformers need not wait for it

        if kwargs.get("state_dict") is None and (masked := masked_state_dict(model)) is not None:
            kwargs["state_dict"] = masked
        original(model, *args, **kwargs)
        return
    given = inspect.signature(original).bind(model, *args, **kwargs)
    if config is None:  # dense again, or adapters alone
        with _written_as(model, None):
            original(*given.args, **given.kwargs)
        return
    if existing is not None and not isinstance(existing, DeadbandQuantizer):
        method = existing.quantization_config.quant_method
        raise ValueError(
            f"the model is quantised by {getattr(method, 'value', method)!r} and sparse as well, which one checkpoint "
            "cannot say; call deadband.densify_ before saving, and sparsify_ after loading"
        )
    if given.arguments.get("distributed_checkpoint"):
        raise ValueError(
            "a sparse model cannot be saved as a distributed checkpoint; pass distributed_checkpoint=False"
        )
    if config.weights and given.arguments.get("push_to_hub"):
        raise ValueError("a quantised model is not pushed while saving; call model.push_to_hub(...) instead")
    _check_loads(model, config)
    state = given.arguments.get("state_dict")
    given.arguments["state_dict"] = _tensors(model, model.state_dict() if state is None else state)
    with _written_as(model, config):
        if config.weights:
            _save_hidden(original, given)
        else:
            original(*given.args, **given.kwargs)


def _quantization_of(model: Any) -> Any:
    return getattr(model.config, "quantization_config", None)


@contextlib.contextmanager
def _written_as(model: Any, config: SparsityConfig | None) -> Iterator[None]:
    """Inside, the model has a configuration of its own that says what it is; others may share the one it has."""
    kept = {name: model.__dict__[name] for name in ("config", "hf_quantizer") if name in model.__dict__}
    written = copy.deepcopy(model.config)
    written.__dict__.pop("quantization_config", None)
    if config is not None:
        written.quantization_config = DeadbandConfig(**config.to_dict())
    model.config, model.hf_quantizer = written, None  # a quantizer would give the state dict
    try:
        yield
    finally:
        del model.__dict__["hf_quantizer"]
        model.__dict__.update(kept)


def _check_loads(model: Any, config: SparsityConfig) -> None:
    """A ValueError if a model made from the configuration would not have the layers and weights that are written."""
    for name, layer in with_projections(model):
        if (what := how_computed(layer)) is not None:
            raise ValueError(f"layer {name!r} {what}; a checkpoint would hold it under other names")
    plain = copy.deepcopy(model.config)
    plain.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            empty = type(model)(plain)
    except Exception:  # it takes more than a configuration; then from_pretrained will get that too
        return
    there = dict(with_projections(empty, every_name=True))
    for name, layer in with_projections(model):
        if not isinstance(layer, (SparseSite, QuantizedMatrix)):
            continue
        other: Any = there.get(name)
        if other is None or getattr(other, "weight", None) is None:
            raise ValueError(
                f"layer {name!r} is sparse or quantised, but a {type(model).__name__} of this config has no such "
                "layer, so that what is saved could not be loaded; merge adapters first, or bring the config up to date"
            )
        expected = layer.matrix_shape if isinstance(layer, QuantizedMatrix) else shape_of(layer)
        shape = tuple(other.weight.shape[-2:])
        if (shape[::-1] if layer.stored_in_out else shape) != expected:
            raise ValueError(
                f"layer {name!r} is {list(expected)}, but its config makes it {list(shape)}, so that what is saved "
                "could not be loaded; bring the config up to date"
            )


def _tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes into the files of a state dict: each of deadband's tensors once, and tied weights as transformers takes
    them, contiguous."""
    first = {id(module): name for name, module in model.named_modules()}
    tensors = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (SparseSite, QuantizedMatrix)) and first[id(module)] != name:
            for buffer in BUFFERS:
                tensors.pop(f"{name}.{buffer}", None)
        elif isinstance(module, QuantizedTable) and id(module.source) not in first:
            tensors[f"{name}.weight"] = module.source.matrix(module.table_dtype)  # its layer is not of this model
    counts = Counter(_place(tensor) for tensor in tensors.values())
    copies: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if counts[_place(tensor)] > 1 and not tensor.is_contiguous():
            tensors[name] = copies.setdefault(_place(tensor), tensor.contiguous())
    return tensors


def _place(tensor: Any) -> Any:
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_meta
        or not tensor.numel()
        or type(tensor) not in (Tensor, nn.Parameter)
    ):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _save_hidden(original: Callable[..., None], given: inspect.BoundArguments) -> None:
    folder = Path(given.arguments["save_directory"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as saving:
        given.arguments["save_directory"] = saving
        original(*given.args, **given.kwargs)
        files = sorted(Path(saving).iterdir())
        weights = [file for file in files if ".safetensors" in file.name]
        if weights:
            index = next((file for file in weights if ".index." in file.name), None)
            if index is not None:
                text = json.loads(index.read_text(encoding="utf-8"))
                text["weight_map"] = {key: _hidden(file) for key, file in text["weight_map"].items()}
                index.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            config = Path(saving, "config.json")
            text = json.loads(config.read_text(encoding="utf-8"))
            text["transformers_weights"] = _hidden((index or weights[0]).name) + NOTE
            config.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for stale in folder.glob("deadband*.safetensors*"):
                stale.unlink()
        for file in files:
            os.replace(file, folder / (_hidden(file.name) if file in weights else file.name))


def _hidden(name: str) -> str:
    return re.sub("^model", "deadband", name)


def _find_files(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    name = kwargs.get("transformers_explicit_filename")
    if isinstance(name, str) and name.endswith(NOTE):
        kwargs["transformers_explicit_filename"] = name.removesuffix(NOTE)
    return original(*args, **kwargs)


def _revert_weight_conversion(original: Callable[..., Any], model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Patterns for weights (`q_proj`) would take thresholds and codes for weights as well."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (SparseSite, QuantizedMatrix))]
    own = {f"{name}.{buffer}" for name in layers for buffer in BUFFERS}
    rest = {key: tensor for key, tensor in state.items() if key not in own}
    return {**original(model, rest), **{key: tensor for key, tensor in state.items() if key in own}}


def _tied_weights(original: Callable[..., dict[str, str]], model: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Without the pairs of which a weight is quantised: such layers are tied in their own way, or not at all.

    transformers looks patterns up among parameters and buffers, where it has to find what a dense model has.
    """
    modules = model.named_modules(remove_duplicate=False)
    ours = {name: each for name, each in modules if isinstance(each, (SparseSite, QuantizedMatrix, QuantizedTable))}
    if not ours:
        return original(model, *args, **kwargs)
    layers = {name: each for name, each in ours.items() if not isinstance(each, ExpertLinear)}
    computed = {f"{name}.weight": None for name, each in layers.items() if "weight" not in each._parameters}
    buffers = {f"{name}.{buffer}" for name, each in ours.items() for buffer in each._buffers}
    kind = type(model)

    def named_parameters(**options: Any) -> Iterator[tuple[str, Any]]:
        yield from kind.named_parameters(model, **options)
        yield from computed.items()

    def named_buffers(**options: Any) -> Iterator[tuple[str, Any]]:
        yield from (item for item in kind.named_buffers(model, **options) if item[0] not in buffers)

    model.named_parameters, model.named_buffers = named_parameters, named_buffers
    try:
        pairs = original(model, *args, **kwargs)
    finally:
        for name in ("named_parameters", "named_buffers"):
            model.__dict__.pop(name, None)  # where models are in each other, the inner call comes first
    return {target: source for target, source in pairs.items() if target not in computed and source not in computed}


def _resize_token_embeddings(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """New rows have no codes: a quantised output layer and the embedding tied to it get a weight again."""
    for table in [module for module in model.modules() if isinstance(module, QuantizedTable)]:
        if not (args or kwargs):
            break  # it only asks for the embedding
        if isinstance(table.source, QuantizedMatrix):
            unmake_quantized_(table.source)
        untie_table_(table, cast(nn.Parameter, table.source.weight))
    resized = original(model, *args, **kwargs)
    refresh_ties(model)
    return resized


def _num_parameters(
    original: Callable[..., int], model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Quantised weights, which are no parameters, count as the weights that they are."""
    modules = {module for module in model.modules() if isinstance(module, QuantizedMatrix)}
    if exclude_embeddings:  # the output layer that an embedding is tied to counts as that
        modules -= {module.source for module in model.modules() if isinstance(module, QuantizedTable)}
    quantised = 0 if only_trainable else sum(math.prod(module.shape) for module in modules)
    return original(model, only_trainable, exclude_embeddings) + quantised


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


_wrap(modeling_utils.PreTrainedModel, "save_pretrained", _save_pretrained)
_wrap(modeling_utils.PreTrainedModel, "get_expanded_tied_weights_keys", _tied_weights)
_wrap(modeling_utils.PreTrainedModel, "num_parameters", _num_parameters)
_wrap(modeling_utils.PreTrainedModel, "resize_token_embeddings", _resize_token_embeddings)
_wrap(modeling_utils, "revert_weight_conversion", _revert_weight_conversion)
_wrap(modeling_utils, "_get_resolved_checkpoint_files", _find_files)
