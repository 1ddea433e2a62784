"""dsopt bench --spec: what speculation gains on prompts by category, with SPEED-Bench's columns."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsopt.cli import report
from dsopt.cli.generate import note_measuring, warn
from dsopt.cli.progress import progress_bar
from dsopt.runtime.errors import DsoptError, UsageError

if TYPE_CHECKING:
    from dsopt.runtime.artifact import Artifact
    from dsopt.runtime.drafters import Drafter
    from dsopt.runtime.model import Model
    from dsopt.runtime.spec_measure import Comparison, Prospect, Task
    from dsopt.runtime.speculate import Speculation

_MARKDOWN = {  # of a record: the title in the table
    "category": "category",
    "prompts": "prompts",
    "base_avg_pred_ts": "base t/s",
    "spec_avg_pred_ts": "spec t/s",
    "decode_speedup": "decode",
    "latency_speedup": "latency",
    "accept_rate": "accept",
    "mean_accepted_length": "length",
    "accept_per_position": "by position",
    "read_share": "read",
    "draft_share": "draft",
    "verify_share": "verify",
    "overhead_share": "overhead",
    "identical_share": "identical",
    "near_ties": "near ties",
}
_SHOWN_POSITIONS = 4


@dataclass(frozen=True)
class SpecOptions:
    """What was asked for. A wrong value raises UsageError."""

    kind: str
    prompts: Path | None
    accept: float | None
    tokens: int
    exact: bool | None
    threads: int | None
    output: str
    device: str = "auto"
    calibrate: bool = False
    temp: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "none":
            raise UsageError("--spec none compares nothing; give ngram, auto or the directory of a compiled model")
        if self.calibrate:
            self._check_calibration()
        elif self.temp:
            raise UsageError("--temp needs --calibrate; answers are compared at temperature 0")
        if (self.prompts is None) == (self.accept is None):
            raise UsageError("--spec needs --prompts FILE.jsonl to answer, or --synthetic-accept R to reckon with")
        if self.accept is not None and self.exact is not None:
            raise UsageError("--exact and --no-exact need --prompts; --synthetic-accept reckons with plain runs")
        if self.accept is not None and not 0 <= self.accept <= 1:
            raise UsageError(f"--synthetic-accept is {self.accept}; a probability from 0 to 1")
        if self.tokens < 2:
            raise UsageError(f"-n is {self.tokens}; --spec needs 2 or more tokens an answer")

    def _check_calibration(self) -> None:
        if self.kind == "ngram":
            raise UsageError(
                "--spec ngram has nothing to calibrate: it goes by what was accepted, not by probabilities"
            )
        if self.accept is not None or self.prompts is None:
            raise UsageError("--calibrate needs --prompts FILE.jsonl to draft on")
        if self.exact is not None:
            raise UsageError("--exact and --no-exact are of the comparison; --calibrate verifies every draft whole")


def run_spec(artifact: "Artifact", options: SpecOptions) -> Iterator[str]:
    """The lines of the table, as they come. Raises DsoptError on prompts that cannot be read or do not fit."""
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    from dsopt.runtime.devices import choose_device
    from dsopt.runtime.model import Model

    device = choose_device(options.device, artifact.manifest, warn)
    model = Model(artifact, threads=options.threads, device=device)
    if prompts is None:
        yield from _print_prospects(model, options)
    elif options.calibrate:
        from dsopt.cli.spec_calibrate import print_calibration

        yield from print_calibration(model, tokenized(model, prompts, options.tokens), options)
    else:
        tasks = tokenized(model, prompts, options.tokens)
        yield from _print(_told(_compare(model, tasks, options)), options.output)


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Category and prompt of each line, a JSON object that has both as texts. Raises DsoptError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold Unicode's other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DsoptError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DsoptError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("category", "prompt")):
            raise DsoptError(f'{path}: line {number} must be {{"category": "...", "prompt": "..."}}')
        if not _is_utf8(entry["category"] + entry["prompt"]):
            raise DsoptError(f"{path}: line {number} has half a surrogate pair; write the character itself")
        found.append((entry["category"], entry["prompt"]))
    if not found:
        raise DsoptError(f"{path}: no prompts in it")
    return found


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records; at the end one line on stderr where speculation gained nothing, and why."""
    record: dict[str, Any] = {}
    for record in records:
        yield record
    if record["decode_speedup"] is not None and record["decode_speedup"] < 1:
        warn(f"dsopt: {record['draft']} gains nothing here: {_reason(record)}")


def _reason(record: dict[str, Any]) -> str:
    rate = record["accept_rate"]
    accepted = "no token was verified" if rate is None else f"{100 * rate:.0f} % of the tokens verified were accepted"
    took = f"drafting took {100 * (record['draft_share'] or 0):.0f} % of the time"
    took += f" and reading {100 * record['read_share']:.0f} %" if record["read_share"] else ""
    return (
        f"{record['decode_speedup']:.2f} x plain decoding; {accepted}, {took}, and it was left alone in "
        f"{record['paused_rounds']} of {record['rounds']} rounds"
    )


def _compare(model: "Model", tasks: "list[Task]", options: SpecOptions) -> Iterator[dict[str, Any]]:
    from dsopt.runtime.drafters.choice import open_speculation
    from dsopt.runtime.spec_measure import compare

    speculation = open_speculation(model, options.kind, exact=options.exact, measuring=note_measuring, fresh_curve=True)
    assert speculation is not None
    reference = open_speculation(model, "none", exact=True) if speculation.widths else None
    with progress_bar("prompts", count=True) as progress:
        done = 0
        progress(0, len(tasks))
        for comparison in compare(model, tasks, speculation, reference, options.tokens):
            done += len(comparison.plain) * (done < len(tasks))
            progress(done, len(tasks))
            yield _record(comparison, speculation)


def tokenized(model: "Model", prompts: list[tuple[str, str]], tokens: int) -> "list[Task]":
    """The ids of each prompt, as a message where the model has a chat template. Raises DsoptError where an answer of
    `tokens` has no room."""
    from dsopt.runtime.spec_measure import OVERALL, Task

    tasks, speaks = [], bool(model.artifact.text("chat_template.jinja"))
    for category, prompt in prompts:
        ids = model.prompt([{"role": "user", "content": prompt}]) if speaks else model.encode(prompt)
        if len(ids) + tokens > model.session.context:
            raise DsoptError(
                f"a prompt of category {category} has {len(ids)} tokens; with -n {tokens} it does not fit a context "
                f"of {model.session.context}"
            )
        if category == OVERALL:
            raise DsoptError(f"the category {OVERALL} is taken: it names the last row")
        tasks.append(Task(category, tuple(ids)))
    return tasks


def _record(comparison: "Comparison", speculation: "Speculation") -> dict[str, Any]:
    from dsopt.runtime.spec_measure import decode_rate, latency

    tally = comparison.tally
    base, spec = decode_rate(comparison.plain), decode_rate(comparison.speculative)
    shares = {name: seconds / tally.seconds if tally.seconds else None for name, seconds in _times(tally).items()}
    return {
        "category": comparison.category,
        "prompts": len(comparison.plain),
        "draft": speculation.kind,
        "base_avg_pred_ts": base,
        "spec_avg_pred_ts": spec,
        "decode_speedup": spec / base if base else None,
        "latency_speedup": latency(comparison.plain) / latency(comparison.speculative),
        "accept_rate": tally.accept_rate,
        "mean_accepted_length": tally.mean_accepted_length,
        "accept_per_position": tally.accept_per_position,
        **shares,
        "identical_share": comparison.identical,
        "near_ties": tally.near_ties,
        "diverged_margins": [round(margin, 4) for margin in comparison.margins],
        "rounds": tally.rounds,
        "paused_rounds": tally.paused_rounds,
        "started_answers": tally.starts,
        "started_after": tally.start_tokens / tally.starts if tally.starts else None,
        "read_tokens": tally.read_tokens,
        "proposed_tokens": tally.proposed,
        "accepted_tokens": tally.accepted,
        "base_tokens": sum(len(answer.tokens) for answer in comparison.plain),
        "spec_tokens": sum(len(answer.tokens) for answer in comparison.speculative),
        "exact": bool(speculation.widths),
        "exact_avg_pred_ts": decode_rate(comparison.reference) if comparison.reference else None,
    }


def _times(tally: Any) -> dict[str, float]:
    return {
        "read_share": tally.read_seconds,
        "draft_share": tally.draft_seconds,
        "verify_share": tally.verify_seconds,
        "overhead_share": tally.overhead_seconds,
    }


def _print(records: Iterator[dict[str, Any]], output: str) -> Iterator[str]:
    if output == "json":
        yield report.json_text(list(records))
    elif output == "jsonl":
        yield from report.json_lines(records)
    elif output == "csv":
        yield from report.csv_lines({**r, "accept_per_position": _positions(r, None)} for r in records)
    else:
        columns = [
            report.Column(title, 12 if key == "category" else 0, key != "category") for key, title in _MARKDOWN.items()
        ]
        columns[list(_MARKDOWN).index("accept_per_position")] = report.Column("by position", 5 * _SHOWN_POSITIONS - 1)
        yield from report.markdown(columns, ([_cell(record, key) for key in _MARKDOWN] for record in records))


def _cell(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if key == "accept_per_position":
        return _positions(record, _SHOWN_POSITIONS)
    if value is None:
        return ""
    if key.endswith(("_share", "_rate")):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _positions(record: dict[str, Any], most: int | None) -> str:
    return " ".join(f"{share:.2f}" for share in record["accept_per_position"][:most])


def _print_prospects(model: "Model", options: SpecOptions) -> Iterator[str]:
    from dsopt.runtime.curve import verify_curve
    from dsopt.runtime.drafters.choice import open_drafter
    from dsopt.runtime.sampling import Sampling
    from dsopt.runtime.spec_measure import prospects

    assert options.accept is not None
    drafter = open_drafter(options.kind, model, Sampling())
    curve = verify_curve(model.session, note_measuring, fresh=True)
    split = _split(drafter)
    records = [_prospect(p, options.accept) | split for p in prospects(curve, options.accept, drafter, model)]
    if options.output == "md":
        titles = ["drafted", "draft ms", "verify ms", "break-even tokens", f"tokens at {options.accept:g}", "speedup"]
        titles += [name.replace("_", " ") for name in split]
        cells = ([f"{value:.2f}" if isinstance(value, float) else str(value) for value in _shown(r)] for r in records)
        yield from report.markdown([report.Column(title) for title in titles], cells)
    else:
        forms = {"json": lambda: iter([report.json_text(records)]), "jsonl": lambda: report.json_lines(records)}
        yield from forms.get(options.output, lambda: report.csv_lines(records))()


def _split(drafter: "Drafter | None") -> dict[str, float]:
    """Of a drafter with blocks: what it takes to read a round's rows, and the parts of a draft."""
    from dsopt.runtime.drafters.cost import draft_cost
    from dsopt.runtime.drafters.deepspec import BlockDrafter

    if not isinstance(drafter, BlockDrafter):
        return {}
    cost = draft_cost(drafter, depth=min(512, drafter.room // 2), rows=4)
    return {"ingest_ms": 1e3 * cost.ingest, "block_ms": 1e3 * cost.block, "chain_ms": 1e3 * cost.chain}


def _prospect(prospect: "Prospect", accept: float) -> dict[str, Any]:
    return {
        "drafted": prospect.drafted,
        "draft_ms": 1e3 * prospect.draft_seconds,
        "verify_ms": 1e3 * prospect.verify_seconds,
        "break_even_length": prospect.break_even,
        "accept": accept,
        "expected_length": prospect.expected,
        "speedup": prospect.speedup,
    }


def _shown(record: dict[str, Any]) -> list[Any]:
    return [value for key, value in record.items() if key != "accept"]
