"""Never half-written: kills, failures and company while an artifact is written."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsopt.compiler import build, package
from dsopt.compiler.checkpoint import Tensor
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError

FORK = multiprocessing.get_context("fork")  # children take over the plan; an export of their own takes seconds
TOUCHES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.listdir",
    "os.scandir",
}


@pytest.fixture
def place(plan_tiny: Callable[..., Any], tmp_path: Path) -> tuple[Path, Any, Any]:
    """An artifact of recipe none (the old one), its plan, and a plan of another recipe for its place."""
    old, new = plan_tiny("none"), plan_tiny("int8")
    out = tmp_path / "shelf" / "model"
    build.write(old, out)
    return out, old, new


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a fork; its exit status, negative for a signal."""
    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def without_torch_threads() -> None:
    import torch

    torch.set_num_threads(1)  # the pool of the parent is not there after a fork


def entries(shelf: Path) -> list[str]:
    return sorted(path.name for path in shelf.iterdir())


def is_whole(out: Path, *recipes: str) -> bool:
    """Either nothing is there, or one of these artifacts, with every hash as it should be."""
    if not out.exists():
        return False
    assert open_artifact(out).manifest.recipe in recipes
    return True


# --- killed


def test_killed_at_any_step_it_leaves_the_old_artifact_or_none(place: tuple[Path, Any, Any]) -> None:
    """The child kills itself at its n-th call of the file system there, for each n until it survives."""
    out, old, new = place
    shelf, found = str(out.parent), []

    def write_until(step: int) -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in TOUCHES and args and shelf in str(args[0]):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        without_torch_threads()
        sys.addaudithook(hook)
        build.write(new, out)

    for step in range(1, 200):
        status = in_child(lambda step=step: write_until(step))  # type: ignore[misc]
        found.append(is_whole(out, "none", "int8"))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not found[-1] or open_artifact(out).manifest.recipe == "int8":
            build.write(old, out)  # also: what a killed one left is in nobody's way
    assert status == 0
    assert len(found) > 15  # the kills were many
    assert found.count(False) <= 2  # and nearly all left an artifact
    assert open_artifact(out).manifest.recipe == "int8"
    assert entries(out.parent) == ["model"]


def test_killed_at_a_random_moment(place: tuple[Path, Any, Any]) -> None:
    """The same from outside, with the writing slowed down."""
    out, _, new = place

    def write_slowly() -> None:
        without_torch_threads()
        tensor_class: Any = Tensor
        read = tensor_class.read

        def slow(*args: Any) -> Any:
            import time

            time.sleep(0.004)
            return read(*args)

        tensor_class.read = slow
        build.write(new, out)

    for wait in (0.01, 0.03, 0.05, 0.08, 0.12):
        child = FORK.Process(target=write_slowly)
        child.start()
        child.join(wait)
        child.kill()
        child.join()
        is_whole(out, "none", "int8")
    build.write(new, out)
    assert open_artifact(out).manifest.recipe == "int8"
    assert entries(out.parent) == ["model"]


def test_leftovers_of_a_process_with_the_same_id_are_in_nobodys_way(place: tuple[Path, Any, Any]) -> None:
    """In a container every run may have the same process id."""
    out, _, new = place
    for suffix in ("", ".old"):
        left = out.with_name(f".model.partial-{os.getpid()}{suffix}")
        left.mkdir()
        (left / "model.onnx").write_text("half")
    build.write(new, out)
    assert open_artifact(out).manifest.recipe == "int8"
    assert entries(out.parent) == ["model"]


def test_leftovers_beside_a_name_with_brackets_go_too(place: tuple[Path, Any, Any]) -> None:
    _, _, new = place
    out = place[0].with_name("model[1]")
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    left = out.with_name(f".model[1].partial-{dead.pid}")
    left.mkdir()
    build.write(new, out)
    assert not left.exists()


def test_what_a_running_process_writes_is_left_alone(place: tuple[Path, Any, Any]) -> None:
    out, _, new = place
    other = out.with_name(f".model.partial-{os.getppid()}")
    other.mkdir()
    build.write(new, out)
    assert other.exists()


# --- failing


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write_graph", "write_texts", "describe_files", "seal"])
def test_a_failure_leaves_the_old_artifact(
    step: str, error: BaseException, place: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, new = place
    monkeypatch.setattr(package, step, fail(error))
    with pytest.raises((DsoptError, type(error))):
        build.write(new, out)
    assert is_whole(out, "none")
    assert entries(out.parent) == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_old_artifact(
    failing: int, place: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first moves the old one away, the second puts the new one there."""
    out, _, new = place
    rename, calls = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(KeyboardInterrupt):
        build.write(new, out)
    assert is_whole(out, "none")


def test_a_full_disk_is_one_line(place: tuple[Path, Any, Any]) -> None:
    out, _, new = place

    def write() -> None:
        without_torch_threads()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            build.write(new, out)
        except DsoptError as error:
            sys.exit(0 if "\n" not in str(error) else 3)

    assert in_child(write) == 0
    assert is_whole(out, "none")
    assert entries(out.parent) == ["model"]


def test_too_little_room_is_said_before_anything_is_written(
    place: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, new = place
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    monkeypatch.setattr(package, "write_graph", fail(AssertionError("written all the same")))
    with pytest.raises(DsoptError, match="are free"):
        build.write(new, out / "deeper" / "still")
    assert entries(out.parent) == ["model"]


@pytest.mark.parametrize("where", ["a file in the way", "a file above"])
def test_a_place_that_cannot_be_written_is_one_line(where: str, place: tuple[Path, Any, Any]) -> None:
    out, _, new = place
    file = out.with_name("file")
    file.write_text("mine")
    with pytest.raises(DsoptError) as caught:
        build.write(new, file if where == "a file in the way" else file / "model")
    assert "\n" not in str(caught.value)
    assert file.read_text() == "mine"


def test_a_link_is_replaced_or_refused_never_followed_half_way(place: tuple[Path, Any, Any]) -> None:
    out, _, new = place
    link = out.with_name("link")
    link.symlink_to(out)
    try:
        build.write(new, link)
        assert open_artifact(link).manifest.recipe == "int8"
    except DsoptError:
        assert open_artifact(link).manifest.recipe == "none"
    assert entries(out.parent) == ["link", "model"]


# --- in company


@pytest.mark.parametrize("there", [True, False])
def test_two_at_once_leave_one_whole_artifact(there: bool, place: tuple[Path, Any, Any]) -> None:
    """Both have all written and rename together."""
    out, _, new = place
    if not there:
        shutil.rmtree(out)
    gate = FORK.Barrier(2)

    def write() -> None:
        without_torch_threads()
        take_place = package._take_place

        def together(*args: Path) -> None:
            gate.wait(30)
            take_place(*args)

        package._take_place = together
        try:
            build.write(new, out)
        except DsoptError:
            sys.exit(7)  # "could not", said in one line, would do

    for _ in range(5):
        both = [FORK.Process(target=write) for _ in range(2)]
        for child in both:
            child.start()
        for child in both:
            child.join(60)
        assert {child.exitcode for child in both} <= {0, 7}
        assert is_whole(out, "int8")
        assert entries(out.parent) == ["model"]
        gate.reset()
        if not there:
            shutil.rmtree(out)


def test_progress_comes_to_its_end(place: tuple[Path, Any, Any]) -> None:
    out, _, new = place
    seen: list[tuple[int, int]] = []
    build.write(new, out, progress=lambda done, total: seen.append((done, total)))
    done, totals = [d for d, _ in seen], {t for _, t in seen}
    assert done == sorted(done)
    assert totals == {done[-1]}
