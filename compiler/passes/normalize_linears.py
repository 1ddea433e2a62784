"""MatMul(x, Transpose(W)) -> FusedMatMul(x, W, transB=1): weights stay [N, K] as in the checkpoint.

No transposed copy is written, and a head tied to the embedding reads the same bytes.
"""

import onnx_ir as ir
from onnxscript.rewriter import pattern

from dsopt.compiler.kernels import MICROSOFT


class _TransposedMatMul(pattern.RewriteRuleClassBase):
    def pattern(self, op, x, weight):  # type: ignore[no-untyped-def]
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]), _outputs=["product"])

    def check(self, context, x, weight, **_):  # type: ignore[no-untyped-def, override]
        return weight.is_initializer()

    def rewrite(self, op, x, weight, product, **_):  # type: ignore[no-untyped-def]
        fused = op.FusedMatMul(x, weight, transB=1, _domain=MICROSOFT)
        fused.producer().name = product.producer().name.replace("/MatMul", "/FusedMatMul")
        return fused


class NormalizeLinears(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = pattern.RewriteRuleSet([_TransposedMatMul.rule()]).apply_to_model(model)
        return ir.passes.PassResult(model, modified=bool(count))
