"""Rows made fit for a kernel that has one scale for all: a scale for each, or another basis."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dsopt.compiler.kernels import MICROSOFT, linear_node
from dsopt.compiler.passes.prepare_rows import PrepareRows
from dsopt.compiler.recipe import Format
from dsopt.compiler.rotation import rotation
from dsopt.compiler.weights import initializer
from dsopt.runtime.session import session_options

RANDOM = np.random.default_rng(0)
W = RANDOM.integers(-127, 128, (64, 48))
SCALES = RANDOM.uniform(0.5, 1, 48).astype(np.float32) / 127


def multiply(form: str, x: np.ndarray) -> np.ndarray:
    """x [rows, 64] times the dequantized W [64, 48], or W in the rotated basis, by the format's kernel, as the pass
    leaves it."""
    source = ir.val("x", ir.DataType.FLOAT, [1, "rows", 64])
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 23, MICROSOFT: 1}, name="linear")
    arrays = (W + 128).astype(np.uint8), SCALES, np.array(128, np.uint8)
    weights = [initializer(graph, ir.tensor(array, name=f"w.{number}")) for number, array in enumerate(arrays)]
    node = linear_node(Format.parse(form), source, weights, 48, 64)
    node.name, node.outputs[0].name, node.outputs[0].type = "layer/it", "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=10)
    assert PrepareRows()(model).modified == (form != "w8a8")
    assert graph.outputs[0].name == "y"
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], {"x": x[None]})[0][0]


@pytest.fixture(autouse=True)
def pool(tmp_path: Path) -> None:
    from dsopt.runtime.session import Session

    Session.share_pool(2)


def error(form: str, x: np.ndarray) -> np.ndarray:
    """Of each row, relative to its length."""
    turned = x @ rotation(64) if form.endswith("-rot") else x
    exact = turned @ (W * SCALES)
    return np.linalg.norm(multiply(form, x) - exact, axis=1) / np.linalg.norm(exact, axis=1)


def test_a_loud_row_does_not_drown_the_others() -> None:
    x = RANDOM.standard_normal((6, 64)).astype(np.float32)
    for form in ("w8a8", "w8a8-rot", "w8a8-token", "w8a8-token-rot"):
        assert (error(form, x) < 0.02).all()
    x[2] *= 1000
    for form in ("w8a8", "w8a8-rot"):
        assert (error(form, x)[[0, 1, 3, 4, 5]] > 0.5).all()
    for form in ("w8a8-token", "w8a8-token-rot"):
        assert (error(form, x) < 0.02).all()


def test_a_loud_channel_does_not_drown_the_others() -> None:
    """Of what is in the other channels, the part of the sum that the loud one has no share in."""
    x = RANDOM.standard_normal((6, 64)).astype(np.float32)
    quiet = x.copy()
    x[:, 5] *= 300
    quiet[:, 5] = 0
    size = np.linalg.norm(quiet @ (W * SCALES), axis=1) / np.linalg.norm(x @ (W * SCALES), axis=1)
    for plain in ("w8a8", "w8a8-token"):
        assert (error(f"{plain}-rot", x) < 0.6 * error(plain, x)).all()
        assert (error(plain, x) > 0.1 * size).all()


@pytest.mark.parametrize("form", ["w8a8-token", "w8a8-token-rot"])
def test_a_row_of_zeros_stays_zero(form: str) -> None:
    x = RANDOM.standard_normal((3, 64)).astype(np.float32)
    x[1] = 0
    y = multiply(form, x)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], 0)
