"""Shared by all tests: a cache of their own, tiny random Llama checkpoints, and the built-in model."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gpu.shapes import layer_shapes, outer_shapes
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dsopt.compiler import builtin
from dsopt.runtime.devices import missing_provider
from dsopt.runtime.files import cache_dir

USER_CACHE = cache_dir()

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("DSOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("DSOPT_MODEL", raising=False)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model, fetched once into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSOPT_CACHE", str(USER_CACHE))
        return builtin.fetch("smollm2")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test that draws from torch draws the same each time, whatever ran before it."""
    if (torch := sys.modules.get("torch")) is not None:  # tests that need none need not wait for it
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped, and say why, where ONNX Runtime cannot run on a GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = missing_provider("CUDAExecutionProvider") if marked else None
    for item in marked if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a Llama or a Qwen3, with Hugging Face's names."""
    rng = np.random.default_rng(seed)
    shapes = outer_shapes(config)
    for index in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, index)
    return {name: (rng.normal(0, 0.3, shape) + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()}


def byte_tokenizer() -> Tokenizer:
    """256 bytes, no merges, and the two marks of a chat turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


def write_tiny_llama(
    folder: Path,
    *,
    dtype: str = "F32",
    shards: int = 1,
    tied: bool = True,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Path:
    """A Hugging Face directory of a tiny random Llama; `config` overrides CONFIG (`model_type="qwen3"`)."""
    config = {**CONFIG, "tie_word_embeddings": tied, **config}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (tokenizer or byte_tokenizer()).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    kind: Any = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    save_shards(folder, {n: w.astype(kind) for n, w in tiny_weights(config, seed).items()}, shards)
    return folder


@pytest.fixture
def tiny_llama_dir(tmp_path: Path) -> Callable[..., Path]:
    """A factory of Hugging Face directories: `tiny_llama_dir(dtype="BF16", shards=2, tied=False)`."""

    def make(name: str = "tiny", **options: Any) -> Path:
        return write_tiny_llama(tmp_path / name, **options)

    return make


def save_shards(folder: Path, weights: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {}
    for index in range(shards):
        shard = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file({n: weights[n] for n in names[index::shards]}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[index::shards], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory, exported_once: None) -> Callable[..., Path]:
    """A factory of compiled tiny Llamas: `compile_tiny("int4", **options of write_tiny_llama)`."""

    def make(recipe: str = "none", target: str = "cpu", **options: Any) -> Path:
        from dsopt.compiler import build
        from dsopt.compiler.checkpoint import open_checkpoint
        from dsopt.compiler.recipe import Recipe

        folder = tmp_path_factory.mktemp("tiny")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DSOPT_CACHE", str(folder / "cache"))
            checkpoint = open_checkpoint(str(write_tiny_llama(folder / "checkpoint", **options)))
            build.write(build.plan(checkpoint, Recipe.parse(recipe), target=target), folder / "artifact")
        return folder / "artifact"

    return make


@pytest.fixture(scope="session")
def tiny_artifact(compile_tiny: Callable[..., Path]) -> Path:
    """A tiny Llama compiled without quantization. Only to be read."""
    return compile_tiny("none")


@pytest.fixture(scope="session")
def exported_once() -> Iterator[None]:
    """Trace each configuration once a session: a trace takes seconds, a clone of its graph none."""
    from dsopt.compiler import build
    from dsopt.compiler import export as exporting
    from dsopt.compiler.drafters import graphs

    export, made = build.export, {}
    trace = exporting.trace

    def retrace(module: Any, example: Any, named: int = 0) -> Any:
        key = repr((module, [(tensor.shape, tensor.dtype) for tensor, _ in example]))
        if key not in made:
            made[key] = trace(module, example, named)
        return made[key]

    def reuse(family: Any, config: Any, taps: Any = ()) -> Any:
        key = repr((family, dataclasses.replace(config, tie_word_embeddings=False), taps))  # tying comes afterwards
        if key not in made:
            made[key] = export(family, config, taps)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "export", reuse)
        patch.setattr(exporting, "trace", retrace)
        patch.setattr(graphs, "trace", retrace)
        yield


@pytest.fixture
def plan_tiny(tiny_llama_dir: Callable[..., Path], exported_once: None) -> Callable[..., Any]:
    """`plan_tiny("int4", source=None, target="cpu", tied=False, **config)`: for `source` or a new tiny checkpoint."""
    from dsopt.compiler import build
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.recipe import Recipe

    made = itertools.count()

    def plan(recipe: str = "none", source: Path | None = None, target: str = "cpu", **options: Any) -> Any:
        source = source or tiny_llama_dir(f"source-{next(made)}", **options)
        return build.plan(open_checkpoint(str(source)), Recipe.parse(recipe), target=target)

    return plan


@pytest.fixture
def build_tiny(plan_tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`build_tiny(recipe, **options)`: the artifact of such a plan, opened."""
    from dsopt.compiler import build
    from dsopt.runtime.artifact import open_artifact

    made = itertools.count()

    def write(recipe: str = "none", **options: Any) -> Any:
        out = tmp_path / f"artifact-{next(made)}"
        build.write(plan_tiny(recipe, **options), out)
        return open_artifact(out)

    return write


@pytest.fixture(scope="session")
def compile_pair(tmp_path_factory: pytest.TempPathFactory, exported_once: None) -> Callable[..., Any]:
    """`compile_pair("vanilla", "int8")`: a tiny target with the drafter of that name in `deepspec_tiny`.

    Has `target`, `drafter` and `artifact`, folders that are only to be read.
    """
    from deepspec_tiny import DRAFTERS, write_drafter

    from dsopt.compiler import build
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.drafters.checkpoint import open_drafter
    from dsopt.compiler.recipe import Recipe

    made: dict[Any, SimpleNamespace] = {}

    def make(name: str, recipe: str = "none", **options: Any) -> SimpleNamespace:
        key = (name, recipe, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            target = write_tiny_llama(folder / "target", **DRAFTERS[name][0], **options)
            drafter = write_drafter(folder / "drafter", target, DRAFTERS[name][1])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DSOPT_CACHE", str(folder / "cache"))
                plan = build.plan(open_checkpoint(str(target)), Recipe.parse(recipe), draft=open_drafter(str(drafter)))
                build.write(plan, folder / "artifact")
            made[key] = SimpleNamespace(target=target, drafter=drafter, artifact=folder / "artifact")
        return made[key]

    return make
