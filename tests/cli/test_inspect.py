"""dsopt inspect: checkpoints, GGUF files and artifacts, whole and damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dsopt.cli.main import app
from dsopt.runtime.errors import DsoptError

Run = Callable[..., Any]
SIZES = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 320,
    "context_length": 256,
}


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Run:
    """`inspect(path)`: the JSON it prints, also where it ends with an error."""

    def run(path: Path) -> Any:
        app(["inspect", str(path), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def test_a_checkpoint(inspect: Run, tiny_llama_dir: Callable[..., Path]) -> None:
    facts = inspect(tiny_llama_dir(dtype="BF16", shards=2, tied=False))
    assert SIZES.items() <= facts.items()
    assert (facts["kind"], facts["name"], facts["architecture"]) == ("huggingface", "tiny", "llama")
    assert (facts["supported"], facts["tied_embeddings"], facts["chat_template"]) == (True, False, True)
    assert facts["tokenizer"] == {"kind": "byte-level BPE", "tokens": 258}
    weights = 2 * 320 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    total = {"parameters": weights, "bytes": 2 * weights, "bits_per_weight": 16.0}
    assert total.items() <= facts.items()
    assert facts["types"] == [{"type": "BF16", "tensors": 21, **total}]


def test_a_checkpoint_of_an_unknown_family_is_described_too(inspect: Run, tiny_llama_dir: Callable[..., Path]) -> None:
    folder = tiny_llama_dir()
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "novel"}))
    facts = inspect(folder)
    assert (facts["architecture"], facts["supported"]) == ("novel", False)
    assert (facts["head_dim"], facts["kv_heads"]) == (16, 2)


def test_an_artifact(inspect: Run, compile_tiny: Callable[..., Path]) -> None:
    artifact = compile_tiny("int4,head=int8")
    facts = inspect(artifact)
    assert SIZES.items() <= facts.items()
    assert (facts["kind"], facts["recipe"], facts["target"]) == ("artifact", "int4,head=int8", "cpu")
    assert set(facts["files"].values()) == {"ok"}
    assert set(facts["files"]) == {path.name for path in artifact.iterdir()} - {"dsopt.json"}
    assert facts["tokenizer"]["tokens"] == 258
    linears = {row["role"]: row for row in facts["linears"]}
    assert list(linears) == ["q", "k", "v", "o", "gate", "up", "down", "head", "embed"]
    # 4 bits, and a float32 scale for 32 of them: 5 bits a weight
    assert linears["up"] == {
        "role": "up",
        "format": "int4",
        "tensors": 2,
        "parameters": 4096,
        "bytes": 2560,
        "bits_per_weight": 5.0,
    }
    assert (linears["head"]["format"], linears["head"]["bits_per_weight"]) == ("int8", 9.0)
    stored = sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert facts["bytes"] == stored == facts["other_bytes"] + sum(row["bytes"] for row in facts["linears"])


def test_measured_quality_is_shown(inspect: Run, tiny_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    manifest = json.loads((copy / "dsopt.json").read_text())
    (copy / "dsopt.json").write_text(json.dumps(manifest | {"quality": {"kld_mean": 0.0125}}))
    assert inspect(copy)["quality"] == {"kld_mean": 0.0125}


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_artifact(
    damage: str, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shutil.copytree(tiny_artifact, tmp_path / "copy") / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(data)
    with pytest.raises(DsoptError, match=r"model\.onnx\.data missing or changed"):
        app(["inspect", str(weights.parent)], standalone_mode=False)
    assert f"model.onnx.data {damage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not a dsopt manifest"), ('{"format": 99}', "artifact format 99")]
)
def test_a_damaged_manifest_is_one_line(inspect: Run, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "dsopt.json").write_text(content)
    with pytest.raises(DsoptError, match=words) as caught:
        inspect(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_one_line(inspect: Run, tiny_llama_dir: Callable[..., Path]) -> None:
    folder = tiny_llama_dir()
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DsoptError, match=r"tokenizer\.json is no tokenizer"):
        inspect(folder)


def test_what_is_no_model_is_one_line(inspect: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "absent"):
        with pytest.raises(DsoptError) as caught:
            inspect(path)
        assert "\n" not in str(caught.value)


def test_a_gguf_file_by_type(inspect: Run, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    facts = inspect(path)
    assert (facts["kind"], facts["name"], facts["architecture"]) == ("gguf", "tiny", "llama")
    assert {row["type"]: (row["tensors"], row["bits_per_weight"]) for row in facts["types"]} == {
        "Q8_0": (1, 8.5),
        "F32": (10, 32.0),
    }


def write_gguf(path: Path) -> None:
    """One layer of width 32; the embedding in Q8_0, the rest float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{index}>" for index in range(40)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 40)
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    table = gguf.quants.quantize(np.zeros((40, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", table, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_neither_torch_nor_onnx_is_imported(tiny_artifact: Path) -> None:
    """And the plain form, piped, is plain: no escape codes, one fact a line, aligned tables."""
    code = (
        "import sys\n"
        "from dsopt.cli.main import app\n"
        "for path in sys.argv[1:]: app(['inspect', path], standalone_mode=False)\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers'} & set(sys.modules)))\n"
    )
    paths = [str(tiny_artifact), str(tiny_artifact.parent / "checkpoint")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "kind             artifact" in lines
    assert "kind             huggingface" in lines
    assert "files            6, each with the hash it was written with" in lines
    header = lines.index("role   format  tensors  parameters  bytes  bits_per_weight")
    assert lines[header + 1] == "q      none          2        2048   8192             32.0"
