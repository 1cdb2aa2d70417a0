"""Loading a Hugging Face folder for training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.compression.quantization.checkpoint import settings_of, tensors_of
from espalier.errors import MissingDependencyError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.hf.config import Config
from espalier.hf.sentence import MODULES, read_modules

_HEADS = ("qa_outputs.", "classifier.", "pre_classifier.", "score.", "logits_proj.")
_POOLERS = ("pooler.",)


def model_home(folder: Path) -> Path:
    """Where the encoder lies: ``folder``, or its Transformer module in the layout of sentence-transformers.

    Raises ModelNotFoundError when there is no config.json.
    """
    home = read_modules(folder)[0][1] if (folder / MODULES).is_file() else folder
    if not (home / "config.json").is_file():
        raise ModelNotFoundError(f"{home}: no config.json; expected a Hugging Face model folder")
    return home


def pooling_of(folder: Path) -> str:
    """``mean`` or ``cls``: how a folder makes one vector of its tokens; mean where it does not say.

    Raises UnsupportedModelError for another way, or for modules after the pooling that change more than the length.
    """
    if not (folder / MODULES).is_file():
        return "mean"
    modules = read_modules(folder)
    others = [kind for kind, _ in modules[2:] if kind not in ("Normalize", "Dropout")]
    if others:
        raise UnsupportedModelError(
            f"{folder / MODULES}: distillation knows Transformer, Pooling and Normalize, got also {', '.join(others)}"
        )
    path = modules[1][1] / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path}: expected the settings of a Pooling as JSON: {error}") from error
    given = config.get("pooling_mode")
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    modes = [given] if isinstance(given, str) else given or [m for m, flag in flags.items() if config.get(flag)]
    if len(modes) == 1 and modes[0] in flags:
        return str(modes[0])
    raise UnsupportedModelError(f"{path}: expected the pooling mode mean or cls, got {modes or 'none of them'}")


def load_encoder(folder: Path, head: str, *, attention: bool, **settings: Any) -> tuple[nn.Module, list[str]]:
    """The model of a folder as the transformers class ``head``, in float32, and notes on what is new in it.

    ``attention``: attention probabilities will be asked for, which only the eager implementation returns. Without a GPU
    it is used always: on CPUs the backward pass of PyTorch's fused attention is several times slower.

    Raises MissingDependencyError, ModelNotFoundError, ModelFormatError, or UnsupportedModelError for a pickled
    checkpoint.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "compression needs the package transformers, which is not installed: pip install 'espalier[compress]'"
        ) from error
    home = model_home(folder)
    if Config.read(home / "config.json").get("quantization_config"):
        raise UnsupportedModelError(f"{home} is quantised already; compress the float model that it was made from")
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        "attn_implementation": "eager" if attention or not torch.cuda.is_available() else "sdpa",
        **settings,
    }
    with _quiet():
        load = getattr(transformers, head).from_pretrained
        model, info = _load(load, home, options)
        missing = sorted(info["missing_keys"])
        if missing and all(any(part in name for part in _POOLERS) for name in missing):
            # A checkpoint without a pooler must not get a random one.
            model, info = _load(load, home, {**options, "add_pooling_layer": False})
            missing = sorted(info["missing_keys"])
    new = [name for name in missing if any(part in name for part in (*_HEADS, *_POOLERS))]
    if lost := [name for name in missing if name not in new]:
        raise ModelFormatError(
            f"{home}: the weights lack {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}; check that config.json "
            "belongs to them"
        )
    notes = [f"new, untrained parameters: {', '.join(new)}"] if new else []
    return model.float(), notes


def _load(load: Any, home: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = load(str(home), **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        if options.get("attn_implementation") == "sdpa" and "attention" in reason.lower():
            return _load(load, home, {**options, "attn_implementation": "eager"})
        if any(home.glob("pytorch_model*.bin")) and not any(home.glob("*.safetensors")):
            raise UnsupportedModelError(
                f"{home} holds its weights only as a Python pickle, which can run any code; expected model.safetensors"
            ) from error
        raise ModelFormatError(f"{home}: transformers cannot load it: {reason}") from error
    if mismatched := info.get("mismatched_keys"):
        raise ModelFormatError(f"{home}: weights of another shape than config.json says: {list(mismatched)[:3]}")
    return model, info


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports; what matters of them is in the notes."""
    from transformers.utils import logging as untyped

    hf_logging: Any = untyped

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def save_model(model: nn.Module, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``: float32, and int8 what is quantised."""
    saver: Any = model
    with _quiet():
        saver.save_pretrained(str(folder), state_dict=tensors_of(model))
    quantization = settings_of(model)
    if quantization is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n", encoding="utf-8")


def normalizes(folder: Path) -> bool:
    """Whether the folder, in the layout of sentence-transformers, makes its embeddings of length one."""
    return (folder / MODULES).is_file() and any(kind == "Normalize" for kind, _ in read_modules(folder))
