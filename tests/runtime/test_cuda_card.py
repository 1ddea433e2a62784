"""Exact mode and numbers on a card. What needs a GPU is marked `cuda`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cuda_tiny import IDS, SIZES, SPLITS, device_binding, logits
from toy import Forced, Oracle

from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Session
from dsopt.runtime.speculate import Speculation, speculate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["int4", "none", "int8,dtype=bf16", "fp8,dtype=bf16"])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_exact_mode_has_one_text_with_any_drafter(
    compile_tiny: Callable[..., Path], device: str, recipe: str, width: int
) -> None:
    """Every run has the same rows: bit for bit the same text, whatever was drafted and rejected."""
    if device == "cpu" and "bf16" in recipe:
        pytest.skip("the CPU has no such kernels")
    loaded = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device=device)
    prompt = IDS[:9].tolist()

    def text(drafter: Oracle | None) -> list[int]:
        binding = device_binding(loaded) if device == "cpu" else loaded.bind(loaded.new_cache())
        speculation = Speculation(drafter, Forced(2, width - 1), widths=(width,))
        steps = speculate(binding, prompt, speculation, sampler=Sampler(Sampling()), limit=40)
        return [step.token for step in steps]

    wanted = text(None)
    for seed in range(3):
        assert text(Oracle([*prompt, *wanted], loaded.vocab_size, seed)) == wanted


@pytest.mark.cuda
class TestOnTheCard:
    """Needs a GPU: numbers against the float32 graph on the CPU, and graph replay against plain runs."""

    @pytest.fixture(scope="class")
    def reference(self, compile_tiny: Callable[..., Path]) -> np.ndarray:
        session = Session(open_artifact(compile_tiny("none", **SIZES)))
        return logits(session.bind(session.new_cache()), [60])

    @pytest.mark.parametrize("recipe", ["none", "none,dtype=bf16", "int4", "int8,dtype=bf16", "fp8,dtype=bf16"])
    def test_parity(self, compile_tiny: Callable[..., Path], recipe: str, reference: np.ndarray) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        words = recipe.split(",")
        if words[0] in ("int4", "int8"):  # the same codes on the CPU: what is compared is arithmetic
            plain = Session(open_artifact(compile_tiny(words[0], **SIZES)))
            reference = logits(plain.bind(plain.new_cache()), [60])
        tolerance = {"fp8": 1.5, "none": 0.05}.get(words[0], 0.15)  # fp8 is compared with unrounded weights
        if "bf16" in recipe and words[0] != "fp8":
            tolerance *= 4
        for split in SPLITS:
            np.testing.assert_allclose(
                logits(session.bind(session.new_cache()), split), reference, atol=tolerance, err_msg=str(split)
            )

    def test_norms_inside_attention(self, compile_tiny: Callable[..., Path]) -> None:
        qwen = {**SIZES, "model_type": "qwen3", "num_attention_heads": 4}
        plain = Session(open_artifact(compile_tiny("none", **qwen)))
        session = Session(open_artifact(compile_tiny("none", "cuda", **qwen)), device="cuda")
        wanted = logits(plain.bind(plain.new_cache()), [60])
        for split in SPLITS:
            np.testing.assert_allclose(logits(session.bind(session.new_cache()), split), wanted, atol=0.05)

    @pytest.mark.parametrize("recipe", ["none", "int4", "none,dtype=bf16"])
    def test_replay_is_the_plain_run(self, compile_tiny: Callable[..., Path], recipe: str) -> None:
        artifact = open_artifact(compile_tiny(recipe, "cuda", **SIZES))
        captured = Session(artifact, device="cuda")
        plain = Session(artifact, device="cuda", captured=0)
        for split in SPLITS:
            one = logits(captured.bind(captured.new_cache()), split)
            np.testing.assert_allclose(one, logits(plain.bind(plain.new_cache()), split), atol=0.05)

    def test_rewind_and_verify_widths(self, compile_tiny: Callable[..., Path]) -> None:
        session = Session(open_artifact(compile_tiny("none", "cuda", **SIZES)), device="cuda")
        binding = session.bind(session.new_cache())
        whole = logits(binding, [60])
        for width in (1, 2, 3, 5, 8, 16):
            for _ in range(3):  # run, capture, replay
                binding.cache.trim(40)
                np.testing.assert_allclose(binding.run(IDS[40 : 40 + width], width), whole[40 : 40 + width], atol=0.05)

    @pytest.mark.parametrize("width", [1, 2, 4, 5, 8, 16])
    @pytest.mark.parametrize("recipe", ["none", "none,dtype=bf16", "int4", "int8", "fp8,dtype=bf16", "int4,cache=int8"])
    def test_a_step_of_fixed_width_does_not_depend_on_its_neighbours(
        self, compile_tiny: Callable[..., Path], recipe: str, width: int
    ) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        binding = session.bind(session.new_cache())
        logits(binding, [40])
        first = []
        for fill in (0, 17, 250, 3):  # a run, its capture, replays
            binding.cache.trim(40)
            ids = np.full(width, fill)
            ids[0] = IDS[40]
            first.append(binding.run(ids, width)[0].copy())
        for other in first[1:]:
            np.testing.assert_array_equal(first[0], other)

    @pytest.mark.parametrize("count", [1, 2, 40, 64])
    def test_candidates(self, compile_tiny: Callable[..., Path], count: int) -> None:
        session = Session(open_artifact(compile_tiny("int4", "cuda", **SIZES)), device="cuda")
        whole, some = (session.bind(session.new_cache()) for _ in range(2))
        for width in (20, 4, 4, 4, 1, 1, 1):
            rows = whole.run(IDS[:width], width).copy()
            for row, found in zip(rows, some.top(IDS[:width], count, width), strict=True):
                np.testing.assert_array_equal(found.logits, np.sort(row)[::-1][:count])
                np.testing.assert_array_equal(row[found.tokens], found.logits)

    @pytest.mark.parametrize("recipe", ["none,cache=int8", "none,cache=fp8"])
    def test_a_cache_in_8_bits(self, compile_tiny: Callable[..., Path], recipe: str, reference: np.ndarray) -> None:
        session = Session(open_artifact(compile_tiny(recipe, "cuda", **SIZES)), device="cuda")
        for split in SPLITS:
            np.testing.assert_allclose(logits(session.bind(session.new_cache()), split), reference, atol=1.5)
