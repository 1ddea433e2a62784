"""A checkpoint that does not fit its config: one clear line, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError

Weights = dict[str, np.ndarray]
Change = Callable[[Weights], Any]

EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def compile_changed(tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path) -> Callable[..., Path]:
    """Compile a tiny checkpoint whose weights, config or generation config were changed before."""

    def run(
        change: Change = lambda _: None,
        *,
        recipe: str = "int4",
        generation: dict[str, Any] | None = None,
        tied: bool = True,
        **config: Any,
    ) -> Path:
        folder = tiny_llama_dir(tied=tied)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        out = tmp_path / "results" / "out"
        build.write(build.plan(open_checkpoint(str(folder)), Recipe.parse(recipe)), out)
        return out

    return run


def set_item(name: str, index: tuple[int, int], value: float) -> Change:
    def change(weights: Weights) -> None:
        weights[name][index] = value

    return change


def replace(name: str, array: np.ndarray) -> Change:
    return lambda weights: weights.update({name: array})


WRONG: dict[str, tuple[Change, dict[str, Any], str]] = {
    "missing tensor": (lambda w: w.pop(DOWN), {}, f"tensor {DOWN} is missing"),
    "missing head": (
        lambda w: w.pop("lm_head.weight"),
        {"tied": False},
        "tensor lm_head.weight is missing",
    ),
    "extra bias": (
        replace("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32)),
        {},
        "q_proj.bias",
    ),
    "one layer too many": (lambda _: None, {"num_hidden_layers": 1}, "model.layers.1"),
    "one layer too few": (lambda _: None, {"num_hidden_layers": 3}, "model.layers.2"),
    "transposed": (lambda w: w.update({DOWN: w[DOWN].T.copy()}), {}, DOWN),
    "other width": (lambda _: None, {"intermediate_size": 96}, "mlp.gate_proj"),
    "other vocabulary": (lambda _: None, {"vocab_size": 400}, EMBEDDING),
    "unknown family": (lambda _: None, {"model_type": "gpt_neo"}, "'gpt_neo'"),
    "no family": (lambda _: None, {"model_type": None}, "None"),
    "eos outside": (lambda _: None, {"eos_token_id": 320}, "320"),
    "one eos of several outside": (lambda _: None, {"eos_token_id": [257, -1]}, "-1"),
    "eos a word": (lambda _: None, {"eos_token_id": "</s>"}, "</s>"),
    "no eos": (lambda _: None, {"eos_token_id": None}, "eos_token_id"),
    "eos of the generation config outside": (
        lambda _: None,
        {"generation": {"eos_token_id": [257, 999]}},
        "999",
    ),
    "not a number": (set_item(DOWN, (3, 5), np.nan), {}, DOWN),
    "infinite": (set_item(EMBEDDING, (319, 31), -np.inf), {"recipe": "int8"}, EMBEDDING),
    "not a number, kept float": (set_item(DOWN, (3, 5), np.nan), {"recipe": "none"}, DOWN),
    "not a number, w8a8": (set_item(DOWN, (3, 5), np.nan), {"recipe": "w8a8"}, DOWN),
}


@pytest.mark.parametrize(("change", "options", "what"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_one_clear_line_and_nothing_is_written(
    change: Change,
    options: dict[str, Any],
    what: str,
    compile_changed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(DsoptError) as caught:
        compile_changed(change, **options)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "results").glob("**/*"))


def test_frequencies_stored_beside_the_weights_are_left_alone(compile_changed: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert open_artifact(compile_changed(replace(name, np.ones(8, np.float32))))


def test_a_head_stored_although_tied_is_not_used(compile_changed: Callable[..., Path]) -> None:
    """transformers ties whatever the file holds."""
    out = compile_changed(replace("lm_head.weight", np.full((320, 32), 7, np.float32)), recipe="none")
    data = (out / "model.onnx.data").read_bytes()
    assert np.full(32, 7, np.float32).tobytes() not in data


def test_the_manifest_says_what_was_made(compile_changed: Callable[..., Path]) -> None:
    out = compile_changed(recipe="int4,head=int8,down=w8a8", generation={"eos_token_id": [257, 3]})
    manifest = open_artifact(out).manifest
    assert (manifest.recipe, manifest.family, manifest.target) == ("int4,head=int8,down=w8a8", "llama", "cpu")
    assert (manifest.bos, manifest.eos) == (256, (257, 3))
    formats = {(node["role"], node["layer"]): node["format"] for node in manifest.nodes}
    assert formats["q", 0] == formats["up", 1] == "int4"
    assert (formats["down", 1], formats["head", None]) == ("w8a8", "int8")
    assert manifest.model["parameters"] == 320 * 32 + 32 + 2 * (2 * 32 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)
    assert set(manifest.files) == {path.name for path in out.iterdir()} - {"dsopt.json"}
    assert {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "genai_config.json",
        "chat_template.jinja",
    } <= set(manifest.files)
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [257, 3]
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (256, 256)


def test_the_same_checkpoint_gives_the_same_bytes(
    plan_tiny: Callable[..., Any], tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source, kinds = tiny_llama_dir(), ("model.onnx", "model.onnx.data")
    made = []
    for name in ("one", "two"):
        build.write(plan_tiny("int4-zp", source=source), tmp_path / name)
        made.append([(tmp_path / name / kind).read_bytes() for kind in kinds])
    assert made[0] == made[1]


def test_bfloat16_weights_are_widened_exactly(
    plan_tiny: Callable[..., Any], tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama_dir(dtype="BF16")
    build.write(plan_tiny("none", source=source), tmp_path / "out")
    weight = load_file(source / "model.safetensors")[DOWN]
    assert weight.dtype == ml_dtypes.bfloat16
    assert weight.astype(np.float32).tobytes() in (tmp_path / "out" / "model.onnx.data").read_bytes()
