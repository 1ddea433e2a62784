"""onnxruntime-genai loads the artifacts unchanged and says the same. In an environment of its own:

python -m venv /tmp/genai && /tmp/genai/bin/pip install onnxruntime-genai==0.18.0
DSOPT_GENAI_PYTHON=/tmp/genai/bin/python python -m pytest -m peers
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_tiny import GEMMA
from safetensors.numpy import load_file, save_file

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import Artifact, open_artifact
from dsopt.runtime.decoder import decode
from dsopt.runtime.session import Session

PYTHON = os.environ.get("DSOPT_GENAI_PYTHON", "")
GENERATE = """
import json, sys
import numpy as np, onnxruntime_genai as og
directory, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(directory)
answers = []
for prompt in prompts:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)][len(prompt):])
print(json.dumps(answers))
"""
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON, reason="DSOPT_GENAI_PYTHON names no interpreter with onnxruntime-genai"),
]


def genai_answers(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    command = [PYTHON, "-c", GENERATE, str(directory), json.dumps(prompts), str(count)]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def our_answers(artifact: Artifact, prompts: list[list[int]], count: int) -> list[list[int]]:
    session = Session(artifact, threads=1)
    end = frozenset(artifact.manifest.eos)

    def greedy(logits: Any, _: Any) -> int:
        return int(logits.argmax())

    answers = []
    for prompt in prompts:
        binding = session.bind(session.new_cache())
        steps = decode(binding, prompt, choose=greedy, limit=count, end=end)
        answers.append([step.token for step in steps if step.token not in end])  # genai does not show it either
    return answers


def test_layers_with_caches_of_several_shapes(build_tiny: Callable[..., Artifact]) -> None:
    artifact = build_tiny("int8", **GEMMA)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 7, 30, 100)]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


# w8a8 for a head has one activation scale for all rows: genai computes the whole prompt's, dsopt the last one's.
@pytest.mark.parametrize("recipe", ["none", "int4", "int8", "int4-zp,head=int8", "w8a8,head=int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_greedy_tokens(recipe: str, tied: bool, build_tiny: Callable[..., Artifact]) -> None:
    artifact = build_tiny(recipe, tied=tied)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 2, 7, 30, 100)]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


@pytest.mark.parametrize("form", ["w8a8", "w8a8-rot", "w7a8-rot"])
def test_a_head_that_is_the_table(form: str, build_tiny: Callable[..., Artifact]) -> None:
    """After prompts of one token: of longer ones genai quantizes all rows of the head's inputs together."""
    artifact = build_tiny(f"int8,head={form}", tied=True)
    prompts = [[token] for token in np.random.default_rng(0).integers(0, 256, 5).tolist()]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


@pytest.mark.parametrize("recipe", ["none", "int8"])
def test_qwen3(recipe: str, build_tiny: Callable[..., Artifact]) -> None:
    artifact = build_tiny(recipe, model_type="qwen3", num_attention_heads=4, num_key_value_heads=2)
    prompts = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (1, 7, 30)]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


@pytest.mark.parametrize("drafter", ["vanilla", "dflash"])
def test_a_model_with_taps_and_a_drafter(drafter: str, compile_pair: Callable[..., Any]) -> None:
    """Of outputs that it does not know genai takes no notice, nor of a directory."""
    artifact = open_artifact(compile_pair(drafter).artifact)
    assert artifact.manifest.taps
    prompts = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (1, 7, 30)]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


@pytest.mark.parametrize("pruning", ["layers=1", "blocks=2", "kv=1", "ffn=34%,kv=1,layers=1", "vocab"])
def test_pruned_models(pruning: str, exported_once: None, tiny_llama_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Fewer caches, fewer heads, fewer tokens: all that genai is told of. Of `blocks` the best may be attentions."""
    rng = np.random.default_rng(0)
    folder = tiny_llama_dir(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    if pruning == "vocab":
        (tmp_path / "corpus.txt").write_text("Bytes only.")
        pruning = f"vocab={tmp_path / 'corpus.txt'}"
    if pruning == "blocks=2":
        weights = load_file(folder / "model.safetensors")
        for layer in (0, 2):
            weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:] = 0
        save_file(weights, folder / "model.safetensors")
    options = Pruning.parse(pruning)
    windows = list(rng.integers(0, 256, (16, 48)))
    plan = build.plan(open_checkpoint(str(folder)), Recipe.parse("none"), options, calibrate=lambda _: windows)
    build.write(plan, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    assert artifact.manifest.model["layers"] == {"layers=1": 3, "blocks=2": 2}.get(pruning, 3 if options.layers else 4)
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 7, 30)]
    assert genai_answers(artifact.directory, prompts, 24) == our_answers(artifact, prompts, 24)


def test_an_end_token_ends_both(build_tiny: Callable[..., Artifact]) -> None:
    prompt = [5, 6, 7]
    plain = our_answers(build_tiny("none"), [prompt], 12)[0]
    artifact = build_tiny("none", eos_token_id=[257, plain[3]])
    ours = our_answers(artifact, [prompt], 12)
    assert ours == [plain[: plain.index(plain[3])]]
    assert genai_answers(artifact.directory, [prompt], 12) == ours
