"""Split(qkv) -> q, k, v; GQA(Norm(q), Norm(k), v) -> GQA(qkv, q_norm, k_norm): the norms of Qwen3 inside attention.

Of the CUDA provider's GroupQueryAttention only. Seven nodes a layer go, each of which a step of one token would start.
Each of the norms is over the values of one head, before the rotary embedding.
"""

import onnx_ir as ir

_Q_NORM, _K_NORM = 14, 15  # inputs of GroupQueryAttention


class FuseQkNorms(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        modified = [_fuse(model.graph, node) for node in attentions]
        return ir.passes.PassResult(model, modified=any(modified))


def _fuse(graph: ir.Graph, attention: ir.Node) -> bool:
    chains = [_norm_chain(value) for value in attention.inputs[:2]]
    value = attention.inputs[2]
    split = value.producer() if value is not None else None
    if split is None or split.op_type != "Split" or None in chains:
        return False
    (q, k) = (chain for chain in chains if chain is not None)
    if [q[0].inputs[0], k[0].inputs[0], value] != list(split.outputs):
        return False
    epsilon = {chain[1].attributes["epsilon"].as_float() for chain in (q, k)}
    if len(epsilon) != 1:
        return False
    attention.resize_inputs(_K_NORM + 1)
    for index, norm in ((_Q_NORM, q[1]), (_K_NORM, k[1])):
        attention.replace_input_with(index, norm.inputs[1])
    attention.attributes.add(ir.AttrFloat32("qk_norm_epsilon", epsilon.pop()))
    for index, source in enumerate((split.inputs[0], None, None)):
        attention.replace_input_with(index, source)
    shapes = [reshape.inputs[1].producer() for reshape in (q[0], q[2], k[0], k[2])]  # type: ignore[union-attr]
    graph.remove([*reversed(q), *reversed(k), split], safe=True)
    graph.remove([node for node in shapes if node is not None and not node.outputs[0].uses()], safe=True)
    return True


def _norm_chain(value: ir.Value | None) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """Reshape, RMSNormalization, Reshape: what makes `value` of a part of the packed projection."""
    nodes: list[ir.Node] = []
    for op in ("Reshape", "RMSNormalization", "Reshape"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op or len(node.outputs[0].uses()) != 1:
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes[2], nodes[1], nodes[0]
