"""dsopt compare on tiny models: a lossless one, lossy ones, and pairs that cannot be compared."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsopt.cli.main import app
from dsopt.runtime.errors import DsoptError, UsageError

Run = Callable[..., str]
WORDS = "What one model says of a text the other must say too: ünïcode, <|im_end|> as text, and 0123456789. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(WORDS * 3, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def compare(text: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`compare(base, new, ...)` in windows of 64 tokens: what it prints on stdout."""

    def run(base: Path, new: Path, *options: object) -> str:
        command = ["compare", str(base), str(new), "--text", str(text), "--ctx", "64", *map(str, options)]
        app(command, standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_a_lossless_artifact_agrees_with_its_checkpoint(compare: Run, tiny_artifact: Path) -> None:
    result = json.loads(compare(tiny_artifact.parent / "checkpoint", tiny_artifact, "-o", "json"))
    assert (result["chunks"], result["ctx"], result["tokens"]) == (4, 64, 4 * 32)
    assert result["scored"] == "tokens 32 to 63 of each, counted from 0"
    assert 0 <= result["kld_mean"] < 1e-9
    assert result["same_top_p"] == 100
    assert result["ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert result["ppl_base"] > 50  # a random model knows next to nothing


def test_four_bits_lose_more_than_eight(compare: Run, compile_tiny: Callable[..., Path]) -> None:
    eight, four = compile_tiny("int8"), compile_tiny("int4")
    base = eight.parent / "checkpoint"
    loss = {name: json.loads(compare(base, new, "-o", "json")) for name, new in (("int8", eight), ("int4", four))}
    assert 1e-7 < loss["int8"]["kld_mean"] < loss["int4"]["kld_mean"] / 10
    assert loss["int4"]["same_top_p"] < 100
    order = ["min", "p001", "p01", "p05", "p10", "p25", "median", "p75", "p90", "p95", "p99", "p999", "max"]
    for name in ("kld", "dp"):
        points = [loss["int4"][f"{name}_{point}"] for point in order]
        assert points == sorted(points)


def test_the_direction_matters_and_both_sides_take_both_kinds(compare: Run, compile_tiny: Callable[..., Path]) -> None:
    new = compile_tiny("int4")
    base = new.parent / "checkpoint"
    there, back = (json.loads(compare(*pair, "-o", "json")) for pair in ((base, new), (new, base)))
    assert there["ppl_base"] == pytest.approx(back["ppl_new"], rel=1e-9)
    assert there["ln_ppl_ratio"] == pytest.approx(-back["ln_ppl_ratio"], rel=1e-6)
    assert there["kld_mean"] != pytest.approx(back["kld_mean"], rel=1e-6)
    assert json.loads(compare(new, new, "-o", "json"))["kld_max"] == 0


def test_an_untied_bf16_checkpoint_is_its_own_reference(compare: Run, compile_tiny: Callable[..., Path]) -> None:
    new = compile_tiny("none", tied=False, dtype="BF16", shards=2)
    assert json.loads(compare(new.parent / "checkpoint", new, "-o", "json"))["kld_mean"] < 1e-9


def test_chunks_limit_the_work_and_markdown_says_what_was_scored(compare: Run, tiny_artifact: Path) -> None:
    lines = compare(tiny_artifact, tiny_artifact, "--chunks", 2).splitlines()
    assert lines[2].endswith("2 windows of 64 tokens")
    assert lines[3] == "scored: tokens 32 to 63 of each, counted from 0"
    table = {row.split("|")[1].strip(): row.split("|")[2:4] for row in lines[5:]}
    assert [cell.strip() for cell in table["tokens"]] == ["64", ""]
    assert [cell.strip() for cell in table["same_top_p"]] == ["100.000000 %", "0.000000 %"]
    assert [cell.strip() for cell in table["kld_p999"]] == ["0.000000", ""]


def test_what_cannot_be_compared_is_one_line(
    compare: Run, compile_tiny: Callable[..., Path], tiny_artifact: Path, tmp_path: Path
) -> None:
    larger = compile_tiny("none", vocab_size=336)
    (tmp_path / "latin1").write_bytes("für".encode("latin-1"))
    for new, options, words in (
        (larger, [], f"the vocabularies differ: {tiny_artifact} has 320 tokens, {larger} has 336"),
        (tiny_artifact, ["--ctx", 257], "--ctx is 257; "),
        (tiny_artifact, ["--ctx", 250, "--text", tmp_path / "latin1"], "is not UTF-8 text (byte 1)"),
        (tiny_artifact, ["--text", tmp_path / "none"], "could not be read"),
        (tiny_artifact, ["--chunks", 0], "--chunks is 0"),
        (tiny_artifact, ["--ctx", 3], "--ctx is 3"),
        (tmp_path / "nothing", [], "no model"),
    ):
        with pytest.raises(DsoptError) as caught:
            compare(tiny_artifact, new, *options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_threads_that_are_not_there(compare: Run, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsopt.compiler import reference

    monkeypatch.setattr(reference, "Reference", None)  # nothing is read
    checkpoint = tiny_artifact.parent / "checkpoint"
    for pair in ((checkpoint, checkpoint), (checkpoint, tiny_artifact)):
        with pytest.raises(UsageError, match="--threads is 99999; this machine has"):
            compare(*pair, "--threads", 99999)


def test_a_short_text_is_said(compare: Run, tiny_artifact: Path, text: Path) -> None:
    text.write_text("too short")
    with pytest.raises(DsoptError, match="has 9 tokens, less than one window of 64"):
        compare(tiny_artifact, tiny_artifact)


def test_another_tokenizer_is_noticed(compare: Run, tiny_artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in (tiny_artifact.parent / "checkpoint").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DsoptError, match="different tokens"):
        compare(other, tiny_artifact)


def test_a_reference_names_the_tensor_that_does_not_fit(tiny_llama_dir: Callable[..., Path]) -> None:
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.reference import Reference

    folder = tiny_llama_dir()
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"intermediate_size": 96}, "mlp.gate_proj"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DsoptError, match=words):
            Reference(open_checkpoint(str(folder)))


def test_a_reference_gives_the_rows_asked_for(tiny_llama_dir: Callable[..., Path]) -> None:
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.reference import Reference

    told: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    reference = Reference(checkpoint, lambda done, total: told.append((done, total)))
    ids = np.arange(20)
    assert reference(ids, 20).shape == (20, 320)
    np.testing.assert_array_equal(reference(ids, 3), reference(ids, 20)[-3:])
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_text_by_bytes_across_vocabularies(
    compare: Run, compile_tiny: Callable[..., Path], tiny_artifact: Path
) -> None:
    """The tokens are the same here, so the ratio must be that of a comparison by tokens, rows added or not."""
    larger = compile_tiny("none", vocab_size=336, seed=1)
    same = compile_tiny("none", seed=1)
    found = json.loads(compare(tiny_artifact, larger, "--bytes", "--chunks", 4, "-o", "json"))
    expected = json.loads(compare(tiny_artifact, same, "--chunks", 4, "-o", "json"))
    assert found["tokens_base"] == found["tokens_new"] == found["bytes"] == expected["tokens"]
    assert found["ppl_ratio"] != pytest.approx(1, abs=0.01)
    own = json.loads(compare(tiny_artifact, same, "--bytes", "--chunks", 4, "-o", "json"))
    assert own["ppl_ratio"] == pytest.approx(expected["ppl_ratio"], rel=1e-5)
    assert own["bits_per_byte_base"] == pytest.approx(np.log2(expected["ppl_base"]), rel=1e-5)
