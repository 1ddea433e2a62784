"""From what a user says (`none`, `ngram`, `auto`, a directory) to a drafter with its schedule."""

import json
from collections.abc import Callable
from pathlib import Path

from dsopt.runtime.artifact import MANIFEST, open_artifact
from dsopt.runtime.curve import verify_curve
from dsopt.runtime.devices import choose_device
from dsopt.runtime.drafters import Drafter, ReadingDrafter
from dsopt.runtime.drafters.chain import ChainDrafter, split
from dsopt.runtime.drafters.curve import draft_curve
from dsopt.runtime.drafters.experience import open_experience
from dsopt.runtime.drafters.manifest import DRAFT_MANIFEST, mode_of
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.exact import WORTH, check_exact, exact_cost, exact_widths, mixes_rows
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.scheduler import Reader, Scheduler
from dsopt.runtime.speculate import Speculation

NONE, NGRAM, AUTO = "none", "ngram", "auto"


def open_speculation(
    model: Model,
    kind: str,
    *,
    exact: bool | None = None,
    sampling: Sampling | None = None,
    measuring: Callable[[], None] = lambda: None,
    fresh_curve: bool = False,
) -> Speculation | None:
    """Speculation for one sequence at a time of `model`; None for plain decoding.

    `exact` None: where there is a drafter and exactness costs under 5 %. `measuring` is called before the verify
    curve or the drafter's is measured, which takes two seconds each the first time, or with `fresh_curve`. Raises
    DsoptError where a drafter cannot be used.
    """
    if exact:
        check_exact(model.artifact)
    sampling = sampling or Sampling()
    drafter = open_drafter(kind, model, sampling)
    if drafter is None and not exact:
        return None
    curve = verify_curve(model.session, measuring, fresh=fresh_curve)
    reader = _open_reader(kind, model, sampling, measuring, fresh=fresh_curve)
    widths = exact_widths(curve)
    cost = exact_cost(curve, widths)
    if exact is None:
        exact = cost <= WORTH and not mixes_rows(model.artifact)
    if not exact:
        return Speculation(drafter, Scheduler(curve, reader=reader), kind=kind)
    return Speculation(drafter, Scheduler(curve, widths, reader), widths, kind=kind, exact_cost=cost)


def _open_reader(
    kind: str, model: Model, sampling: Sampling, measuring: Callable[[], None], *, fresh: bool
) -> Reader | None:
    """What is known of the part of the drafter that must read; None where it has none."""
    directories = _directories(kind, model)
    if not directories:
        return None
    names = (DRAFT_MANIFEST, MANIFEST)
    manifests = [next(d / name for name in names if (d / name).is_file()) for d in directories]
    identity = repr([sorted(json.loads(path.read_bytes())["files"].items()) for path in manifests])

    def make() -> ReadingDrafter:
        _, reader = split(ChainDrafter([_open_directory(d, model, sampling) for d in directories]))
        assert reader is not None  # all that have a directory must read
        return reader

    curve = draft_curve(identity, model, make, measuring, fresh=fresh)
    return Reader(curve, open_experience(identity, model.session, mode_of(sampling)), beside=kind == AUTO)


def open_drafter(kind: str, target: Model, sampling: Sampling) -> Drafter | None:
    """`auto`: copies from the text where they are sure, else the drafters that were compiled with the model."""
    if kind == NONE:
        return None
    if kind == NGRAM:
        return NgramDrafter()
    compiled = [_open_directory(directory, target, sampling) for directory in _directories(kind, target)]
    if kind == AUTO:
        return ChainDrafter([NgramDrafter(), *compiled]) if compiled else NgramDrafter()
    (drafter,) = compiled
    return drafter


def _directories(kind: str, target: Model) -> list[Path]:
    """Of the drafters that are not copies of the text. Raises DsoptError where `kind` is none."""
    if kind in (NONE, NGRAM):
        return []
    if kind == AUTO:
        return [target.artifact.directory / name for name in target.artifact.manifest.drafters]
    if not any((Path(kind) / name).is_file() for name in (MANIFEST, DRAFT_MANIFEST)):
        raise DsoptError(f"--draft is {kind}; it must be {NONE}, {NGRAM}, {AUTO} or the directory of a compiled model")
    return [Path(kind)]


def _open_directory(directory: Path, target: Model, sampling: Sampling) -> Drafter:
    if (directory / DRAFT_MANIFEST).is_file():
        from dsopt.runtime.drafters.deepspec import open_deepspec

        return open_deepspec(directory, target.session, sampling)
    from dsopt.runtime.drafters.model import ModelDrafter, check_same_tokens
    from dsopt.runtime.drafters.temperatures import model_temperatures

    artifact = open_artifact(directory)
    # On a card both may run there; where the model stays on the CPU, so does what drafts for it.
    device = choose_device("auto" if target.session.device == "cuda" else "cpu", artifact.manifest, lambda line: None)
    draft = Model(artifact, threads=target.session.threads, device=device)
    check_same_tokens(target, draft)
    fitted = model_temperatures(directory, target, mode_of(sampling))
    return ModelDrafter(draft, target.session.vocab_size, sampling, fitted)
