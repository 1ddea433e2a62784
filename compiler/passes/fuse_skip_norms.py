"""s = x + y; n = RMSNormalization(s) -> n, s = SkipSimplifiedLayerNormalization(x, y): one pass over the residual."""

import onnx_ir as ir
from onnxscript.rewriter import pattern


class _AddThenNorm(pattern.RewriteRuleClassBase):
    def pattern(self, op, x, y, gamma):  # type: ignore[no-untyped-def]
        total = op.Add(x, y)
        return op.RMSNormalization(total, gamma, _allow_other_attributes=True, _outputs=["norm"]), total

    def rewrite(self, op, x, y, gamma, norm, **_):  # type: ignore[no-untyped-def]
        epsilon = norm.producer().attributes["epsilon"].as_float()
        normed, _mean, _deviation, total = op.SkipSimplifiedLayerNormalization(
            x, y, gamma, epsilon=epsilon, _domain="com.microsoft", _outputs=4
        )
        normed.producer().name = norm.producer().name.replace("/RMS", "/SkipRMS")
        return normed, total


class FuseSkipNorms(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = pattern.RewriteRuleSet([_AddThenNorm.rule()]).apply_to_model(model)
        return ir.passes.PassResult(model, modified=bool(count))
