"""What a sweep keeps, against the whole model run at once; what an error is worth, against the divergence itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsopt.compiler import calibrate as calibrating
from dsopt.compiler.calibrate import FIRSTS, SAMPLE, InputStatistics, Statistics, calibrate, fingerprint
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.gptq import error_feedback, round_columns
from dsopt.compiler.reference import Reference
from dsopt.compiler.sensitivity import Observed, divergence, sink_weight, sweep_back
from dsopt.compiler.stream import BlockStream, observed
from dsopt.runtime.errors import DsoptError

HELD = 2
WINDOWS = np.random.default_rng(0).integers(0, 320, (SAMPLE + 3 + HELD, 24))
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


@pytest.fixture(params=["llama", "qwen3"])
def stream(request: pytest.FixtureRequest, tiny_llama_dir: Callable[..., Path]) -> BlockStream:
    return open_stream(tiny_llama_dir, model_type=request.param, num_attention_heads=4, num_key_value_heads=2)


def open_stream(tiny_llama_dir: Callable[..., Path], name: str = "tiny", **options: Any) -> BlockStream:
    return BlockStream(open_checkpoint(str(tiny_llama_dir(name, **options))))


def inputs_of(stream: BlockStream, windows: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of each linear layer [tokens, K] and the logits, of the whole model run at once."""
    model, seen = Reference(stream.checkpoint).model, dict[str, Tensor]()

    def keep(name: str, x: Tensor, _output: Tensor) -> None:
        seen[name] = x.flatten(0, -2)

    with observed(model, "", keep), torch.no_grad():
        logits, _ = model(torch.from_numpy(windows))
    return seen, logits


def test_statistics_are_those_of_the_whole_model(stream: BlockStream) -> None:
    found = calibrate(stream, WINDOWS, HELD)
    seen, _ = inputs_of(stream, WINDOWS[SAMPLE:-HELD])
    for module in [*MODULES, "lm_head"]:
        x, known = seen[module].double(), found.input(module)
        gram = x.T @ x / len(x)
        np.testing.assert_allclose(known.gram, gram, rtol=1e-3, atol=1e-5 * float(gram.abs().max()))
        np.testing.assert_allclose(known.absmax, x.abs().amax(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(known.mean, x.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(known.square, (x * x).mean(0), rtol=1e-3)


@pytest.mark.parametrize("begin", [7, None])
def test_first_tokens_are_run_alone(begin: int | None, tiny_llama_dir: Callable[..., Path]) -> None:
    stream = open_stream(tiny_llama_dir, bos_token_id=begin)
    found = calibrate(stream, WINDOWS, HELD)
    ids = WINDOWS[SAMPLE:-HELD].flatten()
    ids = ids[np.linspace(0, len(ids) - 1, FIRSTS).round().astype(int)]
    if begin is not None:
        ids[::4] = begin
    seen, _ = inputs_of(stream, ids[:, None])
    for module in MODULES:
        np.testing.assert_allclose(found.input(module).first, seen[module], rtol=1e-3, atol=1e-5)
    known = found.input(MODULES[0])
    expected = known.gram + 0.5 * seen[MODULES[0]].T @ seen[MODULES[0]] / FIRSTS
    np.testing.assert_allclose(known.weighted(0.5), expected, rtol=1e-3, atol=1e-5)
    assert known.weighted(0.0) is known.gram


def test_windows_that_are_priced_or_judged_on_are_run_and_not_counted(stream: BlockStream) -> None:
    found = calibrate(stream, WINDOWS, HELD)
    ids, hidden = found.held_out()
    np.testing.assert_array_equal(ids, WINDOWS[-HELD:])
    _, expected = inputs_of(stream, WINDOWS[-HELD:])
    with torch.no_grad():
        np.testing.assert_allclose(stream.head()(hidden), expected, rtol=1e-3, atol=1e-4)
    other = WINDOWS.copy()
    other[-HELD:], other[:SAMPLE] = WINDOWS[:HELD], WINDOWS[-SAMPLE:]  # what is judged on, and what is priced on
    again = calibrate(stream, other, HELD)
    assert again.directory != found.directory
    for module in ("model.layers.1.mlp.down_proj", "lm_head"):
        np.testing.assert_allclose(again.input(module).gram, found.input(module).gram, rtol=1e-5)
    # With one held of the same windows the statistics are others: the test above can fail.
    assert not torch.allclose(calibrate(stream, other, 1).input("lm_head").gram, found.input("lm_head").gram, rtol=1e-4)


class Killed(Exception):
    pass


def everything(found: Statistics) -> dict[str, Tensor]:
    parts = ("absmax", "mean", "gram", "first")
    made = {f"{m}.{part}": getattr(found.input(m), part) for m in MODULES for part in parts}
    return made | {f"hidden.{layer}": found.hidden(layer) for layer in range(found.depth + 1)}


@pytest.mark.parametrize("when", [1, 2, 3, 4, 5, 6])
def test_a_sweep_cut_short_goes_on(
    when: int, tiny_llama_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed at each of the times that a file is written."""
    stream = open_stream(tiny_llama_dir)
    keep, blocks = calibrating._keep, stream.block
    written: list[int] = []
    swept: list[int] = []

    def killed(directory: Path, layer: int, tensors: dict[str, Tensor]) -> None:
        written.append(layer)
        if len(written) == when:
            raise Killed
        keep(directory, layer, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "_keep", killed)
        with pytest.raises(Killed):
            calibrate(stream, WINDOWS, HELD)
    monkeypatch.setattr(stream, "block", lambda layer: swept.append(layer) or blocks(layer))
    resumed = everything(calibrate(stream, WINDOWS, HELD))
    assert swept == list(range(max(0, (when - 2) // 2), 2))  # a layer's own file is written after the next one's
    swept.clear()
    calibrate(stream, WINDOWS, HELD)
    assert not swept  # done once
    monkeypatch.setenv("DSOPT_CACHE", str(tmp_path / "fresh"))
    fresh = everything(calibrate(stream, WINDOWS, HELD))
    assert swept == [0, 1]
    for name, value in fresh.items():
        assert torch.equal(resumed[name], value), name


def test_the_fingerprint_is_of_text_and_weights(tiny_llama_dir: Callable[..., Path]) -> None:
    sources = [open_stream(tiny_llama_dir, f"seed-{seed}", seed=seed).checkpoint.source.sha256 for seed in (0, 1)]
    other = WINDOWS.copy()
    other[0, 0] += 1
    reshaped = WINDOWS.reshape(-1, 12)
    prints = {fingerprint(source, w, HELD) for source in sources for w in (WINDOWS, other, reshaped)}
    assert len(prints) == 6
    assert fingerprint(sources[0], WINDOWS, HELD + 1) not in prints
    assert fingerprint(sources[0], WINDOWS.astype(np.int32), HELD) in prints


def test_a_tensor_that_is_missing_is_named(tiny_llama_dir: Callable[..., Path]) -> None:
    stream = open_stream(tiny_llama_dir)
    del stream.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]  # type: ignore[attr-defined]
    with pytest.raises(DsoptError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        stream.block(1)


# --- what an error is worth


class Nudged(nn.Linear):
    """A linear layer whose outputs are off by a given amount."""

    def __init__(self, linear: nn.Linear, off: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.off = linear.weight, off

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.off


@pytest.mark.parametrize("module", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_the_price_of_an_error_is_the_divergence_that_it_makes(
    module: str, tiny_llama_dir: Callable[..., Path]
) -> None:
    stream = open_stream(tiny_llama_dir, vocab_size=320)
    windows = np.random.default_rng(1).integers(0, 320, (SAMPLE + 1 + HELD, 64))
    found = calibrate(stream, windows, HELD)
    seen: dict[str, Observed] = {}
    order: list[int] = []

    def keep(layer: int, linears: dict[str, Observed]) -> None:
        order.append(layer)
        seen.update(linears)

    sweep_back(stream, found.hidden, keep)
    assert order == [1, 0]
    assert set(seen) == set(MODULES)
    linear = seen[module]
    assert divergence([linear], [linear.y]) == 0
    np.testing.assert_allclose(linear.x @ linear.w.T, linear.y, atol=1e-4)

    model = Reference(stream.checkpoint).model
    ids = torch.from_numpy(windows[:SAMPLE])
    parent, _, leaf = module.rpartition(".")
    generator = torch.Generator().manual_seed(0)
    expected, actual = [], []
    with torch.no_grad():
        log_p = model(ids)[0].log_softmax(-1)
        original = model.get_submodule(module)
        for _ in range(12):
            off = 0.01 * linear.y.std() * torch.randn(linear.y.shape, generator=generator)
            setattr(model.get_submodule(parent), leaf, Nudged(original, off.reshape(SAMPLE, 64, -1)))
            log_q = model(ids)[0].log_softmax(-1)
            actual.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            expected.append(divergence([linear], [linear.y + off]))
    ratio = np.mean(expected) / np.mean(actual)
    assert 0.6 < ratio < 1.5
    assert divergence([linear], [linear.y + 2 * off]) == pytest.approx(4 * expected[-1], rel=1e-3)


def made_up(windows: int, tokens: int, width: int = 5, first: float = 1.0) -> tuple[Observed, Tensor]:
    """A layer with outputs of 0 whose first tokens are felt `first` times as much as others, and errors."""
    generator = torch.Generator().manual_seed(windows)
    g, d = (torch.randn(windows, tokens, width, generator=generator) for _ in range(2))
    g[:, 0] *= first
    nothing = torch.zeros(windows * tokens, width)
    return Observed(nothing, torch.eye(width), nothing, g.flatten(0, 1), windows), d.flatten(0, 1)


def test_an_error_that_all_tokens_look_at_is_not_cut_off() -> None:
    """One token in a window is among the worst hundredth, but what it costs is real."""
    windows, tokens = 4, 400
    one, d = made_up(windows, tokens, first=100)
    g, d3 = (x.unflatten(0, (windows, tokens)) for x in (one.g, d))
    pairs = np.mean([float(g[i, 0] @ d3[j, 0]) ** 2 for i in range(windows) for j in range(windows)])
    rest = (g[:, 1:] * d3[:, 1:]).sum(2).square().flatten()
    rest = rest.clamp_max(rest.quantile(0.99))
    expected = (windows * pairs + float(rest.sum())) / 2 / (windows * tokens)
    assert divergence([one], [d]) == pytest.approx(expected, rel=1e-4)
    assert expected > 5 * float(rest.mean()) / 2
    alone, off = made_up(3, 1)  # windows of a token
    assert divergence([alone], [off]) == pytest.approx(float((alone.g @ off.T).square().mean()) / 2, rel=1e-4)


def test_errors_of_layers_that_read_one_input_may_cancel() -> None:
    one, d = made_up(2, 50)
    assert divergence([one, one], [d, -d]) == pytest.approx(0, abs=1e-9)
    assert divergence([one, one], [d, d]) == pytest.approx(4 * divergence([one], [d]), rel=1e-4)


def test_what_first_tokens_are_worth() -> None:
    even, _ = made_up(64, 50)
    assert sink_weight([even]) == 0
    felt, _ = made_up(64, 50, first=5)
    assert sink_weight([felt]) == pytest.approx(24 / 50, rel=0.3)
    assert sink_weight([felt, even]) == pytest.approx(12 / 50, rel=0.3)
    assert sink_weight([made_up(64, 50, first=100)[0]]) == 1
    felt.g[-1] = torch.nan
    assert sink_weight([felt]) == 0
    deaf, _ = made_up(64, 50, first=0)
    assert sink_weight([deaf]) == 0
    assert sink_weight([made_up(64, 1)[0]]) == 0


def test_rounding_heeds_first_tokens() -> None:
    """Where they are felt, their outputs err less, and those of the others not much more."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 64, generator=generator), torch.randn(2000, 64, generator=generator)
    first = 3 * torch.randn(64, generator=generator) + 0.1 * torch.randn(FIRSTS, 64, generator=generator)
    known = InputStatistics(x.abs().amax(0), x.mean(0), x.T @ x / len(x), first)

    def errors(sink: float) -> tuple[float, float]:
        codes, steps = round_columns(w, error_feedback(known.weighted(sink), 32), 4)
        off = codes.float() * steps[:, None] - w
        return float((first @ off.T).square().mean()), float((x @ off.T).square().mean())

    (felt, others), (unfelt, least) = errors(1.0), errors(0.0)
    assert felt < 0.1 * unfelt
    assert others < 1.2 * least
