"""What pruning decides and the graph it makes; exact where something is redundant."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.pruning.decide import decide
from dsopt.compiler.pruning.obs import damped, eliminate, eliminate_units
from dsopt.compiler.pruning.options import Pruning, full_text
from dsopt.compiler.pruning.sensitivity import measure_sensitivity
from dsopt.compiler.pruning.stream import Stream, Sublayer
from dsopt.compiler.pruning.widths import Removal, allocate, group_sizes
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.reference import Reference
from dsopt.runtime.artifact import Artifact, open_artifact
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session

RNG = np.random.default_rng(0)
WINDOWS = list(RNG.integers(0, 258, (16, 64)))
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96}
IDS = RNG.integers(0, 258, 40)


@pytest.fixture
def prune(exported_once: None, tiny_llama_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Compile a pruned tiny Llama whose weights were changed before: (checkpoint, artifact)."""

    def run(
        text: str, change: Callable[[dict[str, np.ndarray]], Any] = lambda w: None, recipe: str = "none", **config: Any
    ) -> tuple[Checkpoint, Artifact]:
        folder = tiny_llama_dir(**{**WIDE, **config})
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        checkpoint = open_checkpoint(str(folder))
        plan = build.plan(checkpoint, Recipe.parse(recipe), Pruning.parse(text), calibrate=lambda _: WINDOWS)
        build.write(plan, tmp_path / "out")
        return checkpoint, open_artifact(tmp_path / "out")

    return run


def logits(artifact: Artifact) -> np.ndarray:
    return session_scorer(Session(artifact, threads=1))(IDS, len(IDS))


def off(checkpoint: Checkpoint, artifact: Artifact) -> float:
    """Largest difference from the checkpoint's logits, relative to the largest of those."""
    expected = Reference(checkpoint)(IDS, len(IDS))
    return float(np.abs(logits(artifact) - expected).max() / np.abs(expected).max())


def layers(weights: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [weights[f"model.layers.{layer}.{name}.weight"] for layer in range(WIDE["num_hidden_layers"])]


# --- options


def test_options_by_commas() -> None:
    pruning = Pruning.parse("ffn=12.5%, layers=2,blocks=3,kv=1")
    assert pruning == Pruning(ffn=0.125, layers=2, blocks=3, kv=1)
    assert pruning.text == "ffn=12.5%,layers=2,blocks=3,kv=1"
    assert full_text("int4", pruning) == "int4 prune ffn=12.5%,layers=2,blocks=3,kv=1"
    assert not Pruning.parse("none")
    assert full_text("int4", Pruning()) == "int4"


@pytest.mark.parametrize(
    "text", ["", "ffn", "ffn=", "ffn=10", "ffn=0.1", "ffn=95%", "ffn=-1%", "layers=x", "layers=-1", "layers=1.5",
             "heads=2", "layers=1,layers=2", "none,ffn=10%", "kv=²", "tokens=5", "vocab=f:x,vocab=g"],
)  # fmt: skip
def test_nonsense_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--prune: "):
        Pruning.parse(text)


@pytest.mark.parametrize("text", ["layers=3", "blocks=5", "kv=2", "layers=1,blocks=3"])
def test_more_than_there_is(text: str, prune: Callable[..., Any]) -> None:
    with pytest.raises(DsoptError, match="--prune"):
        prune(text)


def test_a_vocabulary_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    texts = []
    for content in ("one", "two"):
        path.write_text(content)
        texts.append(Pruning.parse(f"vocab={path}").text)
    assert texts[0].startswith("vocab=corpus.txt@")
    assert texts[0] != texts[1]
    assert Pruning.parse(f"vocab={path}:1000").tokens == 1000


# --- arithmetic


def test_eliminate_costs_are_those_of_least_squares() -> None:
    """The cost of each group against a refit of all that is left, in float64."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(500, 24, generator=generator, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    weight, square = torch.randn(2, 6, 24, generator=generator)[0].double(), torch.randn(6, 6, dtype=torch.float64)
    metric, gram = square @ square.T + torch.eye(6), h.T @ h / 500
    gone: list[int] = []
    total = 0.0
    for channels, cost in eliminate(gram, weight, metric, iter([4, 4, 8])):
        gone += channels.tolist()
        total += cost
        stay = [i for i in range(24) if i not in gone]
        damp = damped(gram)
        refit = weight @ damp[:, stay] @ torch.linalg.inv(damp[stay][:, stay])
        error = weight.clone()
        error[:, stay] -= refit
        expected = torch.trace(metric @ error @ damp @ error.T)
        assert total == pytest.approx(float(expected), rel=1e-6)
    assert sorted(gone) == sorted(set(gone))


def test_eliminate_units_finds_the_unit_that_others_replace() -> None:
    h = torch.randn(400, 12, dtype=torch.float64)
    h[:, 4:8] = h[:, :4] @ torch.randn(4, 4, dtype=torch.float64)
    gone, cost = eliminate_units(h.T @ h / 400, torch.randn(5, 12), torch.eye(5, dtype=torch.float64), 4, 1)
    assert gone.tolist() in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert cost < 1  # the damping; another unit would cost about 20


def test_widths_are_multiples_and_the_cheap_layer_gives_more() -> None:
    assert list(group_sizes(100)) == [4, 32, 32]
    assert list(group_sizes(32)) == []
    one, two = ([Removal(torch.arange(32), cost) for cost in costs] for costs in ((1, 2, 3), (0.1, 0.2, 2.5)))
    assert allocate({0: one, 1: two}, 96) == {0: 1, 1: 2}
    assert allocate({0: one, 1: two}, 15) == {0: 0, 1: 0}


def test_sensitivity_predicts_the_divergence(tiny_llama_dir: Callable[..., Path]) -> None:
    """Second-order theory against the divergence that small random errors of a sublayer's output make."""
    stream = Stream(open_checkpoint(str(tiny_llama_dir(num_hidden_layers=3))))
    x = stream.embed(list(RNG.integers(0, 258, (64, 32))))
    found, final = measure_sensitivity(stream, x)
    sublayer, head = Sublayer(1, True), stream.head()
    states = [x]
    for step in stream.sublayers:
        states.append(stream.advance(step, states[-1]))
    at = stream.sublayers.index(sublayer)
    size = states[at + 1].square().mean(-1, keepdim=True).sqrt()
    noise = 0.02 * size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    changed = states[at + 1] + noise
    for step in stream.sublayers[at + 1 :]:
        changed = stream.advance(step, changed)
    p, q = head(final).log_softmax(-1), head(changed).log_softmax(-1)
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    predicted = float(found[sublayer].metric.trace()) * 0.02**2 / 2
    assert predicted == pytest.approx(measured, rel=0.35)


# --- the pruned graph


def test_dead_channels_go_and_nothing_changes(prune: Callable[..., Any]) -> None:
    def kill(weights: dict[str, np.ndarray]) -> None:
        for down in layers(weights, "mlp.down_proj"):
            down[:, 5:69:2] = 0

    checkpoint, artifact = prune("ffn=33.4%", kill)
    widths = {node["layer"]: node["shape"][1] for node in artifact.manifest.nodes if node["role"] == "down"}
    assert widths == {0: 64, 1: 64, 2: 64}
    assert off(checkpoint, artifact) < 1e-5


def test_copied_channels_go_and_their_copies_take_over(prune: Callable[..., Any]) -> None:
    """Only the repair makes this exact: each of 32 channels of a layer has a double with another weight."""

    def double(weights: dict[str, np.ndarray]) -> None:
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            for rows in layers(weights, name):
                rows[64:] = rows[:32]

    checkpoint, artifact = prune("ffn=33.4%", double)
    assert {n["shape"][1] for n in artifact.manifest.nodes if n["role"] == "down"} == {64}
    assert off(checkpoint, artifact) < 2e-2


def test_a_layer_that_adds_nothing_goes(prune: Callable[..., Any]) -> None:
    def silence(weights: dict[str, np.ndarray]) -> None:
        weights["model.layers.1.self_attn.o_proj.weight"][:] = 0
        weights["model.layers.1.mlp.down_proj.weight"][:] = 0

    checkpoint, artifact = prune("layers=1", silence)
    manifest = artifact.manifest
    assert manifest.model["layers"] == 2
    assert manifest.pruning is not None
    assert [layer["layer"] for layer in manifest.pruning["layers"]] == [0, 2]
    assert manifest.pruning["steps"][0]["removed"] == [1]
    assert off(checkpoint, artifact) < 1e-5
    inputs = [value.name for value in onnx.load(artifact.graph, load_external_data=False).graph.input]
    assert [name for name in inputs if name.endswith("key")] == ["past_key_values.0.key", "past_key_values.1.key"]


def test_single_blocks_go_and_caches_stay_consecutive(prune: Callable[..., Any]) -> None:
    def silence(weights: dict[str, np.ndarray]) -> None:
        weights["model.layers.0.self_attn.o_proj.weight"][:] = 0
        weights["model.layers.1.mlp.down_proj.weight"][:] = 0

    checkpoint, artifact = prune("blocks=2", silence)
    operators = Counter(node.op_type for node in onnx.load(artifact.graph, load_external_data=False).graph.node)
    assert operators["GroupQueryAttention"] == operators["Sigmoid"] == artifact.manifest.model["layers"] == 2
    assert off(checkpoint, artifact) < 1e-5
    config = json.loads((artifact.directory / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 2


def test_a_group_whose_values_are_nothing_goes(prune: Callable[..., Any]) -> None:
    def silence(weights: dict[str, np.ndarray]) -> None:
        for layer, values in enumerate(layers(weights, "self_attn.v_proj")):
            values[16 * (layer % 2) :][:16] = 0

    checkpoint, artifact = prune("kv=1", silence)
    assert (artifact.manifest.model["heads"], artifact.manifest.model["kv_heads"]) == (2, 1)
    assert off(checkpoint, artifact) < 1e-5


def test_the_repair_lowers_the_divergence(tiny_llama_dir: Callable[..., Path]) -> None:
    cuts = decide(open_checkpoint(str(tiny_llama_dir(**WIDE))), Pruning.parse("layers=1"), WINDOWS)
    assert cuts.kld is not None
    assert cuts.kld < 0.95 * cuts.steps["layers"]["kld"]


def test_everything_at_once_and_quantized(prune: Callable[..., Any]) -> None:
    _, artifact = prune("ffn=30%,layers=1,blocks=1,kv=1", recipe="int4")
    manifest = artifact.manifest
    assert manifest.recipe == "int4 prune ffn=30%,layers=1,blocks=1,kv=1"
    assert manifest.pruning is not None
    assert [step["kind"] for step in manifest.pruning["steps"]] == ["layers", "blocks", "ffn", "kv"]
    assert all(0 < step["freed"] < 1 and step["kld"] > 0 for step in manifest.pruning["steps"])
    assert np.isfinite(logits(artifact)).all()
