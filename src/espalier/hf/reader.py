"""From a Hugging Face model folder to a native graph."""

from __future__ import annotations

from pathlib import Path

from espalier.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from espalier.hf.builder import Builder, Layers
from espalier.hf.config import Config
from espalier.hf.encoders import FAMILIES, add_encoder, use_onnx
from espalier.hf.heads import BASE, LEFTOVERS, add_head, task_of
from espalier.hf.quantization import read_quantization
from espalier.hf.sentence import MODULES, add_modules, read_modules
from espalier.hf.weights import Weights
from espalier.ir.graph import Graph
from espalier.ir.verify import verify


def read(folder: str | Path) -> Graph:
    """Read a model folder: ``config.json`` and safetensors, or the layout of sentence-transformers.

    Families: BERT (MiniLM included), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA and MPNet, with the head that
    ``architectures`` names. Inputs are int64 ``[batch, seq]``: ``input_ids``, ``attention_mask`` (1 for tokens, 0 for
    padding) and, where the model has several token types, ``token_type_ids``. Outputs are float32 and bear the names
    that transformers gives them; a sentence-transformers folder gives ``sentence_embedding`` and ``token_embeddings``.

    Constants are views of the memory-mapped file, so it must not be changed while the graph is in use; float16,
    bfloat16 and float64 weights are converted to float32. Layers quantised to 8 bits in the convention of
    compressed-tensors stay so.

    Raises ModelNotFoundError when a file is missing, ModelFormatError when one is corrupt or the weights are not those
    the configuration describes, UnsupportedModelError for other architectures, heads and settings.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise ModelFormatError(f"{folder} is a file; expected a Hugging Face model folder with a config.json")
        raise ModelNotFoundError(f"{folder}: no such folder; expected a Hugging Face model folder with a config.json")
    modules = read_modules(folder) if (folder / MODULES).is_file() else []
    home = modules[0][1] if modules else folder
    config = Config.read(home / "config.json")
    kind = config.text("model_type")
    family = FAMILIES.get(kind)
    if family is None:
        raise UnsupportedModelError(
            f"{config.path}: expected model_type to be one of {', '.join(FAMILIES)}, got {kind!r}. {use_onnx()}"
        )
    config = config.over(family.defaults)
    # What sentence-transformers saved under the name of a pre-training class is still the encoder alone.
    task = BASE if modules else task_of(family, config)
    weights = Weights.read(home, _class_name(config))
    builder = Builder(folder.resolve().name)
    encoder = add_encoder(Layers(builder, weights, read_quantization(config)), family, config, weights.prefix())
    if modules:
        add_modules(encoder, modules)
    else:
        add_head(encoder, task)
    weights.finish(LEFTOVERS)
    verify(builder.graph)
    return builder.graph


def _class_name(config: Config) -> str:
    """The class of transformers that could load this folder."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str) and names[0].isidentifier():
        return names[0]
    return "AutoModel"
