"""Prune a Hugging Face model folder in one shot, without PyTorch: the zeros of the demo.

Each linear layer of the encoder is pruned by what its inputs look like (optimal brain surgeon, as SparseGPT orders it:
Frantar and Alistarh, https://arxiv.org/abs/2301.00774): column by column, the weights that matter least go, and the
weights not yet visited make up for them. No training takes place, so keep the sparsity moderate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from espalier import hf
from espalier.errors import InputError
from espalier.onnx import writer
from espalier.ort import OrtProgram

WEIGHTS = "model.safetensors"
DAMPING = 0.01
"""Added to the diagonal of every Gram matrix, as a share of its mean: inputs that never vary have no inverse."""
BLOCK = 64
"""Columns among which the weights to drop are chosen at a time."""


def prune_folder(
    source: Path,
    target: Path,
    *,
    sparsity: float,
    calibration: Sequence[Sequence[int]],
    rows: int = 1,
    threads: int = 1,
) -> Path:
    """Write a copy of the model folder ``source`` to ``target`` with ``sparsity`` of the encoder's weights zero.

    ``calibration`` are token ids of typical text. ``rows`` neighbouring outputs share their zeros (4 for 4x1 groups).
    A copy made earlier with the same settings and calibration is used again. Raises InputError for a sparsity outside
    of 0 to 1 or a target that is the source.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity must be at least 0 and below 1; got {sparsity}")
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is the model itself; write the pruned copy somewhere else")
    recipe = {"sparsity": sparsity, "rows": rows, "texts": len(calibration), "tokens": sum(map(len, calibration))}
    note = target / "recipe.json"
    if note.is_file() and json.loads(note.read_text()) == recipe:
        return target
    tensors = load_file(source / WEIGHTS)
    for name, gram in gram_matrices(source, calibration, target.parent, threads).items():
        tensors[name] = prune(tensors[name], gram, sparsity, rows)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS, "recipe.json"))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    note.write_text(json.dumps(recipe))
    return target


def gram_matrices(folder: Path, texts: Sequence[Sequence[int]], work: Path, threads: int) -> dict[str, np.ndarray]:
    """``X^T X`` (``[K, K]``) over the tokens of ``texts``, by name of the encoder weight (``[M, K]``) that takes X."""
    graph = hf.read(folder)
    takes = {
        node.inputs[1]: node.inputs[0] for node in graph.nodes if node.op == "Linear" and ".layer." in node.inputs[1]
    }
    graph.outputs = list(dict.fromkeys(takes.values()))
    graph.prune()
    path = writer.write(graph, work / "calibration.onnx")
    program = OrtProgram(path, threads=threads)
    grams: dict[str, Any] = dict.fromkeys(graph.outputs, 0.0)
    for text in texts:
        ids = np.array([text], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        for name, x in zip(graph.outputs, program.run(None, feeds), strict=True):
            grams[name] = grams[name] + x[0].T @ x[0]
    path.unlink()
    return {weight: grams[x] for weight, x in takes.items()}


def prune(weight: np.ndarray, gram: np.ndarray, sparsity: float, rows: int = 1) -> np.ndarray:
    """``weight`` (``[M, K]``) with ``sparsity`` of each block of columns zero and the rest adapted to ``gram``."""
    w, k = weight.astype(np.float64), weight.shape[1]
    hessian = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(k)
    # Row j of this factor holds how the columns after j make up for a change in column j.
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        cost = (w[:, start:stop] / np.diag(factor)[start:stop]) ** 2
        groups = cost.reshape(-1, rows, stop - start).sum(axis=1)
        drop = np.zeros(groups.size, bool)
        drop[np.argsort(groups, axis=None, kind="stable")[: round(groups.size * sparsity)]] = True
        dropped = np.repeat(drop.reshape(groups.shape), rows, axis=0)
        errors = np.zeros((len(w), stop - start))
        for j in range(start, stop):
            error = np.where(dropped[:, j - start], w[:, j], 0) / factor[j, j]
            w[:, j:stop] -= np.outer(error, factor[j, j:stop])
            w[dropped[:, j - start], j] = 0
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w.astype(weight.dtype)
