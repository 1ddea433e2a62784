"""The speed of compiled models on a card, against transformers and against the memory's own speed.

    python tests/gpu/measure.py -o speed.json          all models and recipes
    python tests/gpu/measure.py --plan                 what would be measured, with the bytes of a step; needs no card
    python tests/gpu/measure.py --tiny --device cpu    the script itself, in a minute, where there is no card

    --models qwen3-8b --recipes "none,dtype=bf16"      a part of it; --models smollm2-135m first, to see that all works
    --seconds 540                                      no case is begun after that time; -o has what was done
    --kernels DIR                                      also time the kernels of each model's layers, into files that
                                                       `dsopt compile --target cuda --profile FILE` takes

One JSON object a row on stdout; progress and the bars, met or missed, on stderr. `roofline` is the time in which the
card copies as many bytes as a step must read (weights, head, the cache so far), by the time the step took: 1 is the
best there can be. Bandwidth is that of a large copy, reads and writes counted. ORT_FPA_INTB_GEMM=0 in the environment
turns CUTLASS's kernels for 4 and 8 bits off; the first row says which way it was. Weights are random and made as they
are read; an artifact stands in --scratch as long as it is measured (17 GB for 8 billion weights in bfloat16).

Needs what dsopt needs, onnxruntime-gpu, CUDA's libraries and transformers. Where no registry can be reached: make
wheels elsewhere (`pip wheel --no-deps -w wheels .`, `pip download --no-deps -d wheels onnxruntime-gpu onnx_ir gguf`),
bring them, and `pip install --no-deps --no-index wheels/*.whl`. torch brings CUDA's libraries, which are found there.
`python -m pytest -m cuda tests` beforehand tells whether the numbers of the graphs are right.
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).parent))

from peer import Peer
from shapes import SHAPES, random_checkpoint

from dsopt.compiler import build
from dsopt.compiler.chains import Body
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.profile import measure
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.sites import WEIGHT_ONLY
from dsopt.runtime.artifact import Artifact, Manifest, open_artifact
from dsopt.runtime.cuda import DeviceBinding, DeviceCache
from dsopt.runtime.devices import missing_provider
from dsopt.runtime.files import write_atomically
from dsopt.runtime.machine import cpu_name, gpu_name
from dsopt.runtime.session import Session

Row = dict[str, Any]
WIDTH = 8  # rows of the verify step


def main() -> int:
    options = _options()
    reason = missing_provider("CUDAExecutionProvider")
    if options.device == "cuda" and reason and not options.plan:
        print(f"measure: no card: {reason}; --plan or --tiny --device cpu tries the script", file=sys.stderr)
        return 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for row in _plan(options, Path(scratch)) if options.plan else _measure(options, Path(scratch)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:  # after each: whatever ends the run, what was measured stays
                write_atomically(options.out, (json.dumps(rows, indent=1) + "\n").encode())
    for line in _bars(rows):
        print(line, file=sys.stderr)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--models", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--recipes", default="none,dtype=bf16;none,dtype=fp16;int4,dtype=fp16;fp8,dtype=bf16",
                        help="by semicolons")  # fmt: skip
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--depth", default="0,4096")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few tokens, nothing compiled by torch")
    parser.add_argument("--plan", action="store_true", help="build the graphs and count bytes; run nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after that time")
    parser.add_argument("--kernels", type=Path, help="write the kernel times of each model to this directory")
    parser.add_argument("--scratch", type=Path, help="where checkpoints and artifacts are written for the time being")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.seconds
    if options.tiny:
        options.models, options.recipes = "tiny", "int4"
        options.batch, options.depth, options.prompt, options.tokens = "1,2", "0,24", 32, 4
    return options


def _measure(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    bandwidth = copy_bandwidth(options.device, (64 << 20) if options.tiny else (4 << 30))
    device = gpu_name() if options.device == "cuda" else cpu_name()
    yield {"what": "copy", "device": device, "bytes_per_second": bandwidth, "onnxruntime": ort.__version__,
           "torch": torch.__version__, "fpa_intb": os.environ.get("ORT_FPA_INTB_GEMM", "1")}  # fmt: skip
    for name in options.models.split(","):
        checkpoint = random_checkpoint(name, scratch / name)
        for number, recipe in enumerate(options.recipes.split(";")):
            if _is_late(options, f"{name} {recipe}"):
                continue
            artifact = _compile(checkpoint, recipe, scratch / "artifact")
            for captured in (16, 0):
                say(f"{name} {recipe} {'captured' if captured else 'plain'}")
                yield from _ours(options, name, artifact, captured, bandwidth)
            shutil.rmtree(artifact.directory)
            if number == 0 and not options.no_peer:  # beside the recipe that it is compared with
                say(f"{name} transformers")
                yield from _peers(options, name)
        if options.kernels and not _is_late(options, f"{name} kernels"):
            _time_kernels(options, name)


def _is_late(options: argparse.Namespace, what: str) -> bool:
    late = time.monotonic() > options.deadline
    if late:
        say(f"{what}: left out, --seconds are over")
    return late


def _plan(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """The graphs of all models and recipes, checked for the target; no weight is computed."""
    for name in options.models.split(","):
        checkpoint = random_checkpoint(name, scratch / name)
        for recipe in options.recipes.split(";"):
            made = build.plan(checkpoint, Recipe.parse(recipe), target="cuda")
            cases = {
                f"batch {batch} @ d{depth}": step_bytes(made.manifest, batch, depth + options.tokens // 2)
                for batch, depth in _cases(options)
            }
            yield {"what": "plan", "model": name, "recipe": made.manifest.recipe, "artifact_bytes": made.nbytes,
                   "step_bytes": cases}  # fmt: skip


def _time_kernels(options: argparse.Namespace, name: str) -> None:
    """Of each layer shape by format and rows, for a search on a machine without the card."""
    config = SHAPES[name]
    sizes = [config[key] for key in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")]
    (hidden, wide, head, vocab), heads = sizes, (config["num_attention_heads"], config["num_key_value_heads"])
    shapes = [(head * (heads[0] + 2 * heads[1]), hidden), (hidden, head * heads[0]), (2 * wide, hidden),
              (hidden, wide), (vocab, hidden)]  # fmt: skip
    target, dtypes = ("cpu", ("fp32",)) if options.device == "cpu" else ("cuda", ("fp16", "bf16"))
    for dtype in dtypes:
        say(f"{name} kernels {dtype}")
        rows = (1, 8) if options.tiny else (1, 4, 8, 128, 512)
        table = measure(shapes, rows, WEIGHT_ONLY if target == "cuda" else ("none", "int4"), target, dtype=dtype,
                        body=Body(hidden, wide, *heads, head), budget=1 if options.tiny else 20)  # fmt: skip
        options.kernels.mkdir(parents=True, exist_ok=True)
        data = json.dumps({"profile": table.to_json()}, indent=1).encode()
        write_atomically(options.kernels / f"{name}-{dtype}.json", data)


def copy_bandwidth(device: str, nbytes: int) -> float:
    """Bytes a second of a copy, read and written ones."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target, times = torch.empty_like(source), []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    del source, target
    _free(device)
    return 2 * nbytes / min(times)


def _free(device: str) -> None:
    """Give back what torch keeps: ONNX Runtime allocates beside it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _compile(checkpoint: Checkpoint, recipe: str, out: Path) -> Artifact:
    build.write(build.plan(checkpoint, Recipe.parse(recipe), target="cuda"), out)
    return open_artifact(out)


def _ours(options: argparse.Namespace, name: str, artifact: Artifact, captured: int, bandwidth: float) -> Iterator[Row]:
    session = Session(artifact, device=options.device, captured=captured)
    common = {"what": "dsopt", "model": name, "recipe": artifact.manifest.recipe, "captured": bool(captured)}
    prompt = measure_prompt(session, options.prompt)
    yield {**common, "test": f"pp{options.prompt}", "tokens_per_second": options.prompt / prompt}
    for batch, depth in _cases(options):
        if _is_late(options, f"batch {batch} at {depth}"):
            continue
        try:
            step = measure_steps(session, batch, depth, options.tokens)
        except Exception as error:  # out of memory, in words of onnxruntime's own: the other cases still count
            say(f"batch {batch} at {depth}: {str(error).splitlines()[0]}")
            continue
        reads = step_bytes(artifact.manifest, batch, depth + options.tokens // 2)
        yield {
            **common, "test": f"tg{options.tokens} @ d{depth}", "batch": batch,
            "tokens_per_second": batch / step, "ms": 1e3 * step, "roofline": reads / bandwidth / step,
        }  # fmt: skip
    one = measure_steps(session, 1, 64, options.tokens)
    wide = measure_steps(session, 1, 64, options.tokens, WIDTH)
    yield {**common, "test": f"verify {WIDTH}", "ms": 1e3 * wide, "steps": wide / one}
    del session
    gc.collect()


def _cases(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    numbers = ([int(n) for n in text.split(",")] for text in (options.batch, options.depth))
    return itertools.product(*numbers)


def _binding(session: Session, batch: int, positions: int) -> DeviceBinding:
    """On the CPU too: the code that a card would run, with the CPU as the device."""
    if session.device == "cpu":
        from dsopt.runtime.session import _cache_type

        cache = DeviceCache(session.layers, positions, _cache_type(session._session), "cpu", batch)
        return DeviceBinding(session._session, cache, session.vocab_size, "cpu", session._captured)
    binding = session.bind(session.new_cache(batch, positions))  # no more: doubling would cost memory
    assert isinstance(binding, DeviceBinding)
    return binding


def measure_prompt(session: Session, tokens: int) -> float:
    """Seconds of a prompt in chunks, the least of several."""
    binding, times = _binding(session, 1, tokens), []
    ids = np.random.default_rng(0).integers(0, 256, tokens)
    binding.cache.reserve(tokens)
    for _ in range(4):
        binding.cache.trim(0)
        start = time.perf_counter()
        for first in range(0, tokens, binding.chunk):
            binding.top(ids[first : first + binding.chunk], 1)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_steps(session: Session, batch: int, depth: int, tokens: int, width: int = 1) -> float:
    """Seconds of a greedy step of `width` rows behind `depth` cached tokens, the median over `tokens` steps."""
    binding = _binding(session, batch, depth + tokens + 4 * width)
    cache, random = binding.cache, np.random.default_rng(0)
    cache.reserve(depth + tokens + 4 * width)
    if depth:  # one call: with several sequences only a first prompt may have many rows
        ids = random.integers(0, 256, (batch, depth))
        chunk = binding.chunk if batch == 1 else depth
        for start in range(0, depth, chunk):
            binding.top(ids[:, start : start + chunk], 1)
    feed = random.integers(0, 256, (batch, width))
    times = []
    for index in range(tokens + 3):  # a run, the capture, a first replay
        start = time.perf_counter()
        picked = binding.top(feed, 1, width)
        times.append(time.perf_counter() - start)
        if width > 1:
            cache.trim(depth + index % max(tokens - width, 1))
        feed = np.array([row.tokens[0] for row in picked]).reshape(batch, width) % 256
    return statistics.median(times[3:])


def step_bytes(manifest: Manifest, batch: int, positions: int) -> int:
    """What a step must read: every linear layer's weights as stored, and the cache; of the embedding only rows."""
    weights = sum(int(node["bytes"]) for node in manifest.nodes if node["role"] != "embed")
    model = manifest.model
    cache = 2 * 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * positions * batch
    return weights + cache


def _peers(options: argparse.Namespace, name: str) -> Iterator[Row]:
    dtype = "fp32" if options.tiny and options.device == "cpu" else "bf16"
    peer = Peer(SHAPES[name], options.device, dtype, compiled=not options.tiny)
    common = {"what": "transformers", "model": name, "recipe": dtype, "captured": not options.tiny}
    yield {**common, "test": f"pp{options.prompt}", "tokens_per_second": options.prompt / peer.prompt(options.prompt)}
    for batch, depth in _cases(options):
        if _is_late(options, f"transformers, batch {batch} at {depth}"):
            continue
        try:
            step = peer.step(batch, depth, options.tokens)
        except torch.OutOfMemoryError:
            say(f"transformers, batch {batch} at {depth}: out of memory")
            continue
        yield {**common, "test": f"tg{options.tokens} @ d{depth}", "batch": batch,
               "tokens_per_second": batch / step, "ms": 1e3 * step}  # fmt: skip
    del peer
    torch.compiler.reset()  # its graphs hold memory too
    _free(options.device)


def _bars(rows: list[Row]) -> Iterator[str]:
    """What was hoped for of the largest model, and whether it came."""

    def find(model: str, **wanted: Any) -> Row | None:
        good = (row for row in rows if row.get("model") == model)
        return next((row for row in good if all(row.get(key) == value for key, value in wanted.items())), None)

    for model in sorted({str(row["model"]) for row in rows if "model" in row}):
        step = next((row["test"] for row in rows if str(row.get("test")).endswith("@ d0")), "")
        ours = {"what": "dsopt", "captured": True, "batch": 1, "test": step}
        plain, int4 = (find(model, **ours, recipe=recipe) for recipe in ("none,dtype=bf16", "int4,dtype=fp16"))
        peer = find(model, what="transformers", batch=1, test=step)
        verify = find(model, what="dsopt", captured=True, recipe="none,dtype=bf16", test=f"verify {WIDTH}")
        if plain:
            yield _bar(model, "bf16 decode, share of the roofline", plain["roofline"], 0.6)
        if plain and peer:
            yield _bar(model, "bf16 decode against torch.compile", peer["ms"] / plain["ms"], 1.0)
        if plain and int4:
            yield _bar(model, "int4 decode against bf16", plain["ms"] / int4["ms"], 2.0)
        if verify:
            yield _bar(model, f"a step of {WIDTH} rows, in steps (at most 1.15)", -verify["steps"], -1.15)


def _bar(model: str, what: str, value: float, wanted: float) -> str:
    return f"{'met   ' if value >= wanted else 'MISSED'} {model}: {what}: {abs(value):.2f} (bar {abs(wanted)})"


def say(line: str) -> None:
    print(f"measure: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
