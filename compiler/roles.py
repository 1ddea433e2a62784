"""Which linear layer plays which part, proved on the graph and checked against the names.

Passes ask for roles instead of matching names, so that a graph that is not what its names say is an error here and not
a wrong rewrite there. Names are those of Hugging Face's decoders (`q_proj` ... `down_proj`, `lm_head`).
"""

import re
from dataclasses import dataclass

import onnx_ir as ir

from dsopt.runtime.errors import DsoptError

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "head")
GATES = ("Sigmoid", "Gelu")  # what makes a gate of its projection
GROUPS = {"qkv": ("q", "k", "v"), "attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
HEAD_NORM = ("Reshape", "RMSNormalization", "Reshape")
_CAP = ("Mul", "Tanh", "Mul")  # between head and logits, where those are capped


@dataclass(frozen=True)
class Linear:
    """y = x W^T: a FusedMatMul whose second input is the weight, float32 [N, K] as in the checkpoint.

    The k of a layer without v makes its values too.
    """

    node: ir.Node
    role: str
    layer: int | None  # None for the head

    @property
    def weight(self) -> ir.Value:
        weight = self.node.inputs[1]
        assert weight is not None
        return weight

    @property
    def name(self) -> str:
        """The checkpoint's name of the module: `model.layers.3.mlp.down_proj`."""
        return (self.weight.name or "").removesuffix(".weight")

    @property
    def size(self) -> tuple[int, int]:
        """(N, K)."""
        assert self.weight.shape is not None
        n, k = self.weight.shape
        return int(n), int(k)  # type: ignore[arg-type]


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Every linear layer of a float graph in order. Raises DsoptError where a part cannot be proved, or has a bias."""
    linears = []
    for node in graph:
        if node.op_type == "FusedMatMul":
            weight = node.inputs[1]
            assert weight is not None
            _check_no_bias(node, weight.name)
            linears.append(Linear(node, _role(node), _layer(weight.name or "")))
    return linears


def _check_no_bias(node: ir.Node, name: str | None) -> None:
    """Smoothing, rotation, pruning, packing and the prices of a search all take y to be x W^T and nothing more."""
    for use in node.outputs[0].uses():
        others = (value for value in use.node.inputs if value is not None and value is not node.outputs[0])
        if use.node.op_type == "Add" and any(value.is_initializer() for value in others):
            raise DsoptError(f"{name} is followed by a bias; linear layers with a bias are not supported")


def _layer(name: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _role(node: ir.Node) -> str:
    role = _proved(node)
    weight = node.inputs[1]
    assert weight is not None
    names = {"head": "lm_head", None: ""}
    if role is None or (names.get(role, f"{role}_proj") not in (weight.name or "") and not _is_tied(weight, role)):
        raise DsoptError(f"cannot tell the part that {weight.name} plays in the graph (proved: {role})")
    return role


def _is_tied(weight: ir.Value, role: str) -> bool:
    return role == "head" and any(use.node.op_type == "Gather" for use in weight.uses())


def _proved(node: ir.Node) -> str | None:
    """The role by topology alone."""
    output, source = node.outputs[0], node.inputs[0]
    if _is_logits(output):
        return "head"
    if attended := _attended(output):
        return {(0,): "q", (1,): "k", (1, 2): "k", (2,): "v"}.get(tuple(sorted(attended)))
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "GroupQueryAttention":
        return "o"
    if any(use.node.op_type in GATES for use in output.uses()):
        return "gate"
    if producer is not None and producer.op_type == "Mul":
        return "down"
    if all(use.node.op_type == "Mul" for use in output.uses()):
        return "up"
    return None


def _is_logits(value: ir.Value) -> bool:
    for op in _CAP:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op:
            break
        value = uses[0].node.outputs[0]
    return value.is_graph_output()


def _attended(value: ir.Value) -> set[int]:
    """As which inputs of attention (0 query, 1 key, 2 value) it is read: straight, or through a norm by heads."""
    found = set()
    for use in value.uses():
        for op in HEAD_NORM:
            following = list(use.node.outputs[0].uses())
            if use.node.op_type != op or use.idx != 0 or len(following) != 1:
                break
            use = following[0]
        if use.node.op_type == "GroupQueryAttention" and use.idx < 3:
            found.add(use.idx)
    return found
