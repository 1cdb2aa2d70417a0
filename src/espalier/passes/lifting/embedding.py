"""Look-ups: word, position and token type embeddings."""

from __future__ import annotations

import numpy as np

from espalier.ir.graph import Node
from espalier.ir.quantization import QUANTIZED
from espalier.ir.stored import ScaledTable
from espalier.passes.lifting.axes import BATCH, FEATURE, TOKEN, Axes, axis
from espalier.passes.lifting.lifter import FLOATS, Lifter
from espalier.passes.lifting.values import BS, BSF, SF, Constant, Dequantized, Row, Tensor, Value, View
from espalier.passes.symbolic import ONE, Expr


def embed(lift: Lifter, node: Node, table: Constant, along: int) -> Value | None:
    """``Gather(table, ids)`` over the rows of a constant."""
    ids_name, name = node.inputs[1], node.outputs[0]
    if len(table.shape) != 2 or table.dtype not in FLOATS or along not in (0, -2):
        return None
    ids = lift.get(ids_name)
    shape = lift.shape(ids_name)
    rows, width = table.shape
    if isinstance(ids, View) and ids.base.integer:
        tensor = Tensor("", SF if ids.base.layout == SF else BSF, ids.base.batch, ids.base.tokens, width)
        axes = (*ids.axes, axis(FEATURE, width))
        return lift.emit("Embedding", [_table(lift, table), ids.base.name], {}, tensor, axes=axes, name=name)
    prober = lift.prober
    constant = prober.constant_id(ids_name)
    if constant is not None and shape is not None:
        row = constant[0] + (rows if constant[0] < 0 else 0)
        if 0 <= row < rows:
            return Row(table.array[row].astype(np.float32), [*shape, Expr.of(width)])
    found = prober.positions(ids_name)
    if found is not None:
        source = _ids(lift, ids_name)
        if source is not None:
            offset, rank = found
            view = _positions(lift, source, table, offset, width, name)
            if rank < 3:
                lead: Axes = ((),) if rank == 2 else ()
                return View(view.base, (*lead, *view.base.axes()[1:]))
            # The same rows for every sequence: a view of [1, S, F] spread over the batch.
            return View(view.base, (axis(BATCH, source.base.batch), *view.base.axes()[1:]))
    from_ids = prober.positions_from_ids(ids_name)
    if from_ids is not None:
        base = lift.get(from_ids[0])
        if isinstance(base, View):
            ids_tensor = Tensor("", BS, base.base.batch, base.base.tokens, 1, True)
            where = lift.emit("PositionsFromIds", [from_ids[0]], {"padding_idx": from_ids[1]}, ids_tensor, integer=True)
            tensor = Tensor("", BSF, base.base.batch, base.base.tokens, width)
            return lift.emit("Embedding", [_table(lift, table), where.base.name], {}, tensor, name=name)
    return _foreign_ids(lift, table, ids_name, shape, name)


def _table(lift: Lifter, table: Constant) -> str:
    """Name of a table's constant; one of integers stays so, with a scale per row."""
    if not isinstance(table, Dequantized) or table.q.dtype.name not in QUANTIZED or table.axis != 0:
        return lift.float32(table)
    parts = (table.q, table.scale, table.zero)
    return lift.derive((table.name, "table"), table.name, lambda: ScaledTable.dequantized(*parts))


def _foreign_ids(lift: Lifter, table: Constant, ids: str, shape: list[Expr] | None, name: str) -> Value | None:
    """Ids that a foreign subgraph computes, of shape ``[B, S]`` like one of the graph's inputs."""
    if shape is None or len(shape) != 2 or lift.dtype(ids) not in ("int64", "int32"):
        return None
    for other in lift.graph.inputs:
        value = lift.get(other)
        if isinstance(value, View) and value.base.integer and [value.base.batch, value.base.tokens] == shape:
            tensor = Tensor("", BSF, shape[0], shape[1], table.shape[1])
            return lift.emit("Embedding", [_table(lift, table), ids], {}, tensor, name=name)
    return None


def _ids(lift: Lifter, name: str) -> View | None:
    """The integer input that says how long sequences are for a value of position ids."""
    shape = lift.shape(name)
    if not shape:
        return None
    return token_source(lift, shape[-1])


def token_source(lift: Lifter, tokens: Expr | None) -> View | None:
    """The ids input with this many tokens, preferably one that is embedded; None where none fits."""
    found: list[View] = []
    for name in lift.graph.inputs:
        value = lift.get(name)
        if isinstance(value, View) and value.base.integer and (tokens is None or value.base.tokens == tokens):
            found.append(value)
    embedded = {n.inputs[1] for n in lift.nodes if n.op == "Embedding" and n.is_native}
    if not found and tokens is not None and tokens.number is None:
        # Extents without a name: adding the result to the tokens settles whether they are the same.
        known = {str(d) for name in lift.graph.inputs for d in lift.graph.types[name].shape or ()}
        everything = [v for v in map(lift.get, lift.graph.inputs) if isinstance(v, View) and v.base.integer]
        if len({v.base.tokens for v in everything}) == 1 or not tokens.symbols() <= known:
            found = everything
    return next((v for v in found if v.base.name in embedded), found[0] if found else None)


def _positions(lift: Lifter, source: View, table: Constant, offset: int, width: int, name: str) -> View:
    base = source.base
    ids = lift.emit(
        "Positions", [base.name], {"offset": offset}, Tensor("", "1S", base.batch, base.tokens, 1, True), integer=True
    )
    tensor = Tensor("", SF, ONE, base.tokens, width)
    return lift.emit("Embedding", [_table(lift, table), ids.base.name], {}, tensor, name=name)


def position_rows(lift: Lifter, name: str, table: Constant, offset: int, tokens: Expr, rank: int) -> Value | None:
    """Rows ``offset : offset + tokens`` of a table as position embeddings of rank 2 or 3."""
    source = token_source(lift, tokens)
    if source is None:
        return None
    flat = Constant(table.name, table.array)
    width = table.array.shape[-1]
    if table.array.ndim == 3:
        two = lift.float32(table, ".rows", lambda a: a[0])
        flat = Constant(two, lift.out.constants[two])
    view = _positions(lift, source, flat, offset, width, name)
    lead: Axes = ((),) if rank == 3 else ()
    return View(view.base, (*lead, axis(TOKEN, source.base.tokens), axis(FEATURE, width)))
