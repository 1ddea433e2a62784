"""Buffers that stay on a device, and steps of fixed addresses: the code for a card, with the CPU as the device."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cuda_tiny import IDS, SIZES, SPLITS, device_binding, logits
from toy import Forced, Oracle

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.cuda import _narrow, _widen
from dsopt.runtime.decoder import decode
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Binding, Session
from dsopt.runtime.speculate import Speculation, speculate


@pytest.fixture(scope="module")
def session(compile_tiny: Callable[..., Path]) -> Session:
    """A graph for CUDA in float16, run by the CPU, which widens it."""
    return Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("captured", [16, 0])
def test_fixed_steps_compute_what_a_plain_binding_does(session: Session, split: list[int], captured: int) -> None:
    # In the same pieces: kernels for one row and for 60 may round otherwise, by up to 0.1 on a CPU with AVX2 only.
    wanted = logits(session.bind(session.new_cache()), split)
    np.testing.assert_allclose(logits(device_binding(session, captured), split), wanted, atol=0.01)


def test_rewinding_and_growing(session: Session) -> None:
    binding = device_binding(session)
    first = logits(binding, [40, 4, 4, 4, 4, 4])
    binding.cache.trim(44)
    np.testing.assert_array_equal(binding.run(IDS[44:48], 4), first[44:48])
    generation = binding.cache.generation
    binding.run(np.tile(IDS, 4))
    assert binding.cache.generation == generation + 1
    binding.cache.trim(44)
    np.testing.assert_allclose(binding.run(IDS[44:48], 4), first[44:48], atol=0.05)


def test_what_a_run_wrote_is_kept_in_parts(session: Session) -> None:
    binding, plain = device_binding(session), device_binding(session)
    wanted = logits(plain, [20, 4, 4])
    binding.run(IDS[:20])
    first = binding.run(IDS[20:24], 4, keep=1).copy()
    assert binding.cache.length == 21
    binding.cache.extend(3)
    np.testing.assert_array_equal(np.concatenate([first, binding.run(IDS[24:28], 4)]), wanted[20:])


def test_a_full_context_leaves_the_cache_as_it_was(session: Session) -> None:
    binding = device_binding(session)
    binding.run(IDS)
    with pytest.raises(DsoptError, match="the context is full"):
        binding.run(np.zeros(541, np.int64))
    assert binding.cache.length == 60


@pytest.mark.parametrize("count", [1, 2, 40, 64])
def test_candidates_are_the_largest_logits(session: Session, count: int) -> None:
    one, other = device_binding(session), device_binding(session)
    assert one.most_candidates == 64
    for width in (20, 4, 1):
        whole = other.run(IDS[:width], width)
        for row, found in zip(whole, one.top(IDS[:width], count, width), strict=True):
            np.testing.assert_array_equal(found.tokens, np.argsort(-row, kind="stable")[:count])
            np.testing.assert_array_equal(found.logits, row[found.tokens])


SAMPLINGS = {
    "greedy": Sampling(),
    "top-k": Sampling(temperature=0.9, top_k=40, seed=3),
    "all cuts": Sampling(temperature=1.3, top_k=64, top_p=0.8, min_p=0.02, seed=4),
    "one": Sampling(temperature=1.0, top_k=1, seed=5),
    "penalty off by its window": Sampling(temperature=0.9, top_k=7, repeat_penalty=1.5, repeat_last_n=0, seed=6),
}


def tokens(binding: Binding, sampling: Sampling, limit: int, end: frozenset[int] = frozenset()) -> list[int]:
    prompt = IDS[:9].tolist()
    return [s.token for s in decode(binding, prompt, choose=Sampler(sampling), limit=limit, end=end)]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_candidates_give_the_tokens_that_all_logits_give(
    session: Session, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = device_binding(session)
    whole.most_candidates = 0
    wanted = tokens(whole, SAMPLINGS[name], 30)
    binding = device_binding(session)
    monkeypatch.setattr(binding, "run", None)  # whoever wants all logits fails
    assert tokens(binding, SAMPLINGS[name], 30) == wanted
    if name == "greedy":
        assert (
            tokens(device_binding(session), Sampling(), 30, frozenset(wanted[5:6]))
            == (wanted[: wanted.index(wanted[5]) + 1])
        )
    binding = device_binding(session)
    assert tokens(binding, SAMPLINGS[name], 0) == []
    assert binding.cache.length == 9


@pytest.mark.parametrize("name", ["greedy", "top-k"])
def test_verification_needs_no_more_than_candidates(
    session: Session, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them where it is greedy: the lead tells near ties."""
    prompt, counts = IDS[:9].tolist(), set[int]()
    text = tokens(session.bind(session.new_cache()), SAMPLINGS[name], 24)

    def run(binding: Binding) -> tuple[list[int], int]:
        speculation = Speculation(Oracle([*prompt, *text], session.vocab_size, 1), Forced(1))
        steps = speculate(binding, prompt, speculation, sampler=Sampler(SAMPLINGS[name]), limit=24)
        return [step.token for step in steps], speculation.tally.near_ties

    whole = device_binding(session)
    whole.most_candidates = 0
    binding = device_binding(session)
    top = binding.top
    monkeypatch.setattr(binding, "run", None)
    monkeypatch.setattr(binding, "top", lambda ids, count, *rest: counts.add(count) or top(ids, count, *rest))
    made = run(binding)
    assert made == run(whole)
    assert made[0] == text
    assert counts == {2 if name == "greedy" else 40}


def test_a_device_takes_larger_chunks_of_a_prompt(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    binding = device_binding(session)
    advance = binding._advance
    monkeypatch.setattr(binding, "_advance", lambda ids, *rest: widths.append(len(ids)) or advance(ids, *rest))
    for sampling in (Sampling(), Sampling(temperature=1, seed=1)):
        binding.cache.trim(0)
        list(decode(binding, [1] * 400, choose=Sampler(sampling), limit=2))
    assert widths == [400, 1] * 2


def test_what_candidates_cannot_decide_gets_all_logits(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = device_binding(session)
    monkeypatch.setattr(binding, "top", None)
    for options in ({"seed": 1}, {"top_k": 65, "seed": 1}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert len(list(decode(binding, [1, 2], choose=Sampler(Sampling(temperature=1, **options)), limit=3))) == 3
    assert len(list(decode(binding, [1, 2], choose=Sampler(Sampling(repeat_penalty=1.1)), limit=3))) == 3
    steps = list(decode(binding, [1, 2], choose=Sampler(Sampling()), limit=3, top=2))
    assert all(len(step.top) == 2 for step in steps)


def test_a_saved_cache_comes_back(session: Session) -> None:
    binding = device_binding(session)
    logits(binding, [40])
    saved = binding.cache.valid()
    assert all(part.dtype == np.float32 for part in saved.values())
    other = device_binding(session)
    other.cache.restore(saved, 40)
    np.testing.assert_array_equal(other.run(IDS[40:44], 4), binding.run(IDS[40:44], 4))
    with pytest.raises(DsoptError, match="does not fit this model"):
        other.cache.restore({name: part[:, :, :8] for name, part in saved.items()}, 40)


def test_bfloat16_widens_and_narrows_exactly() -> None:
    bits = np.array([0x3F80, 0xC2F7, 0x0001, 0x7F7F], np.uint16)
    assert _widen(bits)[:2].tolist() == [1.0, -123.5]
    np.testing.assert_array_equal(_narrow(_widen(bits), np.uint16), bits)
