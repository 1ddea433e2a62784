"""Rewrites of the graph, one per file, named verb_object. The order is this list."""

from collections.abc import Sequence

import onnx_ir as ir

from dsopt.compiler.cache_reach import Reach
from dsopt.compiler.passes.emit_candidates import EmitCandidates
from dsopt.compiler.passes.fuse_qk_norms import FuseQkNorms
from dsopt.compiler.passes.fuse_skip_norms import FuseSkipNorms
from dsopt.compiler.passes.lower_precision import LowerPrecision
from dsopt.compiler.passes.normalize_linears import NormalizeLinears
from dsopt.compiler.passes.pack_projections import PackProjections
from dsopt.compiler.passes.prepare_rows import PrepareRows
from dsopt.compiler.passes.quantize_cache import QuantizeCache
from dsopt.compiler.passes.quantize_embedding import QuantizeEmbedding
from dsopt.compiler.passes.quantize_linears import Evidence, QuantizeLinears
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.targets import TARGETS, Target

CLEAN: list[ir.passes.InPlacePass] = [NormalizeLinears()]
FUSE: list[ir.passes.InPlacePass] = [PackProjections(), FuseSkipNorms(), PrepareRows()]


def pipeline(
    recipe: Recipe,
    target: Target = TARGETS["cpu"],
    evidence: Evidence | None = None,
    reach: Sequence[Reach] | None = None,
) -> list[ir.passes.InPlacePass]:
    """clean -> quantize -> fuse -> lower, and the target's own. Roles are found on the clean graph; fusion hides them.
    `reach` is that of each layer's keys and values, for a cache in int8.

    `CheckKernels` looks at the result.
    """
    passes = [*CLEAN, QuantizeLinears(recipe, evidence), QuantizeEmbedding(recipe), *FUSE]
    if target.fuses_qk_norms:
        passes.append(FuseQkNorms())
    if recipe.dtype != "fp32":
        passes.append(LowerPrecision(recipe.dtype))
    if recipe.cache != "float":
        passes.append(QuantizeCache(reach))
    if target.device != "cpu":
        passes.append(EmitCandidates())
    return passes
