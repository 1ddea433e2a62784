"""A scale for each token around a kernel that has one for all."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dsopt.compiler.kernels import MICROSOFT, linear_node
from dsopt.compiler.passes.scale_rows import ScaleRows
from dsopt.compiler.recipe import Format
from dsopt.compiler.weights import initializer
from dsopt.runtime.session import session_options

RANDOM = np.random.default_rng(0)
W = RANDOM.integers(-127, 128, (64, 48))
SCALES = RANDOM.uniform(0.5, 1, 48).astype(np.float32) / 127


def multiply(form: str, x: np.ndarray) -> np.ndarray:
    """x [rows, 64] times the dequantized W [64, 48] by the format's kernel, as the pass leaves it."""
    source = ir.val("x", ir.DataType.FLOAT, ["rows", 64])
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 23, MICROSOFT: 1}, name="linear")
    arrays = (W + 128).astype(np.uint8), SCALES, np.array(128, np.uint8)
    weights = [initializer(graph, ir.tensor(array, name=f"w.{number}")) for number, array in enumerate(arrays)]
    node = linear_node(Format.parse(form), source, weights, 48, 64)
    node.name, node.outputs[0].name, node.outputs[0].type = "layer/it", "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=10)
    assert ScaleRows()(model).modified == (form == "w8a8-token")
    assert graph.outputs[0].name == "y"
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], {"x": x})[0]


@pytest.fixture(autouse=True)
def pool(tmp_path: Path) -> None:
    from dsopt.runtime.session import Session

    Session.share_pool(2)


def error(form: str, x: np.ndarray) -> np.ndarray:
    """Of each row, relative to its length."""
    exact = x @ (W * SCALES)
    return np.linalg.norm(multiply(form, x) - exact, axis=1) / np.linalg.norm(exact, axis=1)


def test_a_loud_row_does_not_drown_the_others() -> None:
    x = RANDOM.standard_normal((6, 64)).astype(np.float32)
    np.testing.assert_allclose(error("w8a8", x), error("w8a8-token", x), atol=0.02)
    x[2] *= 1000
    assert (error("w8a8", x)[[0, 1, 3, 4, 5]] > 0.5).all()
    assert (error("w8a8-token", x) < 0.02).all()


def test_a_row_of_zeros_stays_zero() -> None:
    x = RANDOM.standard_normal((3, 64)).astype(np.float32)
    x[1] = 0
    y = multiply("w8a8-token", x)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], 0)
