"""Every command with every kind of ``--ckpt_path``, with and without ``--run_dir``."""

import json
from pathlib import Path

import pytest

from lightning_lab.errors import LabError
from lightning_lab.training.rundir import newest_run, resolve_run, unused_directory

EVALUATIONS = ("validate", "test", "predict")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str, checkpoints: tuple[str, ...] = ("best", "last")) -> None:
    for name in names:
        folder = Path(name) / "checkpoints"
        folder.mkdir(parents=True)
        for checkpoint in checkpoints:
            (folder / f"{checkpoint}.ckpt").touch()


def resolved(command: str, name: str, run_dir: str | None, ckpt_path: str | None) -> tuple[str, str | None]:
    """Run directory and checkpoint as text; creates nothing."""
    before = sorted(Path().rglob("*"))
    paths = resolve_run(command, name, run_dir, ckpt_path)
    assert sorted(Path().rglob("*")) == before
    assert paths.checkpoints == paths.run_dir / "checkpoints"
    return str(paths.run_dir), None if paths.checkpoint is None else str(paths.checkpoint)


class TestFit:
    def test_a_new_run_has_the_first_configs_name(self) -> None:
        assert resolved("fit", "a", None, None) == ("runs/a", None)

    def test_a_free_run_dir_is_taken_whatever_stands_beside_it(self) -> None:
        make("trials/x-2")
        assert resolved("fit", "a", "trials/x", None) == ("trials/x", None)
        make("trials/x")
        assert resolved("fit", "a", "trials/x", None) == ("trials/x-3", None)

    def test_suffixes(self) -> None:
        make("runs/a")
        assert resolved("fit", "a", None, None) == ("runs/a-2", None)
        make("runs/a-2")
        assert resolved("fit", "a", None, None) == ("runs/a-3", None)
        assert resolved("fit", "b", None, None) == ("runs/b", None)

    def test_a_file_of_the_name_is_in_the_way_too(self) -> None:
        Path("runs").mkdir()
        Path("runs/a").touch()
        assert resolved("fit", "a", None, None) == ("runs/a-2", None)

    def test_run_dir_gets_a_suffix_where_it_stands(self) -> None:
        assert resolved("fit", "a", "some/where", None) == ("some/where", None)
        make("some/where", "some/where-2")
        assert resolved("fit", "a", "some/where", None) == ("some/where-3", None)
        assert resolved("fit", "a", "some/where-2", None) == ("some/where-2-2", None)
        assert unused_directory(Path("some/where/")) == Path("some/where-3")

    def test_last_continues_in_place(self) -> None:
        make("runs/a", "runs/a-2", "elsewhere")
        assert resolved("fit", "a", None, "last") == ("runs/a-2", "runs/a-2/checkpoints/last.ckpt")
        assert resolved("fit", "a", "elsewhere", "last") == ("elsewhere", "elsewhere/checkpoints/last.ckpt")

    def test_any_other_checkpoint_begins_a_run_of_its_own(self) -> None:
        make("runs/a", "runs/a-2", "elsewhere")
        assert resolved("fit", "a", None, "best") == ("runs/a-3", "runs/a-2/checkpoints/best.ckpt")
        assert resolved("fit", "a", "elsewhere", "best") == ("elsewhere-2", "elsewhere/checkpoints/best.ckpt")
        for path in ("runs/a/checkpoints/last.ckpt", "runs/a/checkpoints/best.ckpt"):
            assert resolved("fit", "a", None, path) == ("runs/a-3", path)
            assert resolved("fit", "a", "fresh", path) == ("fresh", path)

    def test_the_base_is_refused(self) -> None:
        make("runs/a")
        for run_dir in (None, "runs/a"):
            with pytest.raises(LabError, match="^fit starts from the base anyway"):
                resolve_run("fit", "a", run_dir, "base")


@pytest.mark.parametrize("command", EVALUATIONS)
class TestEvaluations:
    def test_without_a_checkpoint_the_choices_are_named(self, command: str) -> None:
        make("runs/a")
        for run_dir in (None, "runs/a"):
            with pytest.raises(LabError, match=rf"^{command} needs --ckpt_path: best or last .* \.ckpt file, or base"):
                resolve_run(command, "a", run_dir, None)

    def test_the_base_needs_no_run(self, command: str) -> None:
        assert resolved(command, "a", None, "base") == ("runs/a", None)
        assert resolved(command, "a", "some/where", "base") == ("some/where", None)
        make("runs/a", "runs/a-2")
        assert resolved(command, "a", None, "base") == ("runs/a-2", None)

    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_best_and_last(self, command: str, checkpoint: str) -> None:
        make("runs/a", "runs/a-2", "some/where")
        path = f"runs/a-2/checkpoints/{checkpoint}.ckpt"
        assert resolved(command, "a", None, checkpoint) == ("runs/a-2", path)
        path = f"some/where/checkpoints/{checkpoint}.ckpt"
        assert resolved(command, "a", "some/where", checkpoint) == ("some/where", path)


class TestFile:
    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_in_a_run_leads_to_that_run(self, command: str) -> None:
        make("runs/a", "elsewhere/b")
        path = "elsewhere/b/checkpoints/best.ckpt"
        assert resolved(command, "a", None, path) == ("elsewhere/b", path)
        assert resolved(command, "a", "some/where", path) == ("some/where", path)

    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_named_from_inside_its_folder(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make("elsewhere/b")
        monkeypatch.chdir("elsewhere/b/checkpoints")
        run_dir, checkpoint = resolved(command, "a", None, "best.ckpt")
        assert Path(run_dir) == Path.cwd().parent
        assert checkpoint == "best.ckpt"

    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_anywhere_else(self, command: str) -> None:
        Path("kept").mkdir()
        Path("kept/good.ckpt").touch()
        assert resolved(command, "a", None, "kept/good.ckpt") == ("runs/a", "kept/good.ckpt")
        make("runs/a", "runs/a-2")
        assert resolved(command, "a", None, "kept/good.ckpt") == ("runs/a-2", "kept/good.ckpt")
        assert resolved(command, "a", "runs/a", "kept/good.ckpt") == ("runs/a", "kept/good.ckpt")


@pytest.mark.parametrize("command", ["fit", *EVALUATIONS])
class TestAnyCommand:
    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_no_run_of_the_name(self, command: str, checkpoint: str) -> None:
        make("runs/a-b")
        with pytest.raises(LabError, match="^there is no run of the name a under runs/; train one with `fit`"):
            resolve_run(command, "a", None, checkpoint)

    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_a_run_without_that_checkpoint(self, command: str, checkpoint: str) -> None:
        make("runs/a", checkpoints=({"best": "last", "last": "best"}[checkpoint],))
        for run_dir in (None, "runs/a", "nowhere"):
            path = f"{run_dir or 'runs/a'}/checkpoints/{checkpoint}.ckpt: no such checkpoint"
            with pytest.raises(LabError, match=f"^{path}"):
                resolve_run(command, "a", run_dir, checkpoint)

    @pytest.mark.parametrize("path", ["no.ckpt", "runs/a/checkpoints", "Best", ""])
    def test_no_such_file(self, command: str, path: str) -> None:
        make("runs/a")
        with pytest.raises(LabError, match=f"^{path}: no such checkpoint; pass best, last, base or a .ckpt file"):
            resolve_run(command, "a", None, path)


class TestNewestRun:
    def test_none(self) -> None:
        assert newest_run("a") is None  # there is no runs/ at all
        make("runs/a-b")
        assert newest_run("a") is None

    @pytest.mark.parametrize(
        ("name", "newest"),
        [
            ("a", "a-10"),
            ("a-b", "a-b-2"),
            ("a-b-2", "a-b-2"),
            ("lr3e-4_r16", "lr3e-4_r16"),
            ("1.5", "1.5"),
            ("a+b", "a+b"),
            ("x", None),
        ],
    )
    def test_the_highest_number_of_exactly_that_name(self, name: str, newest: str | None) -> None:
        make("runs/a", "runs/a-2", "runs/a-9", "runs/a-10", "runs/a-b", "runs/a-b-2", "runs/ab", "runs/a-11x")
        make("runs/lr3e-4_r16", "runs/lr3e-4_r160", "runs/1.5", "runs/1x5-2", "runs/a+b")
        assert newest_run(name) == (Path("runs") / newest if newest else None)

    def test_the_first_run_of_another_name_is_not_the_second_of_this(self) -> None:
        make("runs/a", "runs/a-2", "runs/a-3")
        for run, name in (("a", "a"), ("a-2", "a"), ("a-3", "a-3")):
            (Path("runs") / run / "environment.json").write_text(json.dumps({"name": name}))
        assert newest_run("a") == Path("runs/a-2")
        assert newest_run("a-3") == Path("runs/a-3")
        assert newest_run("a-2") is None
        (Path("runs/a-3/environment.json")).write_text("{")  # nothing is known of it
        assert newest_run("a") == Path("runs/a-3")

    def test_a_file_is_no_run(self) -> None:
        make("runs/a")
        Path("runs/a-2").touch()
        assert newest_run("a") == Path("runs/a")

    def test_a_new_run_is_the_newest_after_an_old_one_was_deleted(self) -> None:
        make("runs/a-2")  # runs/a has been deleted
        new = resolve_run("fit", "a", None, None).run_dir
        new.mkdir()
        assert newest_run("a") == new

    def test_a_name_with_brackets(self) -> None:
        make("runs/a[1]")
        assert newest_run("a[1]") == Path("runs/a[1]")
