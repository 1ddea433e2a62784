"""Roles are proved on the graph and checked against the names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from conftest import CONFIG

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.export import export
from dsopt.compiler.models import llama
from dsopt.compiler.passes.normalize_linears import NormalizeLinears
from dsopt.compiler.passes.tie_embeddings import TieEmbeddings
from dsopt.compiler.roles import find_linears
from dsopt.runtime.errors import DsoptError

LAYER = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture
def clean(exported_once: None, tiny_llama_dir: Callable[..., Path]) -> Callable[..., ir.Model]:
    def make(*, tied: bool) -> ir.Model:
        config = open_checkpoint(str(tiny_llama_dir(f"tied-{tied}", tied=tied))).config
        model = build.export(llama.Model, llama.Config.from_dict(config))
        if tied:
            TieEmbeddings()(model)
        NormalizeLinears()(model)
        return model

    return make


@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_layer_has_its_role(tied: bool, clean: Callable[..., ir.Model]) -> None:
    linears = find_linears(clean(tied=tied).graph)
    assert sorted((linear.layer, linear.role) for linear in linears[:-1]) == sorted(
        (layer, role) for layer in range(2) for role in LAYER
    )
    head = linears[-1]
    assert (head.role, head.layer, head.size) == ("head", None, (320, 32))
    assert head.name == ("model.embed_tokens" if tied else "lm_head")
    sizes = {linear.role: linear.size for linear in linears}
    assert (sizes["q"], sizes["k"], sizes["o"]) == ((32, 32), (16, 32), (32, 32))
    assert (sizes["up"], sizes["down"]) == ((64, 32), (32, 64))


@pytest.mark.parametrize(
    "name", [*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]
)
def test_a_bias_is_refused(name: str, clean: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the graph of a family that has one: no rewrite carries it."""

    class Biased(llama.Model):
        def __init__(self, config: llama.Config) -> None:
            super().__init__(config)
            whole = name if name == "lm_head" else f"model.layers.0.{name}"
            before = self.get_submodule(whole)
            self.set_submodule(whole, torch.nn.Linear(before.in_features, before.out_features))  # type: ignore[arg-type]

    model = export(Biased, llama.Config.from_dict({**CONFIG, "num_hidden_layers": 1}))
    NormalizeLinears()(model)
    with pytest.raises(DsoptError, match=rf"{name}\.weight is followed by a bias"):
        find_linears(model.graph)


def linear(graph: ir.Graph, name: str) -> ir.Node:
    return next(one.node for one in find_linears(graph) if one.name == name)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("self_attn.q_proj", "self_attn.o_proj"),
        ("self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.up_proj", "mlp.down_proj"),
    ],
)
def test_weights_in_each_others_place_are_noticed(first: str, second: str, clean: Callable[..., ir.Model]) -> None:
    graph = clean(tied=False).graph
    one, other = (linear(graph, f"model.layers.1.{name}") for name in (first, second))
    weight, moved = one.inputs[1], other.inputs[1]
    one.replace_input_with(1, moved)
    other.replace_input_with(1, weight)
    with pytest.raises(DsoptError, match=r"model\.layers\.1"):
        find_linears(graph)


def rename(graph: ir.Graph) -> None:
    graph.initializers["model.layers.0.mlp.up_proj.weight"].name = "model.layers.0.mlp.mystery.weight"


def rename_head(graph: ir.Graph) -> None:
    graph.initializers["lm_head.weight"].name = "model.layers.0.mlp.up_proj_2.weight"


def square(graph: ir.Graph) -> None:
    """gate's activation gone: up and gate are alike, nobody can tell which is which."""
    sigmoid = next(node for node in graph if node.op_type == "Sigmoid")
    sigmoid.outputs[0].replace_all_uses_with(sigmoid.inputs[0])
    graph.remove(sigmoid, safe=True)


@pytest.mark.parametrize("doctor", [rename, rename_head, square])
def test_a_graph_that_is_not_what_it_seems_is_an_error(
    doctor: Callable[[ir.Graph], Any], clean: Callable[..., ir.Model]
) -> None:
    graph = clean(tied=False).graph
    doctor(graph)
    with pytest.raises(DsoptError, match="cannot tell the part") as caught:
        find_linears(graph)
    assert "\n" not in str(caught.value)
