"""Rewrites of the graph, one per file, named verb_object. The order is this list."""

import onnx_ir as ir

from dsopt.compiler.passes.fuse_skip_norms import FuseSkipNorms
from dsopt.compiler.passes.normalize_linears import NormalizeLinears
from dsopt.compiler.passes.pack_projections import PackProjections
from dsopt.compiler.passes.quantize_embedding import QuantizeEmbedding
from dsopt.compiler.passes.quantize_linears import Evidence, QuantizeLinears
from dsopt.compiler.recipe import Recipe

CLEAN = [NormalizeLinears()]
FUSE = [PackProjections(), FuseSkipNorms()]


def pipeline(recipe: Recipe, evidence: Evidence | None = None) -> list[ir.passes.InPlacePass]:
    """clean -> quantize -> fuse. Roles are found on the clean graph; fusion comes last, it hides them."""
    return [*CLEAN, QuantizeLinears(recipe, evidence), QuantizeEmbedding(recipe), *FUSE]
