"""GGUF tensors, config and header, on tiny files written by the gguf package."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.gguf import READABLE, GgufTensor
from dsopt.compiler.gguf_header import read_header
from dsopt.runtime.errors import DsoptError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 256
QUERY, KEY = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
Write = Callable[..., Path]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf.py does to the query and key rows of a Llama."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tiny_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width = HEADS * HEAD_DIM
    shapes = {
        "token_embd.weight": (300, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        QUERY: (width, HIDDEN),
        KEY: (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, 256),
    }
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(tensors, dtype, {"llama.rope.freq_base": 5.0, "key to leave out": None})` -> a GGUF file."""

    def make(
        tensors: dict[str, np.ndarray] | None = None,
        dtype: str = "F32",
        metadata: dict[str, Any] | None = None,
    ) -> Path:
        values = {
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.block_count": 1,
            "llama.feed_forward_length": 256,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.key_length": HEAD_DIM,
            "llama.attention.value_length": HEAD_DIM,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b", "<end>"],
            "tokenizer.ggml.token_type": [1, 1, 3],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 2,
            **(metadata or {}),
        }
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
        for key, value in values.items():
            add_value(writer, key, value)
        for name, weight in (tensors or tiny_tensors()).items():
            kind = GGMLQuantizationType["F32" if weight.ndim == 1 else dtype]
            writer.add_tensor(name, stored(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)


def stored(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Quantized by the gguf package; random blocks with small scales where it can only read."""
    try:
        return quantize(weight, kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        return np.random.default_rng(1).integers(
            0, 48, (*weight.shape[:-1], weight.shape[-1] // block * size), np.uint8
        )


def refusal(path: Path) -> str:
    with pytest.raises(DsoptError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("dtype", READABLE)
def test_every_type_is_dequantized_as_by_the_package(write: Write, dtype: str) -> None:
    path = write(dtype=dtype)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_down.weight"]
    expected = dequantize(theirs.data, theirs.tensor_type)
    tensor = open_checkpoint(str(path)).tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(tensor, GgufTensor)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, expected.shape, theirs.n_bytes)
    got = tensor.read()
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(tensor.read(3, 200), expected[3:200])
    np.testing.assert_array_equal(tensor.raw(3, 9), theirs.data[3:9].view(np.uint8))


@pytest.mark.parametrize("dtype", ["F32", "Q4_0"])
def test_query_and_key_rows_stand_in_halves_again(write: Write, dtype: str) -> None:
    original = tiny_tensors()
    turned = {QUERY: interleave(original[QUERY], HEADS), KEY: interleave(original[KEY], KV_HEADS)}
    tensors = open_checkpoint(str(write(original | turned, dtype))).tensors
    for name, projection in ((QUERY, "q_proj"), (KEY, "k_proj")):
        tensor = tensors[f"model.layers.0.self_attn.{projection}.weight"]
        assert isinstance(tensor, GgufTensor)
        raw = stored(original[name], GGMLQuantizationType[dtype])  # by rows, so order and packing commute
        expected = dequantize(raw, GGMLQuantizationType[dtype])
        np.testing.assert_array_equal(tensor.read(), expected)
        for start, stop in ((0, 1), (5, 9), (15, 17), (16, 32), (31, 32), (7, 7), (9, 3)):
            np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
            np.testing.assert_array_equal(tensor.raw(start, stop), raw[start:stop].view(np.uint8))


def test_config_is_translated(write: Write) -> None:
    checkpoint = open_checkpoint(str(write(metadata={"llama.rope.freq_base": 5e5})))
    config = dict(checkpoint.config)
    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 300,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    }
    assert (checkpoint.source.kind, checkpoint.source.name) == ("gguf", "tiny")
    assert json.loads(checkpoint.files["generation_config.json"]) == {"eos_token_id": 2}


def test_an_output_tensor_unties(write: Write) -> None:
    tensors = tiny_tensors() | {"output.weight": np.ones((300, HIDDEN), np.float32)}
    checkpoint = open_checkpoint(str(write(tensors)))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.tensors["lm_head.weight"].read(0, 1).sum() == HIDDEN


def test_a_count_per_layer_is_taken_when_all_are_equal(write: Write) -> None:
    path = write(metadata={"llama.attention.head_count_kv": [KV_HEADS] * 3})
    assert open_checkpoint(str(path)).config["num_key_value_heads"] == KV_HEADS
    assert "head_count_kv" in refusal(write(metadata={"llama.attention.head_count_kv": [1, 2]}))


def llama3_factors(factor: float, theta: float = 5e5) -> np.ndarray:
    """The divisors that convert_hf_to_gguf.py writes, wavelength by wavelength."""
    factors = []
    for index in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (index / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(write: Write, factor: float) -> None:
    tensors = tiny_tensors() | {"rope_freqs.weight": llama3_factors(factor)}
    checkpoint = open_checkpoint(str(write(tensors, metadata={"llama.rope.freq_base": 5e5})))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in checkpoint.tensors)


def test_other_scalings(write: Write) -> None:
    odd = llama3_factors(8.0)
    odd[2] += 0.01
    assert "rope_freqs" in refusal(write(tiny_tensors() | {"rope_freqs.weight": odd}))
    assert "yarn" in refusal(write(metadata={"llama.rope.scaling.type": "yarn"}))
    linear = write(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert open_checkpoint(str(linear)).config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "rwkv6"}, ["'rwkv6'", "supported: llama"]),
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"llama.block_count": None}, ["lack llama.block_count"]),
        ({"llama.block_count": "two"}, ["llama.block_count", "two", "int"]),
        ({"llama.rope.dimension_count": 8}, ["8 rotated"]),
        ({"split.count": 3}, ["llama-gguf-split --merge"]),
        ({"tokenizer.ggml.model": None}, ["tokenizer.ggml.model"]),
        ({"tokenizer.ggml.model": "t5"}, ["'t5'", "gpt2, llama"]),
        (
            {"tokenizer.ggml.tokens": [str(i) for i in range(301)], "tokenizer.ggml.token_type": [1] * 301},
            ["301"],
        ),
    ],
)
def test_what_is_not_supported_is_said(write: Write, metadata: dict[str, Any], words: list[str]) -> None:
    message = refusal(write(metadata=metadata))
    for word in words:
        assert word in message


def test_odd_tensors_are_refused(write: Write) -> None:
    assert "'blk.0.ssm_a.weight'" in refusal(
        write(tiny_tensors() | {"blk.0.ssm_a.weight": np.ones((2, 2), np.float32)})
    )
    assert "33 rows" in refusal(write(tiny_tensors() | {KEY: np.ones((33, HIDDEN), np.float32)}))
    without = {name: weight for name, weight in tiny_tensors().items() if name != "token_embd.weight"}
    assert "token_embd.weight" in refusal(write(without))
    assert "IQ4_NL" in refusal(write(dtype="IQ4_NL"))


def test_header_is_that_of_the_package(write: Write) -> None:
    path = write(metadata={"a.list": [1, -2], "a.float": 0.1, "a.text": "é", "a.texts": ["", "日"], "a.none": []})
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert dict(header.metadata) == fields
    theirs = [(t.name, tuple(t.shape[::-1]), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors]
    assert [(e.name, e.shape, e.dtype, e.offset, e.nbytes) for e in header.tensors.values()] == theirs


def test_cut_anywhere_is_one_line(write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    for length in [*range(0, 1200, 7), len(whole) - 4000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "GGUF" in refusal(path)


def test_a_flipped_byte_never_escapes(write: Write) -> None:
    """Any one damaged header byte gives a checkpoint or a DsoptError, and gives it soon."""
    path = write()
    whole = bytearray(path.read_bytes())
    for at in range(0, 1500, 5):
        damaged = whole.copy()
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(DsoptError):
            open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", "could not be read|not a readable"),
        (b"PK\x03\x04" + bytes(64), "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "cannot be right"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "cannot be right"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**50) + bytes(64), "cannot be right"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 3) + bytes(64), "array of arrays"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99) + bytes(64), "99"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 2**31) + bytes(64), "dimensions"),
        (
            b"GGUF" + struct.pack("<IQQQ1sI3QI", 3, 1, 0, 1, b"t", 3, 2**33, 2**33, 2, 0) + bytes(64),
            "cut short",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sI1QI", 3, 1, 0, 1, b"t", 1, 0, 0) + bytes(64), "empty"),
    ],
)
def test_absurd_headers(tmp_path: Path, start: bytes, words: str) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(start)
    with pytest.raises(DsoptError, match=words):
        open_checkpoint(str(path))
