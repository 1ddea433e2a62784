"""Run by test_hollow.py with the hollow CUDA in its library path: artifacts in, what ONNX Runtime did with them out."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from dsopt.compiler.chains import Body
from dsopt.compiler.probe import probe
from dsopt.compiler.profile import measure
from dsopt.compiler.targets import TARGETS
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.cuda import DeviceCache, cuda_options
from dsopt.runtime.devices import choose_device, missing_provider
from dsopt.runtime.session import Session, session_options


def main() -> None:
    assert missing_provider("CUDAExecutionProvider") is None
    Session.share_pool(1)
    body = Body(128, 256, 4, 1, 64)
    table = measure([(128, 128)], (1, 4), ("none", "int4", "fp8"), "cuda", dtype="bf16", body=body, budget=0.1)
    assert table.machine["device"] == "hollow"
    assert all(seconds > 0 for seconds in (*table.cells.values(), table.other(4)))
    report = {"probe": probe(TARGETS["cuda"]), "artifacts": [_try(Path(name)) for name in sys.argv[1:]]}
    Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps(report))


def _try(directory: Path) -> dict[str, object]:
    artifact = open_artifact(directory)
    assert choose_device("auto", artifact.manifest, print) == "cuda"
    session = Session(artifact, device="cuda")
    cache = session.new_cache()
    assert isinstance(cache, DeviceCache)
    binding = session.bind(cache)
    for width in (20, 1, 1, 1, 1, 4, 4, 4):
        print(f"step {width}", flush=True)
        assert binding.run(np.zeros(width, np.int64), width).shape == (width, session.vocab_size)
    for count in (1, 1, 40, 40):
        print("step 4", flush=True)
        assert [len(row.tokens) for row in binding.top(np.zeros(4, np.int64), count, 4)] == [count] * 4
    cache.trim(9)
    kept = cache.valid()
    other = session.new_cache()
    other.restore(kept, 9)
    assert all(np.array_equal(other.valid()[name], part) for name, part in kept.items())
    return {"placed": _placement(directory)}


def _placement(directory: Path) -> dict[str, list[str]]:
    options = session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [("CUDAExecutionProvider", cuda_options(options, 16))]
    session = ort.InferenceSession(directory / "model.onnx", options, providers=providers)
    placed: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(node.name or node.op_type for node in part.get_nodes())
    return placed


if __name__ == "__main__":
    main()
