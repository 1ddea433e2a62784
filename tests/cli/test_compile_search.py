"""dsopt compile --quant auto: the options of a search, its report, and what it does not do twice."""

import html
import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsopt.cli import main
from dsopt.cli.compile import compile_model
from dsopt.cli.order import Order
from dsopt.compiler import probe, setting
from dsopt.compiler import study as studying
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format
from dsopt.runtime import devices
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir

NAME = "<b>&tiny"
SPEEDS = {"w8a8": 1, "w8a8-token": 1.3, "int4-zp-b64": 1.9, "int4-zp": 2, "int4-min": 3, "int8-b64": 3.9, "int8": 4}


def made_up(shapes: Sequence[tuple[int, int]], rows: Sequence[int], forms: Sequence[Format], **_: Any) -> KernelTable:
    """Times without a clock."""
    cells = {(n, k, str(f), m): 1e-9 * n * k * m**0.5 * SPEEDS[str(f)] for n, k in shapes for f in forms for m in rows}
    return KernelTable({"device": "none"}, cells, {1: 1e-6})


@pytest.fixture
def source(tiny_llama_dir: Callable[..., Path], exported_once: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(studying, "measure", made_up)
    return str(tiny_llama_dir(NAME, max_position_embeddings=32))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(60)))
    return path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `dsopt compile WORDS`."""
    monkeypatch.setattr("sys.argv", ["dsopt", "compile", *words])
    with pytest.raises(SystemExit) as caught:
        main.main()
    captured = capsys.readouterr()
    return int(str(caught.value.code)), captured.out, captured.err


class Page(HTMLParser):
    """Checks that tags close in turn; keeps the tags and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_search_from_the_shell(
    source: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    words = [source, "--target", "cpu", "--calib", str(text), "--max-quality-loss", "0.05", "-o", str(out)]
    code, stdout, stderr = call(monkeypatch, capsys, *words, "--report", str(page))
    assert (code, stdout, stderr) == (0, f"{out}\n", "")
    manifest = open_artifact(out).manifest
    assert manifest.search is not None
    assert manifest.quality is not None
    assert manifest.profile is not None
    assert manifest.recipe.startswith("auto,loss=0.05,for=chat,calib=")

    written = page.read_text()
    found = Page(written)
    assert "b" not in found.tags
    assert html.escape(NAME) in written
    assert NAME in "".join(found.words)
    assert found.tags.count("circle") == 1
    assert found.tags.count("rect") == len(manifest.search["uniform"])
    assert found.tags.count("svg") == 1
    rows = 1 + len(manifest.search["rounds"])
    assert found.tags.count("tr") == rows + 1 + len(manifest.search["pareto"]) + 1 + len(
        manifest.search["uniform"]
    ) + 1 + len(manifest.nodes)

    # The same again does nothing, but the report is written.
    monkeypatch.setattr(studying, "study", None)
    stamp = (out / "dsopt.json").stat().st_mtime_ns
    page.unlink()
    assert call(monkeypatch, capsys, *words, "--report", str(page))[0] == 0
    assert (out / "dsopt.json").stat().st_mtime_ns == stamp
    assert page.read_text() == written


def test_another_text_or_budget_is_another_artifact(
    source: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compile_model(source, order=Order(loss="0.5", calib=text, target="cpu"))
    assert one == compile_model(source, order=Order(loss="0.5", calib=text, target="cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(studying, "study", None)  # spelled otherwise it is the same
        assert one == compile_model(source, order=Order(loss="5e-1", calib=text, target="cpu"))
    other = tmp_path / "other"
    other.write_text(text.read_text() * 2)
    places = {
        one,
        compile_model(source, order=Order(loss="5%", calib=text, target="cpu")),
        compile_model(source, order=Order(loss="0.5", calib=other, target="cpu")),
        compile_model(source, order=Order(loss="0.5", calib=text, workload="batch", target="cpu")),
    }
    assert len(places) == 4


def test_a_miss_is_no_success_later(source: str, text: Path, tmp_path: Path) -> None:
    out, order = tmp_path / "new" / "out", Order(loss="1e-4", calib=text, target="cpu")
    with pytest.raises(DsoptError, match="--allow-miss"):
        compile_model(source, out, order)
    assert list(out.parent.iterdir()) == []
    allowed = Order(loss="1e-4", calib=text, target="cpu", allow_miss=True)
    assert compile_model(source, out, allowed) == out == compile_model(source, out, allowed)
    with pytest.raises(DsoptError, match="exists already"):
        compile_model(source, out, order)


def test_the_plan_of_a_search(
    source: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stdout, _ = call(monkeypatch, capsys, source, "--target", "cpu", "--calib", str(text), "--plan")
    assert code == 0
    plan = json.loads(stdout)
    assert plan["goal"]["loss"] == 0.013
    assert len(plan["pareto"]) > 1


def test_a_search_over_a_pruned_model(
    source: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    words = [source, "--target", "cpu", "--calib", str(text), "--prune", "blocks=1", "-o", str(out)]
    code, stdout, stderr = call(monkeypatch, capsys, *words, "--max-quality-loss", "0.013")  # the default, but said
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert "--prune alone loses" in stderr
    assert list(tmp_path.glob("new/*")) == []
    page = tmp_path / "page.html"
    code, stdout, stderr = call(monkeypatch, capsys, *words, "--max-quality-loss", "9", "--report", str(page))
    assert (code, stdout, stderr) == (0, f"{out}\n", "")
    assert "Pruned first (blocks=1), which took" in "".join(Page(page.read_text()).words)
    manifest = open_artifact(out).manifest
    assert manifest.recipe.startswith("auto,loss=9,for=chat,calib=")
    assert manifest.recipe.endswith(" prune blocks=1")
    assert manifest.pruning is not None
    assert manifest.search is not None
    assert 0 < manifest.search["pruned"] < 9
    monkeypatch.setattr(studying, "study", None)  # the same again does nothing
    assert call(monkeypatch, capsys, *words, "--max-quality-loss", "9")[0] == 0
    plain = compile_model(source, order=Order(prune="blocks=1", calib=text, target="cpu"))
    assert open_artifact(plain).manifest.search is None


@pytest.mark.parametrize("same", [True, False])
def test_a_text_that_chose_the_tokens_and_judges_is_told(
    same: bool,
    source: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.write_text("Before.\n" + text.read_text() if same else "0123456789 times is. " * 9)
    words = [source, "--target", "cpu", "--calib", str(text), "--prune", f"vocab={corpus}", "-o", str(out)]
    code, _, stderr = call(monkeypatch, capsys, *words, "--max-quality-loss", "9")
    assert code == 0
    assert stderr.count("chooses tokens: other text loses more") == stderr.count("\n") == same


WRONG = {
    "--max-quality-loss much": "--max-quality-loss",
    "--max-quality-loss 0": "--max-quality-loss",
    "--max-size 5": "--max-size",
    "--for games": "--for",
    "--quant int4 --max-quality-loss 0.1": "nothing to search",
    "--quant int8 --prune layers=1 --allow-miss": "nothing to search",
    "--draft self --report page.html": "nothing to search",
    "--draft self --calib text --for batch": "nothing to search",
    "--quant int8 --calib text": "--calib is for a search, for --prune and for --draft self",
    "--draft other --calib text": "--calib is for a search, for --prune and for --draft self",
    "--quant int8 --for batch": "nothing to search",
    "--quant int8 --profile dsopt.json": "nothing to search",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_calls(
    words: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = [] if "--target" in words else ["--target", "cpu"]
    code, stdout, stderr = call(monkeypatch, capsys, source, *target, *words.split())
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert WRONG[words] in stderr


CUDA_SPEEDS = {"none": 4, "fp8": 2, "int8": 2.5, "int4": 1, "int4-zp": 1.5}


def profile_of_a_card(path: Path, **changes: str) -> Path:
    """A dsopt.json, as far as --profile reads it, with times of a card that this machine has not."""
    cells = {(64, 64, form, m): 1e-7 * m**0.5 * speed for form, speed in CUDA_SPEEDS.items() for m in (1, 4, 512)}
    table = KernelTable({"device": "H0", "target": "cuda", "dtype": "fp16", **changes}, cells, {1: 1e-6})
    path.write_text(json.dumps({"profile": table.to_json()}))
    return path


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(provider: str) -> str | None:
        return "libx.so.1 is missing" if provider.startswith("CUDA") else None

    for module in (devices, setting, probe):
        monkeypatch.setattr(module, "missing_provider", missing)


def test_a_search_for_a_card_without_one_needs_its_times(
    source: str, text: Path, tmp_path: Path, no_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DsoptError, match=r"and libx.so.1 is missing; give --profile .* --quant int8"):
        compile_model(source, order=Order(loss="0.5", calib=text, target="cuda"))
    profile = profile_of_a_card(tmp_path / "dsopt.json")
    monkeypatch.setattr(studying, "measure", None)  # nothing is timed here
    out = compile_model(source, order=Order(loss="0.02", calib=text, target="cuda", profile=tmp_path))
    manifest = open_artifact(out).manifest
    assert manifest.target == "cuda"
    assert manifest.recipe.endswith(",dtype=fp16")
    assert ",profile=" in manifest.recipe
    assert manifest.profile is not None
    assert manifest.profile["machine"]["device"] == "H0"
    assert manifest.quality is not None
    assert manifest.quality["kld_mean"] <= 0.02
    assert manifest.search is not None
    # What the card has and the CPU, which judges, can run; no activation is rounded in their prices.
    assert {"none", "int8", "int4"} <= set(manifest.search["uniform"]) <= {"none", "int8", "int4", "int4-zp"}
    assert manifest.search["uniform"]["none"]["loss"] < 1e-4 < manifest.search["uniform"]["int4"]["loss"]
    assert {node["format"] for node in manifest.nodes} <= set(CUDA_SPEEDS)
    assert compile_model(source, order=Order(loss="0.02", calib=text, target="cuda", profile=profile)) == out


@pytest.mark.parametrize(
    ("changes", "order", "says"),
    [
        ({"dtype": "bf16"}, {}, "--profile: has times of cuda in bf16, wanted are those of cuda in fp16"),
        ({"target": "cpu"}, {}, "--profile: has times of cpu in fp16"),
        ({"dtype": "bf16"}, {"dtype": "bf16"}, "the CPU cannot stand in, it has no bfloat16 kernels"),
    ],
)
def test_times_that_will_not_do(
    source: str, changes: dict[str, str], order: dict[str, str], says: str, tmp_path: Path, no_card: None
) -> None:
    profile = profile_of_a_card(tmp_path / "dsopt.json", **changes)
    with pytest.raises(DsoptError, match=says):
        compile_model(source, order=Order(target="cuda", profile=profile, **order))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ('{"profile": null}', "has no kernel times"),
        ('{"profile": {"machine": {}}}', "not a kernel table"),
    ],
)
def test_a_profile_that_is_none(source: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "dsopt.json").write_text(content)
    with pytest.raises(DsoptError, match=says):
        compile_model(source, order=Order(target="cpu", profile=tmp_path))
    with pytest.raises(DsoptError, match="could not be read"):
        compile_model(source, order=Order(target="cpu", profile=tmp_path / "gone.json"))


def test_a_card_that_is_here_is_searched(source: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed as it is asked for, and judged on it."""
    for module in (devices, setting):
        monkeypatch.setattr(module, "missing_provider", lambda provider: None)
    asked: dict[str, Any] = {}

    def measured(shapes: Any, rows: Sequence[int], forms: Sequence[Format], **options: Any) -> KernelTable:
        asked.update(options, rows=list(rows), forms=set(map(str, forms)))
        raise InterruptedError

    monkeypatch.setattr(studying, "measure", measured)
    with pytest.raises(InterruptedError):
        compile_model(source, order=Order(calib=text, dtype="bf16"))
    assert (asked["target"], asked["dtype"]) == ("cuda", "bf16")
    assert 512 in asked["rows"]  # a prompt is one run there
    assert {"none", "fp8", "int8", "int4"} <= asked["forms"]
    assert not asked["forms"] & {"w8a8", "int4-min"}


def test_texts_that_do_not_do(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short, out = tmp_path / "short", tmp_path / "out"
    short.write_text("Not much to say.")
    for path, says in ((short, "needs 384"), (tmp_path / "gone", "could not be read")):
        code, stdout, stderr = call(
            monkeypatch, capsys, source, "--target", "cpu", "--calib", str(path), "-o", str(out)
        )
        assert (code, stdout) == (1, "")
        assert stderr.count("dsopt: ") == 1
        assert says in stderr.splitlines()[-1]
        assert not out.exists()


@pytest.mark.parametrize("order", [{}, {"prune": "layers=1"}, {"quant": "int8", "draft": "self"}, {"quant": "int8"}])
def test_biases_are_refused_before_anything_is_learnt(
    order: dict[str, Any], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases that config.json does not tell of: the eager model would do without, and so would the search."""
    from dsopt.compiler.reference import Reference

    weights = load_file(Path(source) / "model.safetensors")
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        size = len(weights[f"model.layers.1.{name}.weight"])
        weights[f"model.layers.1.{name}.bias"] = np.ones(size, np.float32)
    save_file(weights, Path(source) / "model.safetensors", {"format": "pt"})
    says = r"with a bias are not supported: model\.layers\.1\.\S+_proj\.bias and 1 more"
    with pytest.raises(DsoptError, match=says):
        compile_model(source, tmp_path / "out", Order(target="cpu", **order))
    with pytest.raises(DsoptError, match=says):
        Reference(open_checkpoint(source))
    assert not (tmp_path / "out").exists()
    assert not list((cache_dir() / "texts").glob("*"))


def test_a_report_that_cannot_be(source: str, text: Path, tmp_path: Path) -> None:
    from dsopt.compiler.report import render

    order = Order(loss="0.5", calib=text, target="cpu", report=tmp_path / "no" / "folder" / "page.html")
    with pytest.raises(DsoptError, match="choose another --report"):
        compile_model(source, tmp_path / "out", order)
    plain = compile_model(source, tmp_path / "plain", Order("none", target="cpu"))
    with pytest.raises(DsoptError, match="no search to report"):
        render(open_artifact(plain).manifest)
