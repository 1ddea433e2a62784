"""A vocabulary cut to a text: every text still encodes, text of kept tokens as before, and the logits are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.renumber import prune_vocabulary
from dsopt.compiler.pruning.token_rates import unseen_rates
from dsopt.compiler.pruning.vocabulary import choose_vocabulary, rank_tokens
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.reference import Reference
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session
from dsopt.runtime.tokenizer import Tokenizer

ENGLISH = (
    "The river runs past the old mill, and the children who play there know every stone of it. In spring the water is "
    "high; by autumn it whispers. Nobody remembers who built the bridge, but everybody crosses it twice a day.\n"
) * 3
CODE = (
    "def f(x):\n    return {k: v**2 for k, v in x.items() if k != 'self'}\n\tfor (int i = 0; i < n; ++i) a[i] += b;\n"
)
OTHERS = {"emoji": "😀👩‍🚀 ok 🇩🇪", "scripts": "Ελλάδα 漢字 ждать naïve", "control": "\x00\x07 \r\n\t  x", "code": CODE}


def trained(vocab_size: int = 600) -> tokenizers.Tokenizer:
    """A byte-level BPE that learnt English, code and Greek; its special tokens stand at both ends of the ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([ENGLISH, CODE * 5, "Ελλάδα " * 20], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    start = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    return tokenizer


@pytest.fixture
def checkpoint(tiny_llama_dir: Callable[..., Path]) -> Checkpoint:
    tokenizer = trained()
    size = tokenizer.get_vocab_size()
    start, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    folder = tiny_llama_dir(tokenizer=tokenizer, vocab_size=size + 5, bos_token_id=start, eos_token_id=end)
    generation = {"bos_token_id": start, "eos_token_id": [end, 0], "pad_token_id": end, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return open_checkpoint(str(folder))


@pytest.fixture
def pruned(checkpoint: Checkpoint) -> Checkpoint:
    return prune_vocabulary(checkpoint, choose_vocabulary(checkpoint.files["tokenizer.json"], ENGLISH, 384))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_bytes(checkpoint.files["tokenizer.json"], Path("tokenizer.json"))


def pieces(checkpoint: Checkpoint, text: str) -> list[bytes]:
    tokenizer = tokenizer_of(checkpoint)
    return [tokenizer.token_bytes(id) for id in tokenizer.encode(text)]


def test_the_vocabulary_is_smaller_and_whole_blocks(checkpoint: Checkpoint, pruned: Checkpoint) -> None:
    before, after = (int(c.config["vocab_size"]) for c in (checkpoint, pruned))
    assert before == 429
    assert after == 384
    assert tokenizer_of(pruned).vocab_size == after == pruned.tensors["model.embed_tokens.weight"].shape[0]


def test_the_text_itself_splits_as_before(checkpoint: Checkpoint, pruned: Checkpoint) -> None:
    assert pieces(pruned, ENGLISH) == pieces(checkpoint, ENGLISH)


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS.keys())
def test_any_text_comes_back(text: str, pruned: Checkpoint) -> None:
    assert b"".join(pieces(pruned, text)) == text.encode()
    tokenizer = tokenizer_of(pruned)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < int(pruned.config["vocab_size"])


def test_other_text_takes_more_tokens(checkpoint: Checkpoint, pruned: Checkpoint) -> None:
    assert len(pieces(pruned, CODE)) > len(pieces(checkpoint, CODE))


def test_special_tokens_have_new_ids_wherever_they_are_named(checkpoint: Checkpoint, pruned: Checkpoint) -> None:
    old, new = (tokenizers.Tokenizer.from_buffer(c.files["tokenizer.json"]) for c in (checkpoint, pruned))
    start, end = (new.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (start, end) != tuple(old.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (pruned.config["bos_token_id"], pruned.config["eos_token_id"]) == (start, end)
    generation = json.loads(pruned.files["generation_config.json"])
    assert generation == {"bos_token_id": start, "eos_token_id": [end, 0], "pad_token_id": end, "temperature": 0.5}
    assert new.encode("The river").ids[0] == start
    assert new.encode("a<|im_end|>b").ids[2] == end
    settings = {"added_tokens_decoder": {str(old.token_to_id("<|im_end|>")): {"content": "<|im_end|>"}}}
    files = {**checkpoint.files, "tokenizer_config.json": json.dumps(settings).encode()}
    vocabulary = choose_vocabulary(checkpoint.files["tokenizer.json"], ENGLISH, 384)
    again = prune_vocabulary(Checkpoint(checkpoint.source, checkpoint.config, checkpoint.tensors, files), vocabulary)
    assert list(json.loads(again.files["tokenizer_config.json"])["added_tokens_decoder"]) == [str(end)]


def test_a_wanted_size(checkpoint: Checkpoint) -> None:
    sizes = [len(choose_vocabulary(checkpoint.files["tokenizer.json"], "The river.", n).kept) for n in (1, 350)]
    assert sizes == [320, 384]


def test_a_size_below_the_texts_own_keeps_its_most_frequent_tokens(checkpoint: Checkpoint) -> None:
    """The river comes a hundred times, the bridge once: the river's token stays, the bridge's goes."""
    text = "The river. " * 100 + "the bridge whispers; nobody remembers, everybody crosses it"
    tokenizer = checkpoint.files["tokenizer.json"]
    least = rank_tokens(tokenizer, text).least
    kept = choose_vocabulary(tokenizer, text, least + 1)
    river, bridge = (tokenizer_of(checkpoint).encode(word) for word in (" river", " bridge"))
    assert (len(river), len(bridge)) == (1, 1)
    assert river[0] in kept.kept
    assert kept.record["tokens"] < least + 65
    whole = choose_vocabulary(tokenizer, text)
    assert bridge[0] in whole.kept
    assert whole.record["dropped_share"] <= kept.record["dropped_share"]


def test_other_text_of_the_language_is_thought_of(checkpoint: Checkpoint) -> None:
    """What is no word stays though the text has none of it; of words those of its script, and those learnt first."""
    text, tokenizer = "The river\n" * 2000, tokenizer_of(checkpoint)
    made = rank_tokens(checkpoint.files["tokenizer.json"], text, 0.5)
    order = [tokenizer.token_bytes(int(id)) for id in made.order]
    stays, whole, others = order[: made.least], order[made.least : made.whole], order[made.whole :]
    assert {b" =", b"):", b" ++", b"\n   "} <= {*stays}
    assert {b"The", b" river"} <= {*whole}
    assert {*others[-2:]} == {"Ελλάδα".encode(), " Ελλάδα".encode()}
    assert others.index(b" the") < others.index(b" children")
    alike = choose_vocabulary(checkpoint.files["tokenizer.json"], text).record["alike"]
    assert alike == rank_tokens(checkpoint.files["tokenizer.json"], text).take().record["tokens"]


def test_the_rate_of_what_one_half_lacks(checkpoint: Checkpoint) -> None:
    """Ids 10 and 11 are of one kind; each half has its own, 12 nobody has."""
    tokenizer = tokenizer_of(checkpoint)
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    rates = unseen_rates(tokenizer, [a, a, a, a, b, a, a, a], [a, b, c])
    # Half one lacks b and c and meets them once in four tokens; half two lacks c alone and never meets it.
    assert rates == {c: pytest.approx((1 / 4 / 2 + 0) / 2)}


def test_only_bpe_over_bytes(checkpoint: Checkpoint) -> None:
    spec = json.loads(checkpoint.files["tokenizer.json"])
    spec["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(DsoptError, match="WordLevel"):
        choose_vocabulary(json.dumps(spec).encode(), ENGLISH)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["none", "int8"])
def test_the_same_logits_for_what_is_left(
    recipe: str, tied: bool, exported_once: None, tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(ENGLISH)
    tokenizer = trained()
    start, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    folder = tiny_llama_dir(tokenizer=tokenizer, tied=tied, vocab_size=435, bos_token_id=start, eos_token_id=end)
    checkpoint = open_checkpoint(str(folder))

    def never(_: Checkpoint) -> Any:
        raise AssertionError("a vocabulary needs no calibration text")

    pruning = Pruning.parse(f"vocab={corpus}")
    build.write(build.plan(checkpoint, Recipe.parse(recipe), pruning, calibrate=never), tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    kept = choose_vocabulary(checkpoint.files["tokenizer.json"], ENGLISH).kept
    assert artifact.manifest.model["vocab_size"] == len(kept)
    assert artifact.manifest.eos == (int(np.searchsorted(kept, end)),)
    ids = np.asarray(Tokenizer.load(artifact.directory).encode(ENGLISH[:100]))
    expected = Reference(checkpoint)(kept[ids], len(ids))[:, kept]
    found = session_scorer(Session(artifact, threads=1))(ids, len(ids))
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
    assert error < {"none": 1e-5, "int8": 0.1}[recipe]
    assert artifact.manifest.pruning is not None
    (step,) = artifact.manifest.pruning["steps"]
    assert (step["kind"], step["tokens"]) == ("vocab", len(kept))
    assert 0 < step["freed"] < 1
