"""What `--prune auto:F` chooses between blocks and tokens, by given times and by this machine's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.pruning.auto import Times, choose
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.stream import Sublayer
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError, UsageError

WINDOWS = np.random.default_rng(0).integers(0, 258, (40, 64))
TIMES = Times(attention=1.0, mlp=2.0, row=0.0)
ENGLISH = "the river runs past the old mill, and nobody knows who built the bridge.\n"
CODE = "for (int i = 0; i < n; ++i) a[i] += b; return {k: v for k, v in x.items() if k != 'self'}\n"


@pytest.fixture
def checkpoint(tiny_llama_dir: Callable[..., Path]) -> Checkpoint:
    """Four layers; attention of layer 1 and the feed-forward of layer 2 add nothing."""
    folder = tiny_llama_dir(num_hidden_layers=4)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][:] = 0
    weights["model.layers.2.mlp.down_proj.weight"][:] = 0
    save_file(weights, folder / "model.safetensors")
    return open_checkpoint(str(folder))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(ENGLISH * 20)
    return path


def test_blocks_that_add_nothing_go_first(checkpoint: Checkpoint) -> None:
    lines: list[str] = []
    made = choose(checkpoint, Pruning.parse("auto:1.33"), TIMES, WINDOWS, lines.append)
    assert made.removed == {Sublayer(1, False), Sublayer(2, True)}
    assert made.steps["blocks"]["kld"] == pytest.approx(0, abs=1e-6)
    assert made.steps["blocks"]["time"] == pytest.approx(3 / 12)
    assert made.vocabulary is None
    assert sum("a per cent)" in line for line in lines) == 2


def learnt() -> tokenizers.Tokenizer:
    """A byte-level BPE of English and of code."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=448, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([ENGLISH, CODE * 5], trainer)
    return tokenizer


def test_tokens_go_instead_of_blocks_that_matter(tiny_llama_dir: Callable[..., Path], corpus: Path) -> None:
    """Each block adds much here, and the text needs no code."""
    tokenizer = learnt()
    size = tokenizer.get_vocab_size()
    checkpoint = open_checkpoint(str(tiny_llama_dir(tokenizer=tokenizer, vocab_size=size)))
    times = Times(attention=1.0, mlp=2.0, row=6 / size)  # blocks and head take as long
    made = choose(checkpoint, Pruning.parse(f"auto:1.02,vocab={corpus}"), times, WINDOWS)
    assert made.removed == frozenset()
    assert made.vocabulary is not None
    assert (size - len(made.vocabulary.kept)) * times.row >= 12 * (1 - 1 / 1.02)
    assert made.vocabulary.record["kld"] == pytest.approx(6 * made.vocabulary.record["dropped_share"])
    kept = set(made.vocabulary.kept.tolist())
    assert set(tokenizer.encode(ENGLISH).ids) <= kept


def test_more_speed_than_there_is_to_sell(checkpoint: Checkpoint) -> None:
    head_alone = Times(attention=0.01, mlp=0.01, row=1.0)
    with pytest.raises(DsoptError, match=r"^--prune auto:2: nothing that can go .* vocab=FILE$"):
        choose(checkpoint, Pruning.parse("auto:2"), head_alone, WINDOWS)


@pytest.mark.parametrize("text", ["auto", "auto:", "auto:1", "auto:9", "auto:15%", "auto:1.2,layers=1", "auto=1.2",
                                  "auto:1.2,vocab=f:100"])  # fmt: skip
def test_nonsense_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--prune"):
        Pruning.parse(text)


def test_an_artifact_by_this_machines_times(checkpoint: Checkpoint, exported_once: None, tmp_path: Path) -> None:
    """Whatever the kernels take: the idle blocks are the cheapest, and the manifest says what they bought."""
    plan = build.plan(checkpoint, Recipe.parse("int4"), Pruning.parse("auto:1.01"), calibrate=lambda _: WINDOWS)
    build.write(plan, tmp_path / "out")
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.recipe == "int4 prune auto:1.01"
    assert manifest.pruning is not None
    (step,) = manifest.pruning["steps"]
    assert step["removed"][0] in ("attention 1", "mlp 2")
    assert 0 < step["time"] < 1
    assert step["kld_per_percent"] == pytest.approx(step["kld"] / (100 * step["time"]))
