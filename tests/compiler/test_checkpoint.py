"""Hugging Face directories and hub ids: what is read exactly, and what is refused in one line."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.runtime.errors import DsoptError

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def refusal(model: object) -> str:
    with pytest.raises(DsoptError) as caught:
        open_checkpoint(str(model))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_torch_reads(tiny_llama_dir: Make, dtype: str, shards: int) -> None:
    folder = tiny_llama_dir(dtype=dtype, shards=shards, tied=False)
    expected: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    tensors = open_checkpoint(str(folder)).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        wanted = expected[name].float().numpy()
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, wanted.shape, dtype)
        assert tensor.nbytes == expected[name].nbytes
        got = tensor.read()
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(tensor.read(1, 7), wanted[1:7])
        np.testing.assert_array_equal(tensor.read(5), wanted[5:])
        assert tensor.read(3, 3).shape == (0, *wanted.shape[1:])


def test_rows_are_read_without_the_rest(tmp_path: Path, tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir()
    save_file({"big.weight": np.ones((4096, 4096), np.float16)}, folder / "model.safetensors")
    tensor = open_checkpoint(str(folder)).tensors["big.weight"]
    tracemalloc.start()
    assert tensor.read(100, 164).sum() == 64 * 4096
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # the tensor is 32 MB as stored


def test_files_and_source(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir("SmolThing-1B")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["hidden_size"] == 32
    assert set(checkpoint.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert b"im_start" in checkpoint.files["chat_template.jinja"]
    assert (checkpoint.source.kind, checkpoint.source.name) == ("huggingface", "SmolThing-1B")


def test_the_hash_follows_the_content_and_not_the_place(tiny_llama_dir: Make) -> None:
    def digest(*args: Any, **options: Any) -> str:
        return open_checkpoint(str(tiny_llama_dir(*args, **options))).source.sha256

    first = digest("a")
    assert digest("b") == first
    assert digest("c", seed=1) != first
    assert digest("d", rope_theta=5.0) != first


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", b"plain"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], b"d"),
        ([{"name": "tool", "template": "t"}], None),
        (None, None),
    ],
)
def test_template_of_the_tokenizer_config(tiny_llama_dir: Make, template: object, expected: bytes | None) -> None:
    folder = tiny_llama_dir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert open_checkpoint(str(folder)).files.get("chat_template.jinja") == expected


def test_template_file_wins(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir()
    (folder / "chat_template.jinja").write_text("own file")
    assert open_checkpoint(str(folder)).files["chat_template.jinja"] == b"own file"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, ["config.json"]),
        ("config.json", b"{", ["config.json", "JSON"]),
        ("config.json", b"[" * 100_000, ["config.json", "JSON"]),
        ("config.json", b"[1]", ["config.json", "list"]),
        ("config.json", b'{"quantization_config": {"quant_method": "gptq"}}', ["gptq", "original"]),
        ("tokenizer.json", None, ["tokenizer.json"]),
        ("tokenizer.json", b"\xff\xfe", ["tokenizer.json", "JSON"]),
        ("tokenizer_config.json", b'{"chat_template": 3}', ["chat_template", "int"]),
        ("chat_template.jinja", b"\xff", ["chat_template.jinja", "UTF-8"]),
        ("model.safetensors", None, ["no weights", "model.safetensors"]),
        ("model.safetensors", b"garbage!" * 9, ["model.safetensors", "damaged"]),
        ("model.safetensors", b"", ["model.safetensors", "damaged"]),
    ],
)
def test_a_bad_file_is_refused(tiny_llama_dir: Make, file: str, content: bytes | None, words: list[str]) -> None:
    folder = tiny_llama_dir()
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    message = refusal(folder)
    assert str(folder) in message
    for word in words:
        assert word in message


def test_only_sentencepiece_is_said(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "tokenizer.model" in refusal(folder)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tiny_llama_dir: Make, pickle: str) -> None:
    folder = tiny_llama_dir()
    (folder / "model.safetensors").rename(folder / pickle)
    message = refusal(folder)
    assert pickle in message
    assert "convert them to safetensors" in message


def test_a_cut_shard_is_refused(tiny_llama_dir: Make) -> None:
    shard = tiny_llama_dir(shards=2) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    message = refusal(shard.parent)
    assert shard.name in message
    assert "cut short" in message


def test_a_missing_shard_is_refused(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks the shard model-00002-of-00002.safetensors" in refusal(folder)


def test_a_tensor_that_is_not_in_its_shard_is_refused(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir(shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "lacks tensor model.extra.weight" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", "C:x", "a\\b", 3, None, ["x"]])
def test_an_index_stays_in_its_directory(tiny_llama_dir: Make, name: object) -> None:
    folder = tiny_llama_dir(shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"names the file {name!r}" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(tiny_llama_dir: Make, weight_map: object) -> None:
    folder = tiny_llama_dir(shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(folder)


def test_other_types_are_refused_as_weights_but_not_as_buffers(tiny_llama_dir: Make) -> None:
    folder = tiny_llama_dir()
    save_file({"model.position_ids": np.arange(4)}, folder / "model.safetensors")
    buffer = open_checkpoint(str(folder)).tensors["model.position_ids"]
    with pytest.raises(DsoptError, match=r"model\.position_ids is stored as I64"):
        buffer.read()
    save_file({"model.norm.weight": np.arange(4)}, folder / "model.safetensors")
    assert "model.norm.weight is stored as I64" in refusal(folder)


def test_what_is_no_model(tmp_path: Path, tiny_llama_dir: Make) -> None:
    for word in ("smollm2", ".gguf", "org/name"):
        assert word in refusal("nothing-here")
    assert "nothing-here" in refusal("nothing-here")
    assert "''" in refusal("")
    assert "name its directory" in refusal(tiny_llama_dir() / "model.safetensors")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "one.gguf").touch()
    assert "one.gguf" in refusal(tmp_path / "models")


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, tiny_llama_dir: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--Tiny-1B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in tiny_llama_dir(shards=2).iterdir():  # the hub's cache links into a folder of blobs
        (snapshot / file.name).symlink_to(file)
    checkpoint = open_checkpoint("someone/Tiny-1B")
    assert (checkpoint.source.kind, checkpoint.source.name) == ("huggingface", "Tiny-1B")
    assert checkpoint.tensors["model.norm.weight"].read().shape == (32,)


def test_a_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("someone/not-here")
    assert "someone/not-here" in message
    assert "go online" in message
