"""dsopt bench --spec --calibrate: what a drafter thinks of its tokens, fitted to what became of them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsopt.cli import report
from dsopt.cli.generate import note_measuring, warn
from dsopt.cli.progress import progress_bar
from dsopt.runtime.errors import DsoptError

if TYPE_CHECKING:
    from dsopt.cli.spec_bench import SpecOptions
    from dsopt.runtime.model import Model
    from dsopt.runtime.sampling import Sampling
    from dsopt.runtime.spec_measure import Task

_SEED = 0  # of what is drawn: the same rounds each time


def print_calibration(model: "Model", tasks: "Sequence[Task]", options: "SpecOptions") -> Iterator[str]:
    """Fit greedy decoding and, with a temperature, drawing; store each, then the lines of the table."""
    from dsopt.runtime.sampling import Sampling

    samplings = [Sampling()] + ([Sampling(temperature=options.temp, seed=_SEED)] if options.temp else [])
    records = [
        record
        for directory in _directories(model, options.kind)
        for sampling in samplings
        for record in _calibrate(model, tasks, directory, sampling, options.tokens)
    ]
    if options.output == "md":
        columns = [report.Column(title.replace("_", " "), right=index > 1) for index, title in enumerate(records[0])]
        yield from report.markdown(columns, ([_cell(value) for value in record.values()] for record in records))
    elif options.output == "json":
        yield report.json_text(records)
    else:
        yield from (report.csv_lines if options.output == "csv" else report.json_lines)(records)


def _directories(model: "Model", kind: str) -> list[Path]:
    if kind != "auto":
        return [Path(kind)]
    found = [model.artifact.directory / name for name in model.artifact.manifest.drafters]
    if not found:
        raise DsoptError(
            f"--spec auto has nothing to calibrate: no drafter was compiled with {model.artifact.directory}"
        )
    return found


def _calibrate(
    model: "Model", tasks: "Sequence[Task]", directory: Path, sampling: "Sampling", limit: int
) -> list[dict[str, Any]]:
    """Draft, fit, store: one record a position."""
    from dsopt.runtime.calibration import LEAST, calibrate
    from dsopt.runtime.curve import verify_curve
    from dsopt.runtime.drafters import ConfidentDrafter
    from dsopt.runtime.drafters.choice import open_drafter
    from dsopt.runtime.drafters.manifest import mode_of
    from dsopt.runtime.drafters.rounds import drafted_rounds
    from dsopt.runtime.drafters.temperatures import store_temperatures

    drafter, mode = open_drafter(str(directory), model, sampling), mode_of(sampling)
    assert isinstance(drafter, ConfidentDrafter)  # all that have a directory
    curve = verify_curve(model.session, note_measuring)
    with progress_bar(f"drafting, {mode}", count=True) as progress:
        prompts = [task.prompt for task in tasks]
        rounds, folds = drafted_rounds(model, prompts, drafter, curve, sampling, limit, progress)
    if len(folds) < LEAST:
        raise DsoptError(
            f"{len(folds)} rounds were drafted ({mode}); {LEAST} say something: give more prompts or a larger -n"
        )
    found = calibrate(rounds.confidence, rounds.accepted, folds, drafter.positions)
    temperatures = [position.temperature for position in found]
    if set(temperatures) == {1.0}:
        warn(
            f"dsopt: {directory} ({mode}): temperatures fitted on one half of the rounds do not help the other; 1 stays"
        )
    store_temperatures(directory, model, mode, temperatures)
    return [{"draft": directory.name, "mode": mode, **asdict(position)} for position in found]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
