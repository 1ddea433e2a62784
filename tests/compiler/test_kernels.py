"""What kernels compute on this processor, against integers that have room."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dsopt.compiler.kernels import MICROSOFT, format_of, linear_node, weight_parts
from dsopt.compiler.probe import adds_in_16_bits
from dsopt.compiler.recipe import Format
from dsopt.compiler.weights import initializer
from dsopt.runtime.session import Session, session_options

N, K = 48, 64


def multiply(form: Format, x: np.ndarray, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    source = ir.val("x", ir.DataType.FLOAT, ["rows", K])
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 21, MICROSOFT: 1}, name="linear")
    weights = [initializer(graph, ir.tensor(array, name=f"w.{number}")) for number, array in enumerate(arrays)]
    parts = weight_parts(form, N, K)
    assert [(part.shape, part.dtype.numpy()) for part in parts] == [(array.shape, array.dtype) for array in arrays]
    node = linear_node(form, source, weights, N, K)
    assert format_of(node) == form
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    Session.share_pool(2)
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("rows", [1, 5, 128])
@pytest.mark.parametrize(("text", "largest"), [("w8a8", 127), ("w7a8", 63)])
def test_the_largest_codes_do_not_overflow(text: str, largest: int, rows: int) -> None:
    """All activations 255 steps from zero, all weights alike: a sum of two products is as large as it can be."""
    x, signs = np.full((rows, K), 2.55, np.float32), np.where(np.arange(N) % 2, 1, -1)
    codes, scales = np.tile(largest * signs, (K, 1)), np.full(N, 0.5, np.float32)
    if text == "w8a8":
        arrays: tuple[np.ndarray, ...] = ((codes + 128).astype(np.uint8), scales, np.array(128, np.uint8))
    else:
        arrays = codes.astype(np.int8), scales
    np.testing.assert_allclose(multiply(Format.parse(text), x, arrays), x @ (codes * scales), rtol=1e-5)


def test_the_probe_knows_whether_signed_codes_of_eight_bits_would() -> None:
    x, codes, scales = np.full((4, K), 2.55, np.float32), np.full((K, N), 127), np.full(N, 0.5, np.float32)
    made = multiply(Format("w8a8", 7), x, (codes.astype(np.int8), scales))  # 8 bits where 7 belong
    assert adds_in_16_bits() == (not np.allclose(made, x @ (codes * scales), rtol=1e-5))
