"""Optimal brain surgeon on matrices: which weights can go, and how the others make up for them.

With a quadratic loss ``d^T H d / 2`` in the change ``d`` of the weights, the best change that makes the weights ``q``
zero is ``d = -H^-1[:, q] (H^-1[q, q])^-1 w[q]`` and costs ``w[q]^T (H^-1[q, q])^-1 w[q] / 2`` (Hassibi and Stork
1993). For a linear layer every row of the weight has the same ``H = X^T X`` of its inputs (Frantar and Alistarh, OBC
2022, arXiv 2208.11580, and SparseGPT 2023, arXiv 2301.00774), here without the factor of a half.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.compression.groups import Groups
from espalier.errors import TrainingError

_SINGULAR = 1e-13
"""A pivot this much smaller than its diagonal is rounding, not information."""
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Numbers in the matrices that are solved at a time: on a CPU so few that they stay in its caches."""


def dampen(matrix: Tensor, share: float) -> Tensor:
    """``matrix`` ``[n, n]`` in float64 plus ``share`` of its mean diagonal on the diagonal."""
    result = matrix.double().clone()
    result.diagonal().add_(share * float(result.diagonal().mean()))
    return result


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Lower factors of ``[..., n, n]``. Raises TrainingError, which names ``what``, when a matrix is singular."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    bad = failed.any() or not bool((pivots > _SINGULAR * matrix.diagonal(dim1=-2, dim2=-1)).all())
    if bad:
        raise TrainingError(
            f"{what} is singular, so the weights left cannot be adjusted; set calibration.dampening above 0 (0.01 is "
            "usual), or calibrate on more data"
        )
    return factor


def inverse_factor(hessian: Tensor, what: str) -> Tensor:
    """Upper triangular ``U`` with ``U^T U`` the inverse of ``hessian`` ``[n, n]``.

    For every i, ``U[i:, i:]^T U[i:, i:]`` is the inverse of ``hessian[i:, i:]``: what is left after columns 0..i-1 are
    done.
    """
    flipped = cholesky(hessian.flip(0, 1), what)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(flipped, identity, upper=False)
    return inverse.flip(0, 1)


def column_scores(weight: Tensor, inverse: Tensor, groups: Groups) -> Tensor:
    """The least output error of removing each group alone: ``[group rows, group columns]``.

    ``weight``: ``[outputs, inputs]``; ``inverse``: of the Hessian. The rows of a group add up; its columns go jointly.
    """
    width = groups.columns
    if width == 1:
        return groups.reduce(weight.double() ** 2 / inverse.diagonal())
    outputs, inputs = weight.shape
    index = torch.arange(inputs, device=weight.device).reshape(-1, width)
    corner = inverse[index[:, :, None], index[:, None, :]]  # [group columns, width, width]
    parts = weight.double().reshape(outputs, -1, width).permute(1, 2, 0)  # [group columns, width, outputs]
    error: Tensor = (parts * torch.linalg.solve(corner, parts)).sum(1)  # [group columns, outputs]
    return error.T.reshape(-1, groups.rows, len(index)).sum(1)


def sweep(
    weight: Tensor, factor: Tensor, groups: Groups, kept: Tensor, count: int, block: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT: column by column, remove groups and let all later columns make up for it.

    ``weight`` ``[outputs, inputs]``; ``factor`` from :func:`inverse_factor`; ``kept`` ``[group rows, group columns]``,
    whose groups that are gone stay so; ``count`` groups are gone in the end, in equal shares of every ``block``
    columns, chosen when the columns before have been done. Returns the new weights and the new ``kept``.
    """
    weight, kept = weight.to(factor.dtype).clone(), kept.clone()
    width, inputs = groups.columns, weight.shape[1]
    step = groups.window or width
    block = max(step, block // step * step)
    down, taken = kept.shape[0], 0
    for begin in range(0, inputs, block):
        end = min(inputs, begin + block)
        columns = slice(begin // width, end // width)
        errors = _block_errors(weight[:, begin:end], factor[begin:end, begin:end], width)
        scores = errors.reshape(down, groups.rows, -1).sum(1)
        quota = round(count * end / inputs) - taken
        chosen = groups.select(scores, quota, kept[:, columns])
        kept[:, columns] = chosen
        taken += int((~chosen).sum())
        gone = ~groups.expand(chosen)

        def lost(i: int, values: Tensor, gone: Tensor = gone) -> Tensor:
            return values * gone[:, i : i + width]

        _change_columns(weight, factor, begin, end, width, lost)
    return weight, kept


def round_columns(weight: Tensor, factor: Tensor, mask: Tensor, scale: Tensor, limit: int, block: int) -> Tensor:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, and let all later ones make up for it.

    ``weight`` ``[outputs, inputs]``; ``factor`` from :func:`inverse_factor`; ``mask``: what may differ from zero;
    ``scale`` ``[outputs, 1]``. Returns integers from ``-limit`` to ``limit`` in floats ``[outputs, inputs]``.
    """
    weight, steps = weight.to(factor.dtype).clone(), torch.zeros_like(weight, dtype=factor.dtype)
    scale = scale.to(factor.dtype)
    inputs = weight.shape[1]
    for begin in range(0, inputs, block):

        def lost(i: int, column: Tensor, begin: int = begin) -> Tensor:
            here = slice(begin + i, begin + i + 1)
            steps[:, here] = torch.round(column / scale).clamp(-limit, limit) * mask[:, here]
            return column - steps[:, here] * scale

        _change_columns(weight, factor, begin, min(inputs, begin + block), 1, lost)
    return steps


def _change_columns(
    weight: Tensor, factor: Tensor, begin: int, end: int, width: int, lost: Callable[[int, Tensor], Tensor]
) -> None:
    """Take ``lost(place after begin, columns)`` from every ``width`` columns in turn, all later ones making up for it.

    In place, from the column ``begin`` to ``end``; those after ``end`` are brought up to date once, at the end.
    """
    local, u = weight[:, begin:end], factor[begin:end, begin:end]
    errors = torch.zeros_like(local)
    for i in range(0, end - begin, width):
        j = i + width
        change = lost(i, local[:, i:j])
        error = torch.linalg.solve_triangular(u[i:j, i:j], change, upper=True, left=False)
        local[:, i:j] -= change
        local[:, j:] -= error @ u[i:j, j:]
        errors[:, i:j] = error
    weight[:, end:] -= errors @ factor[begin:end, end:]


def _block_errors(weight: Tensor, u: Tensor, width: int) -> Tensor:
    """``[outputs, group columns]``: the error of removing ``width`` columns when all before them are done."""
    if width == 1:
        return weight**2 / u.diagonal() ** 2
    parts = [
        torch.linalg.solve_triangular(u[i : i + width, i : i + width], weight[:, i : i + width], upper=True, left=False)
        for i in range(0, weight.shape[1], width)
    ]
    return torch.stack([(part**2).sum(1) for part in parts], 1)


def refit(weight: Tensor, hessian: Tensor, kept: Tensor, groups: Groups) -> Tensor:
    """The weights ``[outputs, inputs]`` zero outside of ``kept`` and come closest to the outputs of ``weight``.

    Least squares under ``hessian`` ``[inputs, inputs]``: for each row ``x`` with the columns ``k`` kept,
    ``x[k] = hessian[k, k]^-1 (hessian x)[k]``. The rows of a group share the columns and with them the factor. The
    precision is that of ``hessian``, in float64 where float32 does not do. Raises TrainingError for a singular one.
    """
    # To a unit diagonal: inputs differ in size by orders of magnitude, which would cost as many digits.
    size = hessian.diagonal().sqrt().clamp(min=torch.finfo(hessian.dtype).tiny)
    scaled = hessian / size[:, None] / size
    right = (weight.to(hessian.dtype) @ (hessian / size)).reshape(kept.shape[0], groups.rows, -1)
    columns = kept.repeat_interleave(groups.columns, 1)  # [group rows, inputs]
    counts = columns.sum(1)
    order = counts.argsort(descending=True)  # rows of like size together, so that little is padded
    result = torch.zeros_like(right)
    begin, chunk = 0, _CHUNK.get(weight.device.type, _CHUNK["cuda"])
    while begin < len(order):
        width = int(counts[order[begin]])
        if not width:
            break
        rows = order[begin : begin + max(1, chunk // (width * width))]
        begin += len(rows)
        # The first `width` places of a stable sort are the kept columns, then others that fill up.
        index = columns[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = torch.arange(width, device=weight.device) < counts[rows, None]
        matrix = scaled[index[:, :, None], index[:, None, :]] * (valid[:, :, None] & valid[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).add_((~valid).to(matrix.dtype))
        places = index[:, None, :].expand(-1, groups.rows, -1)
        wanted = (right[rows].gather(2, places) * valid[:, None, :]).transpose(1, 2)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            factor, wanted = cholesky(matrix.double(), "a part of the Hessian"), wanted.double()
        solved = torch.cholesky_solve(wanted, factor).transpose(1, 2).to(result.dtype)
        result[rows] = torch.zeros_like(right[rows]).scatter(2, places, solved * valid[:, None, :])
    return result.reshape(weight.shape) / size


def output_error(change: Tensor, hessian: Tensor) -> float:
    """``trace(change hessian change^T)``: the squared error of the outputs, for ``change`` ``[outputs, inputs]``."""
    return float(output_errors(change, hessian).sum())


def output_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each output, ``[outputs]``; see :func:`output_error`."""
    change = change.to(hessian.dtype)
    return ((change @ hessian) * change).sum(1)


def quadratic(weight: Tensor, inverse: Tensor) -> Tensor:
    """``w^T A^-1 w`` for small blocks: ``weight`` ``[..., m]``, ``inverse`` A ``[..., m, m]``; 0 where A is."""
    weight, inverse = weight.clone(), inverse.clone()
    total = torch.zeros(weight.shape[:-1], dtype=weight.dtype, device=weight.device)
    for i in range(weight.shape[-1]):
        pivot = inverse[..., i, i]
        there = pivot > 0
        scaled = torch.where(there, weight[..., i] / torch.where(there, pivot, 1.0), 0.0)
        total += weight[..., i] * scaled
        column = inverse[..., :, i].clone()
        weight -= column * scaled[..., None]
        inverse -= (
            column[..., :, None]
            * torch.where(there, 1 / torch.where(there, pivot, 1.0), 0.0)[..., None, None]
            * (column[..., None, :])
        )
    return total


def eliminate(fisher: Tensor, weight: Tensor, kept: Tensor, what: str) -> Tensor:
    """What each group of a block costs when the groups of the block go one by one, always the cheapest next.

    ``fisher``: ``[blocks, n, n]``, dampened; ``weight``: ``[blocks, groups, m]`` with ``groups m = n``; ``kept``:
    ``[blocks, groups]``. Returns ``[blocks, groups]``: half the quadratic form, the first one ``w^2 / (2 F^-1_ii)``,
    made to grow along the order of removal; 0 for what is gone already.
    """
    blocks, groups, m = weight.shape
    n = groups * m
    alive = kept.repeat_interleave(m, 1)  # [blocks, n]
    masked = fisher * (alive[:, :, None] & alive[:, None, :])
    masked.diagonal(dim1=1, dim2=2).add_((~alive).to(masked.dtype))
    inverse = torch.cholesky_inverse(cholesky(masked, what)) * (alive[:, :, None] & alive[:, None, :])
    left, w = kept.clone(), (weight.reshape(blocks, n) * alive).to(fisher.dtype)
    losses = torch.zeros(blocks, groups, dtype=fisher.dtype, device=fisher.device)
    highest = torch.zeros(blocks, dtype=fisher.dtype, device=fisher.device)
    every = torch.arange(blocks, device=fisher.device)
    member = torch.arange(m, device=fisher.device)
    for _ in range(groups):
        if not bool(left.any()):
            break
        corners = inverse.reshape(blocks, groups, m, groups, m).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        costs = quadratic(w.reshape(blocks, groups, m), corners).masked_fill(~left, torch.inf) / 2
        cost, pick = costs.min(1)
        some = left[every, pick]
        highest = torch.where(some, torch.maximum(highest, cost), highest)
        losses[every[some], pick[some]] = highest[some]
        left[every, pick] = False
        for i in member:  # one row at a time: eliminating m rows one after the other is eliminating them jointly
            p = pick * m + i
            pivot = inverse[every, p, p]
            there = (pivot > 0) & some
            scale = torch.where(there, 1 / torch.where(there, pivot, 1.0), 0.0)
            column = inverse[every, :, p].clone()
            w = w - column * (w[every, p] * scale)[:, None]
            inverse = torch.baddbmm(inverse, (column * -scale[:, None])[:, :, None], column[:, None, :])
            inverse[every, p, :] = 0
            inverse[every, :, p] = 0
            w[every, p] = 0
    return losses


def compensate(fisher: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The weights ``[blocks, n]`` that are zero where ``kept`` is not and change the quadratic loss least.

    ``w[k] + F[k, k]^-1 F[k, q] w[q]`` for the kept ``k`` and the removed ``q`` of each block; ``fisher`` ``[blocks, n,
    n]``.
    """
    masked = fisher * (kept[:, :, None] & kept[:, None, :])
    masked.diagonal(dim1=1, dim2=2).add_((~kept).to(masked.dtype))
    removed = (weight * ~kept).to(fisher.dtype)
    right = (fisher @ removed[:, :, None]).squeeze(2) * kept
    change = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(masked)).squeeze(2)
    return (weight + change) * kept
