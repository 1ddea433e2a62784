"""Small graphs to time: many copies of one linear layer, or of what stands between the linear layers of a block.

Weights are views of one random pool, handed to ONNX Runtime as external data, so that a chain costs neither copies nor
a file; each copy has weights (or a cache) of its own, or the processor's cache would hide what a step must read.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from dsopt.compiler.kernels import MICROSOFT, Part, linear_node, weight_parts
from dsopt.compiler.passes.lower_precision import FLOATS
from dsopt.compiler.passes.prepare_rows import prepared_rows, prepares_rows
from dsopt.compiler.passes.quantize_cache import FIRST_SCALE, narrow_cache
from dsopt.compiler.recipe import Format
from dsopt.compiler.targets import Target
from dsopt.runtime.cuda import cuda_options
from dsopt.runtime.session import session_options

_OPSET = 23
_POOL_BYTES = 64 << 20  # weights start over when it is used up
_ALIGNMENT = 64
_INTEGERS = ir.DataType.INT32

Shape = list[int | str]  # "rows": as many as a run is asked for; "capacity": past positions and rows


@dataclass(frozen=True)
class Body:
    """The sizes of a decoder block that decide the cost of what is not a linear layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.hidden}-{self.intermediate}-{self.heads}-{self.kv_heads}-{self.head_dim}"


@cache
def _pool(dtype: ir.DataType) -> NDArray[Any]:
    random, size = np.random.default_rng(0), int(_POOL_BYTES // dtype.itemsize)
    if dtype in FLOATS.values():  # no raw bytes: denormal numbers are slow
        return random.standard_normal(size, np.float32).astype(dtype.numpy())
    return np.frombuffer(random.bytes(_POOL_BYTES), dtype.numpy())


def _values(size: int, dtype: ir.DataType, start: int = 0) -> NDArray[Any]:
    pool = _pool(dtype)
    return pool[start : start + size] if start + size <= pool.size else np.resize(pool, size)


def forget_pools() -> None:
    """Free the random values. Chains that are alive keep theirs."""
    _pool.cache_clear()


def _ort_value(array: NDArray[Any], device: str = "cpu") -> ort.OrtValue:
    """On the CPU the value reads the array in place and keeps it alive."""
    kind = ir.DataType.from_numpy(array.dtype).value
    if array.dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        array = array.view(f"u{array.dtype.itemsize}")  # NumPy has no such type of its own
    if device == "cpu":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), kind, device, 0)
    value.update_inplace(array)
    return value


class _Builder:
    """A graph in the making, and the weights to inject into its session."""

    def __init__(self, floats: ir.DataType) -> None:
        self.floats = floats
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET, MICROSOFT: 1}, name="chain")
        self.names, self.values = list[str](), list[ort.OrtValue]()
        self._offset = 0

    def input(self, name: str, shape: Shape, dtype: ir.DataType | None = None) -> ir.Value:
        self.graph.inputs.append(ir.val(name, dtype or self.floats, shape))
        return self.graph.inputs[-1]

    def weight(self, name: str, part: Part) -> ir.Value:
        dtype = self.floats if part.dtype == ir.DataType.FLOAT and not part.fixed else part.dtype
        nbytes = int(part.size * dtype.itemsize)
        tensor = ir.ExternalTensor("pool", 0, nbytes, dtype, shape=ir.Shape(part.shape), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self.names.append(name)
        self.values.append(_ort_value(self._take(part.size, dtype).reshape(part.shape)))
        return value

    def _take(self, size: int, dtype: ir.DataType) -> NDArray[Any]:
        if self._offset + size > _pool(dtype).size:
            self._offset = 0
        start, self._offset = self._offset, self._offset + -(-size // _ALIGNMENT) * _ALIGNMENT
        return _values(size, dtype, start)

    def node(self, node: ir.Node, outputs: Sequence[tuple[str, Shape]], *, keep: bool = True) -> list[ir.Value]:
        """Append it; outputs that are kept become graph outputs, or the optimizer would drop the node."""
        for value, (name, shape) in zip(node.outputs, outputs, strict=False):
            value.name, value.type, value.shape = name, ir.TensorType(self.floats), ir.Shape(shape)
            if keep:
                self.graph.outputs.append(value)
        self.graph.append(node)
        return list(node.outputs)


class Chain:
    """A session of `copies` equal things side by side; `seconds(rows)` is the time of one.

    On a device each number of rows is captured and replayed: what is timed is its arithmetic and not the host's part of
    it, which a step that is captured does not pay, and a prompt hides. Options of the provider are those of generation.
    """

    def __init__(self, built: _Builder, copies: int, target: Target, past: int = 0) -> None:
        self.copies, self._target, self._past = copies, target, past
        self._inputs, self._outputs = list(built.graph.inputs), list(built.graph.outputs)
        self._weights = built.values  # the session reads them in place
        options, provider = session_options(), (target.provider, dict[str, str]())
        if target.device != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            provider = target.provider, cuda_options(options, captured=1)
        options.add_external_initializers(built.names, built.values)
        model = ir.to_proto(ir.Model(built.graph, ir_version=10)).SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=[provider], enable_fallback=0)
        self._bound: dict[int, tuple[ort.IOBinding, list[ort.OrtValue]]] = {}

    def seconds(self, rows: int) -> float:
        """Of one run over `rows` rows, divided by the copies. The first run of a number of rows warms up."""
        if rows not in self._bound:
            self._bound[rows] = self._bind(rows)
        options = ort.RunOptions()
        if self._target.device != "cpu":
            options.add_run_config_entry("gpu_graph_id", str(rows))
        start = time.perf_counter()
        self._session.run_with_iobinding(self._bound[rows][0], options)
        return (time.perf_counter() - start) / self.copies

    def _bind(self, rows: int) -> tuple[ort.IOBinding, list[ort.OrtValue]]:
        binding, values = self._session.io_binding(), dict[str, ort.OrtValue]()
        for value in self._inputs:
            values[str(value.name)] = made = self._value(value, rows)
            binding.bind_ortvalue_input(value.name, made)
        for value in self._outputs:
            # The outputs of all copies may overwrite each other, a present cache stands where its past does.
            name = str(value.name)
            key = name.replace("present", "past") if name.startswith("present") else str(value.shape)
            values[key] = values.get(key) or self._value(value, rows)
            binding.bind_ortvalue_output(name, values[key])
        return binding, list(values.values())

    def _value(self, value: ir.Value, rows: int) -> ort.OrtValue:
        assert value.shape is not None
        assert value.dtype is not None
        total = self._past + rows
        sides = {"rows": rows, "capacity": total}
        shape = [side if isinstance(side, int) else sides[str(side.value)] for side in value.shape]
        if value.dtype == _INTEGERS:
            filled = np.full(shape, total - 1 if shape else total, np.int32)
            return _ort_value(filled, self._target.device if shape else "cpu")
        return _ort_value(_values(math.prod(shape), value.dtype).reshape(shape), self._target.device)


def linear_chain(form: Format, n: int, k: int, copies: int, target: Target, dtype: str) -> Chain:
    """`copies` linear layers [rows, k] -> [rows, n] in the format, each with an input of its own: what a format
    computes of its input would otherwise be computed once for all copies, by the optimizer."""
    built = _Builder(FLOATS[dtype])
    for copy in range(copies):
        x = built.input(f"x{copy}", [1, "rows", k])
        parts = [built.weight(f"{copy}.{part.name}", part) for part in weight_parts(form, n, k)]
        source = _means(built, x, form.block, copy) if form.minima else x
        node = linear_node(form, source, parts, n, k)
        if prepares_rows(form):
            _prepare_rows(built, node, x, form, copy)
        else:
            built.node(node, [(f"y{copy}", [1, "rows", n])])
    return Chain(built, copies, target)


def _prepare_rows(built: _Builder, node: ir.Node, x: ir.Value, form: Format, copy: int) -> None:
    """The node between the operators that make its rows fit for 8 bits."""
    k, n = (int(side) for side in node.inputs[1].shape)  # type: ignore[union-attr, arg-type]
    rows = prepared_rows(built.graph, x, form, k)
    node.replace_input_with(0, rows.output)
    nodes = [*rows.nodes, node, *rows.after(node.outputs[0])]
    last = nodes.pop()
    for number, made in enumerate(nodes):
        for output in made.outputs:
            output.name = f"{number}.{output.index()}.{copy}"
        built.graph.append(made)
    built.node(last, [(f"y{copy}", [1, "rows", n])])


def _means(built: _Builder, x: ir.Value, block: int, copy: int) -> ir.Value:
    """The block means behind x."""
    width = int(x.shape[2])  # type: ignore[index, arg-type]
    pool = ir.node("AveragePool", [x], {"kernel_shape": [block], "strides": [block]})
    (means,) = built.node(pool, [(f"means{copy}", [1, "rows", width // block])], keep=False)
    joined = ir.node("Concat", [x, means], {"axis": -1})
    return built.node(joined, [(f"joined{copy}", [1, "rows", width + width // block])], keep=False)[0]


def body_chain(body: Body, past: int, copies: int, target: Target, dtype: str, cache: str = "float") -> Chain:
    """`copies` blocks without their linear layers, `past` positions in the cache: attention, norms, SwiGLU.

    `cache` is float (of type `dtype`) or int8.
    """
    built = _Builder(FLOATS[dtype])
    counts = [built.input("seqlens_k", [1], _INTEGERS), built.input("total_length", [], _INTEGERS)]
    longest, half = past + 4096, body.head_dim // 2
    counts += [built.weight(name, Part(name, (longest, half), ir.DataType.FLOAT)) for name in ("cos", "sin")]
    narrow = Part("steps", (body.kv_heads * body.head_dim,), ir.DataType.FLOAT)
    steps = [built.weight(narrow.name, narrow)] if cache == "int8" else []
    gamma = built.weight("gamma", Part("gamma", (body.hidden,), ir.DataType.FLOAT))
    x = built.input("x", [1, "rows", body.hidden])
    for copy in range(copies):
        _attend(built, body, copy, counts, steps)
        for source in ("o", "down"):
            x = _norm(built, x, gamma, f"{source}{copy}")
        _gate(built, body, copy)
    return Chain(built, copies, target, past)


def _attend(built: _Builder, body: Body, copy: int, counts: Sequence[ir.Value], steps: Sequence[ir.Value]) -> None:
    """`steps`: those of keys and values in int8, by channel."""
    width, kind = body.heads * body.head_dim, ir.DataType.INT8 if steps else built.floats
    cache: Shape = [1, body.kv_heads, "capacity", body.head_dim]
    qkv = built.input(f"qkv{copy}", [1, "rows", width + 2 * body.kv_heads * body.head_dim])
    past = [built.input(f"past.{part}{copy}", cache, kind) for part in "kv"]
    attributes: dict[str, str | int] = {"num_heads": body.heads, "kv_num_heads": body.kv_heads, "do_rotary": 1}
    inputs = [qkv, None, None, *past, *counts]
    if steps:
        inputs += [*[None] * (FIRST_SCALE - len(inputs)), *steps, *steps]
        attributes |= narrow_cache(ir.DataType.INT8)
    node = ir.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, num_outputs=3)
    built.node(node, [(f"ctx{copy}", [1, "rows", width]), *((f"present.{part}{copy}", cache) for part in "kv")])
    for present in node.outputs[1:]:
        present.type = ir.TensorType(kind)


def _norm(built: _Builder, x: ir.Value, gamma: ir.Value, name: str) -> ir.Value:
    shape: Shape = [1, "rows", int(x.shape[2])]  # type: ignore[index, arg-type]
    other = built.input(name, shape)
    node = ir.node(
        "SkipSimplifiedLayerNormalization", [x, other, gamma], {"epsilon": 1e-5}, domain=MICROSOFT, num_outputs=4
    )
    outputs = built.node(node, [(f"{name}.norm", shape), ("", []), ("", []), (f"{name}.sum", shape)], keep=False)
    built.graph.outputs.extend([outputs[0], outputs[3]])
    return outputs[3]


def _gate(built: _Builder, body: Body, copy: int) -> None:
    """Mul(Mul(gate, Sigmoid(gate)), up) over the halves of the packed projection."""
    shape: Shape = [1, "rows", body.intermediate]
    packed = built.input(f"gate_up{copy}", [1, "rows", 2 * body.intermediate])
    split = ir.node("Split", [packed], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gate, up = built.node(split, [(f"gate{copy}", shape), (f"up{copy}", shape)], keep=False)
    (sigmoid,) = built.node(ir.node("Sigmoid", [gate]), [(f"sigmoid{copy}", shape)], keep=False)
    (silu,) = built.node(ir.node("Mul", [gate, sigmoid]), [(f"silu{copy}", shape)], keep=False)
    built.node(ir.node("Mul", [silu, up]), [(f"product{copy}", shape)])
