"""A search over what pruning left: what is studied is what the graph computes, and the loss is that of both."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search_tiny import made_up
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsopt.compiler import build
from dsopt.compiler import study as studying
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.compress import compress
from dsopt.compiler.corpus import HELD
from dsopt.compiler.goal import Goal
from dsopt.compiler.judge import Judge
from dsopt.compiler.outcome import preview
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.pruned import Pruned, prune
from dsopt.compiler.pruning.spelling import joined
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.reference import Reference
from dsopt.compiler.stream import BlockStream
from dsopt.compiler.study import Study, study
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir
from dsopt.runtime.quality import Comparison, session_scorer
from dsopt.runtime.session import Session

RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 256, (24, 32))
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
         "max_position_embeddings": 64}  # fmt: skip
WORDS = (
    "Every morning the ferry carries letters, bread and newspapers over to the island; whoever waits at the landing "
    "knows the captain by name. In winter nothing moves for days; then people read what they have read before.\n"
)
OTHER = "Ελλάδα while (++counter < maximum) { values[counter] = function(pointer); } return self.__init__;\n"


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS * 3, OTHER * 5], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


@pytest.fixture
def pruned(tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path) -> Callable[..., Pruned]:
    def make(text: str, **options: Any) -> Pruned:
        if "vocab" in text:
            (tmp_path / "english").write_text(WORDS)
            text = text.replace("vocab", f"vocab={tmp_path / 'english'}")
            tokenizer = trained()
            ends = [tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")]
            options |= {
                "tokenizer": tokenizer,
                "vocab_size": tokenizer.get_vocab_size() + 3,
                "bos_token_id": ends[0],
                "eos_token_id": ends[1],
            }
        checkpoint = open_checkpoint(str(tiny_llama_dir(**{**SHAPE, **options})))
        return prune(checkpoint, Recipe.parse("none"), Pruning.parse(text), "cpu", lambda _: TEXT[:-HELD])

    return make


def stream_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    stream = BlockStream(checkpoint)
    with torch.inference_mode():
        return np.asarray(stream.head()(stream.run(ids[None]))[0])


@pytest.mark.parametrize("text", ["layers=1", "blocks=3", "ffn=30%", "kv=1", "layers=1,blocks=1,ffn=20%,kv=1,vocab"])
def test_what_is_calibrated_is_what_the_graph_will_be(text: str, pruned: Callable[..., Pruned], tmp_path: Path) -> None:
    made = pruned(text)
    build.write(build.plan(made.whole, Recipe.parse("none"), made), tmp_path / "out")
    ids = RNG.integers(0, 200, 20)
    expected = session_scorer(Session(open_artifact(tmp_path / "out"), threads=1))(ids, len(ids))
    np.testing.assert_allclose(stream_logits(made.cut, ids), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(stream_logits(made.whole, ids)[:, : expected.shape[1]] - expected).max() > 1e-2


def test_key_value_groups_with_norms_of_heads(pruned: Callable[..., Pruned], tmp_path: Path) -> None:
    made = pruned("kv=1", model_type="qwen3")
    build.write(build.plan(made.whole, Recipe.parse("none"), made), tmp_path / "out")
    ids = RNG.integers(0, 200, 20)
    found = session_scorer(Session(open_artifact(tmp_path / "out"), threads=1))(ids, len(ids))
    np.testing.assert_allclose(found, stream_logits(made.cut, ids), atol=1e-4 * np.abs(found).max())


def test_values_can_be_rotated_in_what_is_left(pruned: Callable[..., Pruned], tmp_path: Path) -> None:
    made = pruned("ffn=20%,kv=1,blocks=1")
    outputs = frozenset(name.removesuffix(".weight") for name in made.cut.tensors if "o_proj" in name)
    build.write(build.plan(made.whole, Recipe.parse("none"), made, rotated=outputs), tmp_path / "out")
    ids = RNG.integers(0, 200, 20)
    found = session_scorer(Session(open_artifact(tmp_path / "out"), threads=1))(ids, len(ids))
    np.testing.assert_allclose(found, stream_logits(made.cut, ids), atol=1e-4 * np.abs(found).max())


def test_each_pruning_has_a_fingerprint_of_its_own(pruned: Callable[..., Pruned]) -> None:
    made = pruned("ffn=30%")
    other = dataclasses.replace(made.cuts, weights=dict(itertools.islice(made.cuts.weights.items(), 1)))
    cuts = [made.cut, dataclasses.replace(made, cuts=other).cut, made.whole]
    assert len({checkpoint.fingerprint for checkpoint in cuts}) == 3
    assert made.whole.fingerprint == made.whole.source.sha256 == made.cut.source.sha256


# --- a smaller vocabulary


def test_tokens_that_are_gone_are_said_in_pieces(pruned: Callable[..., Pruned]) -> None:
    made = pruned("vocab:320")
    assert made.spelling is not None
    whole, smaller = (Tokenizer.from_buffer(c.files["tokenizer.json"]) for c in (made.whole, made.checkpoint))
    for text in (WORDS, OTHER):
        ids = np.array(whole.encode(text, add_special_tokens=False).ids)
        pieces, ends = made.spelling.spell(ids)
        assert smaller.decode(pieces.tolist()) == text
        assert len(pieces) == ends[-1] > len(ids)
        assert smaller.decode(pieces[: ends[2]].tolist()) == whole.decode(ids[:3].tolist())
    assert made.spelling.windows(ids[None, :5]).shape == (1, 5)


def test_first_pieces_have_the_probability_of_all_that_begin_so() -> None:
    p = np.array([[0.5, 0.125, 0.25, 0.125]])
    np.testing.assert_allclose(np.exp(joined(np.log(p), np.array([0, 1, 0, 2]), 3)), [[0.75, 0.125, 0.125]])


def test_the_divergence_of_two_vocabularies(pruned: Callable[..., Pruned]) -> None:
    """As if every word of two tokens were asked for: -ln of its probability, piece after piece."""
    made = pruned("vocab:320")
    assert made.spelling is not None
    whole = Tokenizer.from_buffer(made.whole.files["tokenizer.json"])
    ids = np.array(whole.encode(WORDS[:60] + OTHER, add_special_tokens=False).ids)[None, :32]
    judge = Judge.of(BlockStream(made.whole), ids, made.spelling)
    (text,) = judge.texts()
    assert len(text) == ids.shape[1]
    new = stream_logits(made.cut, text)
    found = judge.compare([new])
    pieces, ends = made.spelling.spell(ids[0])
    told = range(ids.shape[1] // 4 + 1, int((ends <= len(text)).sum()))
    log_q = new - np.log(np.exp(new.astype(np.float64)).sum(1, keepdims=True))
    said = [-sum(log_q[k - 1, pieces[k]] for k in range(ends[t - 1], ends[t])) for t in told]
    logits = Reference(made.whole)(ids[0], ids.shape[1]).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    known = [-log_p[t - 1, ids[0, t]] for t in told]
    assert found["tokens"] == len(told)
    assert told.stop < ids.shape[1]
    assert max(np.diff(ends)[told.start : told.stop - 1]) > 1
    assert found["ln_ppl_ratio"] == pytest.approx(np.mean(said) - np.mean(known), rel=1e-4)
    # Where tokens are drawn from p, ln p - ln q of what is drawn has the divergence as its mean: here the first pieces'
    # part is that mean, the rest is of the text.
    beyond = [s + log_q[ends[t - 1] - 1, pieces[ends[t - 1]]] for s, t in zip(said, told, strict=True)]
    first = np.zeros((len(told), new.shape[1]))
    for row, t in enumerate(told):
        np.add.at(first[row], made.spelling.first, np.exp(log_p[t - 1]))
    kld = [(first[row] * (np.log(first[row]) - log_q[ends[t - 1] - 1])).sum() for row, t in enumerate(told)]
    shares = [np.log(first[row, pieces[ends[t - 1]]]) - log_p[t - 1, ids[0, t]] for row, t in enumerate(told)]
    assert found["kld_mean"] == pytest.approx(np.mean(kld) + np.mean(beyond) - np.mean(shares), rel=1e-4)


# --- the search


@pytest.fixture
def studied(pruned: Callable[..., Pruned], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Pruned, Study]]:
    monkeypatch.setattr(studying, "measure", made_up)

    def make(text: str, goal: Goal, *, allow_miss: bool = False) -> tuple[Pruned, Study]:
        made = pruned(text)
        return made, study(made.whole, TEXT, goal, pruned=made, allow_miss=allow_miss)

    return make


@pytest.mark.parametrize("text", ["layers=1", "ffn=10%,kv=1", "blocks=1"])
def test_both_stages_keep_the_budget_together(
    text: str, studied: Callable[..., tuple[Pruned, Study]], tmp_path: Path
) -> None:
    goal, lines = Goal(3.0), list[str]()
    made, found = studied(text, goal)
    manifest = compress(made.whole, found, goal, tmp_path / "out", "auto", report=lines.append)
    reference, score = Reference(made.whole), session_scorer(Session(open_artifact(tmp_path / "out")))
    comparison = Comparison()
    for ids in TEXT[-HELD:]:
        comparison.add(reference(ids, 32)[8:-1], score(ids, 32)[8:-1], ids[9:])
    assert manifest.search is not None
    assert manifest.quality is not None
    assert manifest.pruning is not None
    assert manifest.quality["kld_mean"] == pytest.approx(comparison.summary()["kld_mean"], rel=1e-3)
    taken = manifest.search["pruned"]
    (chosen,) = (r for r in manifest.search["rounds"] if r["chosen"])
    # Formats of 8 bits cost so little beside it that chance may make them a gain.
    assert 0 < taken < 1.005 * chosen["measured"]
    assert chosen["measured"] <= goal.loss
    assert chosen["measured"] == pytest.approx(manifest.quality["kld_mean"])
    assert chosen["loss"] > taken
    assert lines[0] == f"pruning took {taken:.4f} nats of the 3 nats allowed"
    assert manifest.pruning["text"] == text
    assert len({node["format"] for node in manifest.nodes}) > 1
    look = preview(found, goal)
    assert look["pruning"]["loss"] == taken
    assert look["first"]["loss"] > taken


def test_a_search_over_fewer_tokens(studied: Callable[..., tuple[Pruned, Study]], tmp_path: Path) -> None:
    goal = Goal(5.0)
    made, found = studied("vocab", goal)
    manifest = compress(made.whole, found, goal, tmp_path / "out", "auto")
    assert manifest.search is not None
    assert manifest.quality is not None
    assert manifest.model["vocab_size"] < made.whole.config["vocab_size"]
    assert manifest.quality["kld_mean"] > manifest.search["pruned"] > 0


def test_pruning_that_takes_it_all(
    pruned: Callable[..., Pruned], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(studying, "measure", made_up)
    goal, made = Goal(0.001), pruned("layers=1")
    with pytest.raises(DsoptError, match=r"--prune alone loses .* --max-quality-loss allows 0.001") as caught:
        study(made.whole, TEXT, goal, pruned=made)
    assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "compare", lambda *_: {"ln_ppl_ratio": np.log(1.0346)})
        with pytest.raises(DsoptError, match=r"--prune alone loses 3\.46 % of perplexity, .* allows 2 %;"):
            study(made.whole, TEXT, Goal.parse("2%", None, "chat"), pruned=made)
    assert not (cache_dir() / "statistics").exists()  # said before anything is learnt of what is left
    found = study(made.whole, TEXT, goal, pruned=made, allow_miss=True)
    nearly_all = dataclasses.replace(found, lost={goal.quantity: 0.95 * goal.loss})
    assert nearly_all.left(goal).loss == pytest.approx(0.05 * goal.loss)  # not a little more than there is
    assert found.left(goal).loss > 0
    with pytest.raises(DsoptError, match=r"is \d.* nats, more than 0.001"):
        compress(made.whole, found, goal, tmp_path / "out", "auto")
    manifest = compress(made.whole, found, goal, tmp_path / "out", "auto", allow_miss=True)
    assert manifest.search is not None
    assert manifest.search["pruned"] > goal.loss
