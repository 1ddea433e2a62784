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
        "linear layers with a bias are not supported: model.layers.0.self_attn.q_proj.bias",
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


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' record of the peak")
def test_the_weights_never_stand_in_memory_together(
    plan_tiny: Callable[..., Any], tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """50 million weights, 200 MB as float32; the largest tensor has 13."""
    source = write_large(tmp_path / "large", (tiny_llama_dir() / "tokenizer.json").read_bytes())
    for recipe in ("none", "int8"):
        plan = plan_tiny(recipe, source=source)
        forget_peak()
        before = resident("VmRSS")
        build.write(plan, tmp_path / recipe)
        assert resident("VmHWM") - before < 80e6
    assert (tmp_path / "none" / "model.onnx.data").stat().st_size > 190e6


def write_large(folder: Path, tokenizer: bytes) -> Path:
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 1024, "intermediate_size": 2816,
              "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
              "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    norm = (1024,)
    layer = {"input_layernorm": norm, "post_attention_layernorm": norm, "self_attn.q_proj": (1024, 1024),
             "self_attn.k_proj": (512, 1024), "self_attn.v_proj": (512, 1024), "self_attn.o_proj": (1024, 1024),
             "mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816)}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (320, 1024), "model.norm": norm}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    row = np.random.default_rng(0).normal(0, 0.05, 4096).astype(ml_dtypes.bfloat16)
    weights = {f"{name}.weight": np.resize(row, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_broken_tokenizer_is_said_before_anything_is_written(
    tiny_llama_dir: Callable[..., Path],
) -> None:
    source = tiny_llama_dir("mute")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(DsoptError, match="not a readable tokenizer"):
        build.plan(open_checkpoint(str(source)), Recipe.parse("none"))
