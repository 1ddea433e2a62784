"""dsopt bench: the speed of a compiled model, with llama-bench's work, names and fields."""

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsopt.cli import report
from dsopt.cli.models import find_artifact
from dsopt.cli.progress import progress_bar
from dsopt.cli.spec_bench import SpecOptions, run_spec
from dsopt.runtime.devices import check_device
from dsopt.runtime.errors import UsageError

if TYPE_CHECKING:
    from dsopt.runtime.measure import Measurement, Workload
    from dsopt.runtime.session import Session

_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
_MOST = 10_000  # values of an option and tests of a run: more are a slip of the keyboard
_FEW = 3  # with fewer repetitions a deviation says little


def bench_command(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Compiled model. [default: $DSOPT_MODEL, else the last]"),
    ] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="The same as DIR.")] = None,
    n_prompt: Annotated[
        list[str],
        typer.Option("-p", "--n-prompt", help="Prompt tokens: 512, 128,512, 128-512+128, 128-512*2."),
    ] = ["512"],  # noqa: B006 - typer copies it
    n_gen: Annotated[list[str], typer.Option("-n", "--n-gen", help="Generated tokens, likewise.")] = ["128"],  # noqa: B006
    pairs: Annotated[
        list[str],
        typer.Option("-pg", metavar="P,N", help="Also P prompt and N generated tokens in one test."),
    ] = [],  # noqa: B006
    n_depth: Annotated[
        list[str], typer.Option("-d", "--n-depth", help="Tokens in the cache before each test, likewise.")
    ] = ["0"],  # noqa: B006
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Runs of each test.")] = 5,
    spec: Annotated[
        str | None,
        typer.Option(metavar="ngram|auto|DIR", help="Instead: answer prompts with and without this drafter, in turn."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help='With --spec: {"category": ..., "prompt": ...} a line; -n tokens each.'
        ),
    ] = None,
    synthetic_accept: Annotated[
        float | None,
        typer.Option(metavar="R", help="With --spec: what it would gain, were each drafted token right so often."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="With --spec and --prompts: fit the drafter's confidence to what is accepted, and keep it.",
        ),
    ] = False,
    temp: Annotated[
        float, typer.Option(help="With --calibrate: fit drawing at this temperature too, not greedy decoding alone.")
    ] = 0.0,
    exact: Annotated[
        bool | None, typer.Option("--exact/--no-exact", help="With --spec: as in generate.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("-t", "--threads", help="Threads. [default: physical cores]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="Form of the output.")
    ] = "md",
) -> None:
    """Measure prompt processing (pp) and text generation (tg), in tokens a second.

    Random token ids, no tokenizer, no sampling, one warm-up run that does not count: comparable with
    llama-bench.
    """
    if directory is not None and model is not None and directory != model:
        raise UsageError(f"two models, {directory} and -m {model}; bench takes one")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; 1 or more")
    if repetitions < 1:
        raise UsageError(f"-r is {repetitions}; 1 or more repetitions")
    check_device(device)
    if spec is not None:
        if (n_prompt, pairs, n_depth, repetitions) != (["512"], [], ["0"], 5):
            raise UsageError("-p, -pg, -d and -r are of llama-bench's tests; --spec has --prompts and -n")
        if synthetic_accept is not None and n_gen != ["128"]:
            raise UsageError("-n needs --prompts; --synthetic-accept answers nothing")
        tokens = _one_number("-n", n_gen)
        options = SpecOptions(spec, prompts, synthetic_accept, tokens, exact, threads, output, device, calibrate, temp)
        for line in run_spec(find_artifact(directory or model), options):
            print(line, flush=True)
        return
    if prompts is not None or synthetic_accept is not None or exact is not None or calibrate or temp:
        raise UsageError("--prompts, --synthetic-accept, --calibrate, --temp and --exact need --spec KIND")
    workloads = _workloads(n_prompt, n_gen, pairs, n_depth)
    artifact = find_artifact(directory or model)
    from dsopt.runtime.devices import choose_device
    from dsopt.runtime.measure import check_context
    from dsopt.runtime.session import Session

    check_context(workloads, artifact.manifest.model["context_length"])
    chosen = choose_device(device, artifact.manifest, lambda line: print(line, file=sys.stderr))
    session = Session(artifact, threads=threads, device=chosen)
    for line in _print(session, workloads, repetitions, output):
        print(line, flush=True)
    if repetitions < _FEW and output == "md":
        print(
            f"dsopt: ± of {repetitions} repetition{'s' * (repetitions > 1)} says little; -r 3 or more",
            file=sys.stderr,
        )


def _workloads(
    prompts: Sequence[str], generated: Sequence[str], pairs: Sequence[str], depths: Sequence[str]
) -> "list[Workload]":
    """Every combination, in llama-bench's order: at each depth the prompts, the generations, the pairs."""
    from dsopt.runtime.measure import Workload

    shapes = [(p, 0) for p in _numbers("-p", prompts) if p] + [(0, n) for n in _numbers("-n", generated) if n]
    for pair in pairs:
        match = re.fullmatch(r"(\d+),(\d+)", pair)
        if match is None:
            raise UsageError(f"-pg is {pair!r}; prompt and generated tokens, as 512,128")
        shapes.append((int(match[1]), int(match[2])))
    if not shapes:
        raise UsageError("nothing to measure: -p and -n are 0 and there is no -pg")
    deep = _numbers("-d", depths)
    if len(deep) * len(shapes) > _MOST:
        raise UsageError(f"-p, -n, -pg and -d make {len(deep) * len(shapes)} tests; at most {_MOST}")
    return [Workload(p, n, depth) for depth in deep for p, n in shapes]


def _numbers(option: str, texts: Sequence[str]) -> list[int]:
    """`128,256` and ranges `first-last`, `first-last+step`, `first-last*factor`."""
    ranges = (_range(option, part) for text in texts for part in text.split(","))
    numbers = list(itertools.islice(itertools.chain.from_iterable(ranges), _MOST + 1))
    if len(numbers) > _MOST:
        raise UsageError(f"{option} is {','.join(texts)!r}: more than {_MOST} values; give a larger step")
    return numbers


def _one_number(option: str, texts: Sequence[str]) -> int:
    numbers = _numbers(option, texts)
    if len(numbers) != 1:
        raise UsageError(f"{option} is {','.join(texts)!r}; one number with --spec")
    return numbers[0]


def _range(option: str, text: str) -> Iterable[int]:
    if text.isascii() and text.isdigit():
        return [int(text)]
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{option} is {text!r}; a number of tokens, or a list or range as 128,256 or 128-512+128")
    first, last, kind, step = int(match[1]), int(match[2]), match[3] or "+", int(match[4] or 1)
    if first > last or step < (2 if kind == "*" else 1) or (kind == "*" and first == 0):
        raise UsageError(f"{option} is {text!r}: this range does not rise to its end")
    if kind == "+":
        return range(first, last + 1, step)
    return itertools.takewhile(lambda number: number <= last, (first * step**n for n in itertools.count()))


def _print(session: "Session", workloads: "Sequence[Workload]", repetitions: int, output: str) -> Iterator[str]:
    records = _records(session, workloads, repetitions)
    if output == "csv":
        yield from report.csv_lines(records)
    elif output == "jsonl":
        yield from report.json_lines(records)
    elif output == "json":
        yield report.json_text(list(records))
    else:
        yield from _markdown(session, workloads, records)


def _records(session: "Session", workloads: "Sequence[Workload]", repetitions: int) -> Iterator[dict[str, Any]]:
    from dsopt.runtime.measure import Bench

    setting, bench = _setting(session), Bench(session)
    for workload in workloads:
        with progress_bar(workload.name, count=True) as progress:  # gone before its row is printed
            measurement = bench.measure(workload, repetitions, progress)
        yield {**setting, **_result(measurement)}


def _setting(session: "Session") -> dict[str, Any]:
    """What all rows of a run have in common. `build_commit` is dsopt's version: a wheel knows no commit."""
    from importlib.metadata import version  # slow to import: not for --help

    import onnxruntime

    from dsopt.runtime.cuda import DEVICE_CHUNK
    from dsopt.runtime.machine import cpu_name, gpu_name
    from dsopt.runtime.session import PREFILL_CHUNK

    artifact, manifest = session.artifact, session.artifact.manifest
    parameters, gpu = manifest.model["parameters"], session.device == "cuda"
    return {
        "build_commit": version("dsopt"),
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": gpu_name() if gpu else "",
        "backends": "ORT-CUDA" if gpu else "ORT-CPU",
        "model_filename": str(artifact.directory),
        "model_type": f"{manifest.family} {_rounded(parameters)} {manifest.recipe}",
        "model_size": artifact.size,
        "model_n_params": parameters,
        "n_batch": DEVICE_CHUNK if gpu else PREFILL_CHUNK,
        "n_ubatch": DEVICE_CHUNK if gpu else PREFILL_CHUNK,
        "n_threads": session.threads,
        "type_k": session.cache_type,
        "type_v": session.cache_type,
        "n_gpu_layers": manifest.model["layers"] if gpu else 0,
        "flash_attn": gpu,
        "devices": "CUDA0" if gpu else "CPU",
        "use_mmap": True,
        "embeddings": False,
        "dsopt_version": version("dsopt"),
        "dsopt_ort_version": onnxruntime.__version__,
        "dsopt_recipe": manifest.recipe,
    }


def _result(measurement: "Measurement") -> dict[str, Any]:
    from dsopt.runtime.measure import mean_and_deviation

    workload = measurement.workload
    avg_ns, stddev_ns = mean_and_deviation(measurement.samples_ns)
    avg_ts, stddev_ts = mean_and_deviation(measurement.samples_ts)
    return {
        "n_prompt": workload.prompt,
        "n_gen": workload.generate,
        "n_depth": workload.depth,
        "test_time": measurement.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(avg_ns),
        "stddev_ns": round(stddev_ns),
        "avg_ts": avg_ts,
        "stddev_ts": stddev_ts,
        "samples_ns": measurement.samples_ns,
        "samples_ts": measurement.samples_ts,
        "dsopt_test": workload.name,
        "dsopt_ttft_ms": measurement.ttft_ms,
        "dsopt_itl_ms_p50": measurement.itl_ms(50),
        "dsopt_itl_ms_p95": measurement.itl_ms(95),
        "dsopt_peak_rss": _peak_rss(),
    }


def _markdown(session: "Session", workloads: "Sequence[Workload]", records: Iterator[dict[str, Any]]) -> Iterator[str]:
    setting = _setting(session)
    fixed = [
        setting["model_type"],
        report.size(setting["model_size"]),
        report.count(setting["model_n_params"]),
    ]
    columns = [
        report.Column("model", len(fixed[0]), right=False),
        report.Column("size", len(fixed[1])),
        report.Column("params", len(fixed[2])),
        report.Column("backend", right=False),
        report.Column("threads"),
        report.Column("test", max(15, *(len(workload.name) for workload in workloads))),
        report.Column("t/s", 20),
    ]
    rows = (
        [
            *fixed,
            r["backends"],
            str(r["n_threads"]),
            r["dsopt_test"],
            f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
        ]
        for r in records
    )
    yield from report.markdown(columns, rows)
    yield ""
    yield f"build: dsopt {setting['dsopt_version']} (onnxruntime {setting['dsopt_ort_version']})"


def _rounded(parameters: int) -> str:
    """134515008 as 135M, as models are called."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def _peak_rss() -> int | None:
    """Bytes, of this process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
