"""dsopt compile --quant auto: the options of a search, its report, and what it does not do twice."""

import html
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from search_tiny import call, made_up

from dsopt.cli.compile import compile_model
from dsopt.cli.order import Order
from dsopt.compiler import study as studying
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir

NAME = "<b>&tiny"


@pytest.fixture
def source(tiny_llama_dir: Callable[..., Path], exported_once: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(studying, "measure", made_up)
    return str(tiny_llama_dir(NAME, max_position_embeddings=32))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(60)))
    return path


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
    assert plan["goal"]["loss"] == 0.01
    assert len(plan["pareto"]) > 1


def test_a_search_over_a_pruned_model(
    source: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    words = [source, "--target", "cpu", "--calib", str(text), "--prune", "blocks=1", "-o", str(out)]
    code, stdout, stderr = call(monkeypatch, capsys, *words, "--max-quality-loss", "0.01")  # the default, but said
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


def test_texts_that_do_not_do(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short, out = tmp_path / "short", tmp_path / "out"
    short.write_text("Not much to say.")
    for path, says in ((short, "needs 512"), (tmp_path / "gone", "could not be read")):
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
