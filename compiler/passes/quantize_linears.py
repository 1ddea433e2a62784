"""FusedMatMul -> the operator of the format that the recipe gives each linear layer's role."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from dsopt.compiler.checkpoint import Tensor
from dsopt.compiler.fp8 import Fp8Tensor
from dsopt.compiler.gguf import GgufTensor
from dsopt.compiler.gguf_blocks import counterpart, repack
from dsopt.compiler.gptq import Feedback, error_feedback, round_columns, round_weights
from dsopt.compiler.kernels import linear_node, weight_parts, with_block_means
from dsopt.compiler.quantizers import (
    Blocks,
    for_row_chunks,
    pack_nibbles,
    quantize_blocks,
    quantize_columns,
    quantize_fp8,
    quantize_minima,
)
from dsopt.compiler.recipe import HEAD, Format, Recipe
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.rotation import Rotated, rotate, rotated_gram, run_time_block
from dsopt.compiler.smoothing import Scaled, smoothed_gram
from dsopt.compiler.weights import Shared, Weight, initializer, lazy
from dsopt.runtime.errors import DsoptError

GPTQ_COLUMNS = 32  # channels of a block whose order is kept, where weights have no blocks
GPTQ_ROWS = 4096  # rounded together: so many hide the loop over channels; threads with fewer wait for each other

MakeFeedback = Callable[[], Feedback]
Basis = tuple[bytes | int, ...]
Evidence = Callable[[str], torch.Tensor]
"""By module name, the Gram matrix [K, K] of its input: one object for modules that read the same."""


class QuantizeLinears(ir.passes.InPlacePass):
    """With `evidence`, weights of few bits are rounded by GPTQ; without it, each to the nearest code.

    `find` gives the linear layers of a graph that is no decoder's.
    """

    def __init__(
        self,
        recipe: Recipe,
        evidence: Evidence | None = None,
        find: Callable[[ir.Graph], list[Linear]] = find_linears,
    ) -> None:
        super().__init__()
        self.recipe, self.evidence, self.find = recipe, evidence, find
        self._feedbacks = _Feedbacks()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for linear in self.find(graph):
            form = self.recipe.format(linear.role, module_name(linear))
            if form.kernel == "none":
                continue
            weight = linear.weight
            weights = self._weights(graph, linear, form)
            source = linear.node.inputs[0]
            assert source is not None
            if form.minima:
                _check_whole_blocks(linear, form)
                source = with_block_means(graph, linear.node, source, form.block)
            _replace(graph, linear.node, linear_node(form, source, weights, *linear.size))
            if not weight.uses():
                graph.initializers.pop(str(weight.name))
            modified = True
        return ir.passes.PassResult(model, modified)

    def _weights(self, graph: ir.Graph, linear: Linear, form: Format) -> list[ir.Value]:
        if form.kernel == "nbits":
            feedback = self._feedback(linear, _weight(linear.weight), form.block)
            return block_initializers(graph, linear.weight, form, feedback)
        if form.kernel == "w8a8":
            feedback = self._feedback(linear, _in_rows_basis(linear.weight, form), GPTQ_COLUMNS)
            return column_initializers(graph, linear.weight, form, feedback)
        n, k = linear.size
        source = _weight(linear.weight)
        shared = Shared(lambda: _fp8_codes(source, n, k))
        return _lazy_parts(graph, str(linear.weight.name), form, (n, k), shared)

    def _feedback(self, linear: Linear, weight: Weight, block: int) -> MakeFeedback | None:
        """For weights that are rounded later, when the others that read the same input are."""
        if self.evidence is None:
            return None
        evidence, name = self.evidence, module_name(linear)
        return lambda: self._feedbacks.of(evidence(name), weight.tensor, block)


class _Feedbacks:
    """The last one made: layers that read one input are rounded one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gram: torch.Tensor | None = None
        self._basis: Basis = ()
        self._made: dict[int, Feedback] = {}  # by block

    def of(self, gram: torch.Tensor, tensor: Tensor, block: int) -> Feedback:
        """For weights `tensor` of inputs that have the Gram matrix `gram` before they are smoothed and rotated."""
        with self._lock:
            basis = _basis(tensor)
            if self._gram is not gram or self._basis != basis:
                self._gram, self._basis, self._made = gram, basis, {}
            if block not in self._made:
                self._made[block] = error_feedback(_in_basis(gram, basis), block)
            return self._made[block]


def module_name(linear: Linear) -> str:
    """The name by which a recipe knows a linear layer: the checkpoint's, and `lm_head` for a tied head too."""
    return HEAD if linear.role == "head" else linear.name


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.name = f"{(old.name or '').rpartition('/')[0]}/{new.op_type}"
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def _check_whole_blocks(linear: Linear, form: Format) -> None:
    """The mean of half a block would be that of its weights and of padding."""
    width = linear.size[1]
    if width % form.block:
        raise DsoptError(f"{linear.name}: rows of {width} are not whole blocks of {form.block}, which {form} needs; "
                         "-zp does without")  # fmt: skip


def _weight(value: ir.Value) -> Weight:
    assert isinstance(value.const_value, Weight), value.name
    return value.const_value


def block_initializers(
    graph: ir.Graph, value: ir.Value, form: Format, feedback: MakeFeedback | None = None
) -> list[ir.Value]:
    """The lazily quantized `value` [N, K]: codes uint8 [N, blocks, bytes], scales [N, blocks], zero points or none.

    Asked for twice (a head tied to its embedding), the same initializers come back.
    """
    name, weight = f"{value.name}.{form}", _weight(value)
    if found := _made_before(graph, name):
        return found
    n, k = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    shared = Shared(lambda: _block_codes(weight, n, k, form, feedback), keep=["zeros"])
    return _lazy_parts(graph, name, form, (n, k), shared)


def column_initializers(
    graph: ir.Graph, value: ir.Value, form: Format, feedback: MakeFeedback | None = None
) -> list[ir.Value]:
    """The same in w8a8 and w7a8: codes [K, N], scales [N], a zero point with 8 bits; rotated where `form` is."""
    name, weight = f"{value.name}.{form}", _in_rows_basis(value, form)
    if found := _made_before(graph, name):
        return found
    n, k = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    return _lazy_parts(graph, name, form, (n, k), Shared(lambda: _column_codes(weight, n, k, form, feedback)))


def _in_rows_basis(value: ir.Value, form: Format) -> Weight:
    """The weight in the basis in which the kernel of `form` reads its rows."""
    weight = _weight(value)
    if not form.rotated:
        return weight
    return Weight(rotate(weight.tensor, run_time_block(weight.tensor.shape[1]), 1), str(value.name))


def _made_before(graph: ir.Graph, name: str) -> list[ir.Value]:
    found = [graph.initializers.get(f"{name}.{part}") for part in ("codes", "scales", "zeros")]
    return [part for part in found if part is not None] if found[0] is not None else []


def _lazy_parts(graph: ir.Graph, name: str, form: Format, size: tuple[int, int], shared: Shared) -> list[ir.Value]:
    return [
        initializer(graph, lazy(f"{name}.{part.name}", part.shape, part.dtype, partial(shared.take, part.name)))
        for part in weight_parts(form, *size)
    ]


def is_exact(tensor: Tensor, form: Format) -> bool:
    """Whether `form` holds the weight as the checkpoint does, code for code; multiplied rows change scales only."""
    if isinstance(tensor, Scaled):
        return tensor.columns is None and form.kernel == "nbits" and is_exact(tensor.source, form)
    if isinstance(tensor, Fp8Tensor):
        return form.kernel == "fp8" and tensor.square[1] == form.block
    return isinstance(tensor, GgufTensor) and counterpart(tensor.dtype) == form


def _repacked(tensor: Tensor, start: int, stop: int) -> Blocks:
    if isinstance(tensor, Scaled):
        made = _repacked(tensor.source, start, stop)
        assert tensor.rows is not None
        rows = torch.from_numpy(tensor.rows[start:stop])[:, None]
        return replace(made, scales=made.scales * rows, rest=None if made.rest is None else made.rest * rows)
    assert isinstance(tensor, GgufTensor)
    return repack(tensor, start, stop)


def _block_codes(weight: Weight, n: int, k: int, form: Format, feedback: MakeFeedback | None) -> dict[str, np.ndarray]:
    blocks = form.blocks(k)
    codes = np.empty((n, blocks, form.block * form.bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    zeros = np.empty((n, -(-blocks * form.bits // 8)), np.uint8)

    def keep(start: int, stop: int, made: Blocks) -> None:
        made = made if made.rest is None else _with_rest(made, form)
        pack = pack_nibbles if form.bits == 4 else torch.Tensor.numpy
        codes[start:stop], scales[start:stop] = pack(made.codes), made.scales.numpy()
        zeros[start:stop] = pack(made.zero_points)

    if feedback is not None and form.bits < 8 and not is_exact(weight.tensor, form):
        passed_on = feedback()

        def work(start: int, stop: int) -> None:
            keep(start, stop, _fed_back(weight, start, stop, passed_on, form))

        for_row_chunks(n, k, work, GPTQ_ROWS)
    else:
        for_row_chunks(n, k, lambda start, stop: keep(start, stop, _rounded(weight, start, stop, form)))
    return {"codes": codes, "scales": scales, **({"zeros": zeros} if form.zero_points else {})}


def _fed_back(weight: Weight, start: int, stop: int, feedback: Feedback, form: Format) -> Blocks:
    return round_weights(torch.from_numpy(weight.read(start, stop)), feedback, form)


def _rounded(weight: Weight, start: int, stop: int, form: Format) -> Blocks:
    if is_exact(weight.tensor, form):
        return _repacked(weight.tensor, start, stop)
    rows = torch.from_numpy(weight.read(start, stop))
    if form.minima:
        return quantize_minima(rows, form.bits, form.block)
    return quantize_blocks(rows, form.bits, form.block, zero_points=form.zero_points)


def _with_rest(made: Blocks, form: Format) -> Blocks:
    """The rest of each block as a weight of that block's mean: sum(rest * x) = rest * block * mean(x)."""
    assert made.rest is not None
    more = quantize_blocks(made.rest * form.block, form.bits, form.block, zero_points=True)
    pairs = [(made.codes, more.codes), (made.scales, more.scales), (made.zero_points, more.zero_points)]
    return Blocks(*(torch.cat(pair, 1) for pair in pairs))


def _column_codes(weight: Weight, n: int, k: int, form: Format, feedback: MakeFeedback | None) -> dict[str, np.ndarray]:
    """With 8 bits codes are unsigned."""
    zero = 128 if form.bits == 8 else 0
    codes, scales = np.empty((k, n), np.uint8 if zero else np.int8), np.empty(n, np.float32)
    passed_on = feedback() if feedback is not None and form.bits < 8 else None

    def work(start: int, stop: int) -> None:
        rows = torch.from_numpy(weight.read(start, stop))
        made, scale = round_columns(rows, passed_on, form.bits) if passed_on else quantize_columns(rows, form.bits)
        codes[:, start:stop], scales[start:stop] = made.numpy().T.astype(np.int16) + zero, scale.numpy()

    for_row_chunks(n, k, work, GPTQ_ROWS if passed_on else None)
    return {"codes": codes, "scales": scales, **({"zeros": np.array(zero, np.uint8)} if zero else {})}


def _basis(tensor: Tensor) -> Basis:
    """How columns of a weight were multiplied, with how much as bytes, or rotated, with the size of a head."""
    if isinstance(tensor, Scaled):
        before = _basis(tensor.source)
        return before if tensor.columns is None else (*before, tensor.columns.astype(np.float32).tobytes())
    if isinstance(tensor, Rotated):
        return (*_basis(tensor.source), tensor.head) if tensor.axis == 1 else _basis(tensor.source)
    return ()


def _in_basis(gram: torch.Tensor, basis: Basis) -> torch.Tensor:
    """E[x x^T] of inputs that are divided and rotated as the weights are."""
    for step in basis:
        if isinstance(step, bytes):
            gram = smoothed_gram(gram, torch.frombuffer(bytearray(step), dtype=torch.float32))
        else:
            gram = rotated_gram(gram, step)
    return gram


def _fp8_codes(weight: Weight, n: int, k: int) -> dict[str, np.ndarray]:
    """Of a checkpoint in float8 its own codes, and its scales for each row."""
    tensor = weight.tensor
    codes, scales = np.empty((n, k), ml_dtypes.float8_e4m3fn), np.empty((n, -(-k // 128)), np.float32)

    def work(start: int, stop: int) -> None:
        rows = weight.read(start, stop)  # raises on NaN
        if isinstance(tensor, Fp8Tensor) and is_exact(tensor, Format.parse("fp8")):
            codes[start:stop], scales[start:stop] = tensor.stored(start, stop)
            return
        made, scale = quantize_fp8(torch.from_numpy(rows))
        codes[start:stop], scales[start:stop] = made.view(torch.uint8).numpy().view(codes.dtype), scale.numpy()

    for_row_chunks(n, k, work)
    return {"codes": codes, "scales": scales}
