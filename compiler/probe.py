"""Which kernels the installed ONNX Runtime has for a provider: found by making sessions, not by version.

ONNX Runtime's own list (`get_all_opkernel_def`) loads every provider that the wheel was built for and ends the process
where the libraries of one are missing, which is the normal case for TensorRT. A session of one node asks the same.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dsopt.compiler.chains import Body, Chain, body_chain, linear_chain
from dsopt.compiler.recipe import Format
from dsopt.compiler.targets import Target, find_target
from dsopt.runtime.devices import missing_provider
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir, write_atomically
from dsopt.runtime.session import Session, default_threads, session_options

_PASSING = ("CUDA failure", "CUBLAS failure", "CUDNN failure", "out of memory", "Failed to allocate")  # a busy card
_SIZE = 128  # N = K of the layers tried


@cache
def probed(name: str) -> Target:
    """The target of this name with the formats that have a kernel in this ONNX Runtime.

    Where the provider cannot be loaded the record stands. Asked once for each version and entry: in a process of its
    own, whose thread pool does not become this one's.
    """
    target = find_target(name)
    if missing_provider(target.provider):
        return target
    asked = sha256(repr(sorted(target.linears.items())).encode()).hexdigest()[:8]
    path = cache_dir() / "kernels" / f"probe-{name}-{ort.__version__}-{asked}.json"
    try:
        return _with_linears(target, path.read_bytes())
    except (OSError, ValueError, AttributeError, TypeError):
        command = [sys.executable, "-m", "dsopt.compiler.probe", target.name]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode or not json.loads(done.stdout):
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise DsoptError(f"{target.provider}: asking for its kernels failed ({last or 'none found'})") from None
        write_atomically(path, done.stdout)
        return _with_linears(target, done.stdout)


@cache
def adds_in_16_bits() -> bool:
    """Whether this processor's products of unsigned and signed bytes overflow where they are added in pairs.

    AVX2 adds two of them in 16 bits (vpmaddubsw), with saturation; VNNI and others in 32.
    """
    rows = ir.Value(name="rows", shape=ir.Shape([4, _SIZE]), type=ir.TensorType(ir.DataType.UINT8))
    weights = ir.Value(name="weights", const_value=ir.tensor(np.full((_SIZE, _SIZE), 127, np.int8)))
    node = ir.node("MatMulInteger", [rows, weights])
    node.outputs[0].name = "sums"
    graph = ir.Graph([rows], node.outputs, nodes=[node], initializers=[weights], opset_imports={"": 21}, name="sums")
    Session.share_pool(default_threads())
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"rows": np.full((4, _SIZE), 255, np.uint8)})
    return bool(np.any(sums != 255 * 127 * _SIZE))


def _with_linears(target: Target, data: bytes) -> Target:
    linears = {str(dtype): tuple(map(str, formats)) for dtype, formats in json.loads(data).items()}
    return dataclasses.replace(target, linears=linears)


def probe(target: Target) -> dict[str, tuple[str, ...]]:
    """By float type, those of the entry's formats that a session can be made of; no float type without attention."""
    found = {}
    for dtype, formats in target.linears.items():
        if _has_attention(target, dtype):
            found[dtype] = tuple(form for form in formats if _has_linear(form, target, dtype))
    return found


def _has_attention(target: Target, dtype: str) -> bool:
    return _can_make(lambda: body_chain(Body(_SIZE, _SIZE, 2, 1, 64), 1, 1, target, dtype))


def _has_linear(form: str, target: Target, dtype: str) -> bool:
    return _can_make(lambda: linear_chain(Format.parse(form), _SIZE, _SIZE, 1, target, dtype))


def _can_make(make: Callable[[], Chain]) -> bool:
    try:
        make()
    except Exception as error:  # onnxruntime's have no common base; a missing kernel is one of them
        if any(word in str(error) for word in _PASSING):
            raise
        return False
    return True


if __name__ == "__main__":
    Session.share_pool(1)
    print(json.dumps(probe(find_target(sys.argv[1]))))
