"""Exact mode: every run of generation has the same number of rows, so that each row is computed in the same way.

The kernels of a run are chosen by its shape, and rounding differs with them; at a near tie another token wins. Where
shapes never change and rows do not look at each other, a row's logits depend on its own tokens alone, whatever stands
beside it: drafted tokens, rejected ones, or none.
"""

from dsopt.runtime.artifact import Artifact
from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.errors import DsoptError

WORTH = 0.05  # exactness that makes a plain step slower by no more than this is switched on with a drafter
_WIDTHS = (2, 4, 8, 16)
_SURVIVAL = 0.8  # of a drafted token, where a drafter is worth having
_DEPTH = 512


def exact_width(curve: VerifyCurve) -> int:
    """Rows of a run: the number with the most tokens a second, if four drafted tokens of five are right.

    It depends on nothing else, so that the width is the same with every drafter.
    """
    widths = [width for width in _WIDTHS if width <= curve.widths[-1]]
    return max(widths, key=lambda width: _expected(width) / curve.seconds(width, _DEPTH))


def exact_cost(curve: VerifyCurve, width: int) -> float:
    """By what share a run of `width` rows is slower than one of a single row."""
    return max(curve.seconds(width, _DEPTH) / curve.seconds(1, _DEPTH) - 1, 0.0)


def check_exact(artifact: Artifact) -> None:
    """Raises DsoptError where rows look at each other: w8a8 has one activation scale for all of a run."""
    if mixed := mixes_rows(artifact):
        raise DsoptError(
            f"--exact: {artifact.directory} has {mixed} w8a8 layers, in which a token depends on those computed with "
            "it; compile it with --quant int8"
        )


def mixes_rows(artifact: Artifact) -> int:
    """The number of layers in which the rows of a run depend on one another."""
    return sum(str(node["format"]).startswith("w8a8") for node in artifact.manifest.nodes)


def _expected(width: int) -> float:
    return sum(_SURVIVAL**position for position in range(width))
