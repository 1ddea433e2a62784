"""Does every node have a kernel on the provider that the graph is for? The last look before weights are written."""

import onnx_ir as ir

from dsopt.compiler.kernels import format_of
from dsopt.compiler.passes.lower_precision import FLOATS
from dsopt.compiler.passes.prepare_rows import is_rotation
from dsopt.compiler.targets import Target
from dsopt.runtime.errors import DsoptError

_HINTS = {
    "AveragePool": ", which formats with -min need; int4-zp does without",  # CUDA's goes through cuDNN
    "DequantizeLinear": ", which an embedding in w8a8 needs; embed=int8 does without",
    "Gelu": " that was tried: gemma4 models run on the cpu alone so far",
}
_CACHES: dict[ir.DataType | None, str] = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT8: "int8"}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class CheckKernels(ir.passes.InPlacePass):
    """Changes nothing; raises DsoptError naming the first node that `target` cannot run."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in sorted(model.graph, key=lambda node: format_of(node) is None):  # a format says more than a MatMul
            self._check(node)
        return ir.passes.PassResult(model, modified=False)

    def _check(self, node: ir.Node) -> None:
        target, dtype = self.target, _float_type(node)
        form = format_of(node)
        if form is not None:
            if str(form) not in target.linears.get(dtype or "", ()):
                raise DsoptError(f"{node.name}: {target.name} has no kernel for {form} with {dtype} activations")
            return
        if node.op_type == "Constant":  # no kernel anywhere: it becomes an initializer at load
            return
        if node.op_type not in target.operators or (node.op_type == "MatMul" and not is_rotation(node)):
            hint = _HINTS.get(node.op_type, "")
            raise DsoptError(f"{node.name}: {target.name} has no kernel for {node.op_type}{hint}")
        allowed = target.operators[node.op_type]
        if dtype is not None and allowed and dtype not in allowed:
            raise DsoptError(f"{node.name}: {target.name} has no kernel for {node.op_type} in {dtype}")
        if node.op_type == "GroupQueryAttention":
            self._check_attention(node)

    def _check_attention(self, node: ir.Node) -> None:
        past = node.inputs[3]
        assert past is not None
        assert past.shape is not None
        cache = _CACHES.get(past.dtype, "float")
        if cache not in self.target.caches:
            raise DsoptError(f"{node.name}: {self.target.name} has no kernel for cache={cache}")
        if (width := int(past.shape[3])) > self.target.largest_head:  # type: ignore[arg-type]
            raise DsoptError(
                f"{node.name}: {self.target.name} attends with heads of at most {self.target.largest_head}, not {width}"
            )


def _float_type(node: ir.Node) -> str | None:
    """fp32, fp16 or bf16: of the node's first float input (a Cast's is what it reads)."""
    found = (_NAMES.get(value.dtype) for value in node.inputs if value is not None and value.dtype is not None)
    return next((name for name in found if name is not None), None)
