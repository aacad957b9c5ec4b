"""A sweep's settings, and its workers against kills, on a stand-in for training that takes milliseconds."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lab.errors import LabError
from lightning_lab.experiments.sweep import (
    Point,
    Sweep,
    SweepSettings,
    flatten_space,
    grid_points,
    run_name,
    tied,
)
from tests.experiments.fake_lab import STEPS, loss

ROOT = Path(__file__).parents[2]
GRID = {"grid": {"model.lr": [1e-4, 2e-4, 3e-4], "model.r": [8, 16]}}
SEARCH = {
    "search": {"model.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "model.r": {"choices": [8, 16, 32]}},
    "trials": 6,
}


class TestGrid:
    def test_every_combination_in_the_order_written(self) -> None:
        points = grid_points(SweepSettings(grid={"model.lr": [1e-4, 3e-4], "model.r": [16, 32]}))
        assert [p.name for p in points] == ["lr1e-4_r16", "lr1e-4_r32", "lr3e-4_r16", "lr3e-4_r32"]
        assert points[1].settings == {"model.lr": 1e-4, "model.r": 32}
        assert points[1].flags == ["--model.lr=0.0001", "--model.r=32"]

    def test_nested_keys_are_the_same(self) -> None:
        nested = grid_points(SweepSettings(grid={"model": {"lr": [1e-4], "r": [16, 32]}}))
        assert nested == grid_points(SweepSettings(grid={"model.lr": [1e-4], "model.r": [16, 32]}))

    def test_paired_settings_with_names_and_seeds(self) -> None:
        points = grid_points(
            SweepSettings(
                settings=[{"name": "low", "model.lr": 1e-4}, {"model.lr": 3e-4, "model.r": 32}],
                grid={"seed_everything": [1, 2]},
                tie=None,
            )
        )
        assert [p.name for p in points] == ["low_seed1", "low_seed2", "lr3e-4_r32_seed1", "lr3e-4_r32_seed2"]
        assert points[3].settings == {"model.lr": 3e-4, "model.r": 32, "seed_everything": 2}

    def test_alpha_follows_r(self) -> None:
        points = grid_points(SweepSettings(grid={"model.r": [16, 32]}, tie={"model.alpha": "model.r"}))
        assert [p.settings["model.alpha"] for p in points] == [16, 32]
        assert [p.name for p in points] == ["r16", "r32"]
        assert tied({"model.r": 16}, {"model.alpha": "2 * model.r"}) == {"model.r": 16, "model.alpha": 32}
        assert tied({"model.r": 5}, {"model.dropout": "0.01*model.r"})["model.dropout"] == pytest.approx(0.05)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({}, "no settings"),
            ({"grid": {"model.lr": 1e-4}}, "model.lr needs a list"),
            ({"grid": {"model.lr": []}}, "model.lr needs a list"),
            ({"grid": {"model.lr": [1e-4]}, "settings": [{"model.lr": 2e-4}]}, "model.lr is in sweep.grid and"),
            ({"settings": [{"model.lr": 1e-4}, {"name": "again", "model.lr": 1e-4}]}, "again come twice"),
            ({"grid": {"model.lr": [1e-4]}, "tie": {"model.alpha": "model.r"}}, "follows no key"),
            ({"grid": {"model.r": [1]}, "tie": {"model.r": "model.r"}}, "tied and set"),
            ({"grid": {"model.base": ["a"]}, "tie": {"model.alpha": "2*model.base"}}, "not a number"),
        ],
    )
    def test_what_cannot_be_combined(self, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(LabError, match=says):
            grid_points(SweepSettings(**settings))

    @given(
        st.dictionaries(
            st.sampled_from(["model.lr", "model.r", "data.source", "model.dora"]),
            st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.text()),
        )
    )
    def test_a_name_is_one_folder(self, settings: dict[str, Any]) -> None:
        name = run_name(settings)
        assert "/" not in name
        assert len(name) <= 120
        assert name.isprintable()

    def test_settings_of_one_name_get_numbers(self) -> None:
        long = {"data.source": ["/a/x.jsonl", "/a|x.jsonl"]}
        assert [p.name for p in grid_points(SweepSettings(grid=long))] == ["sourcea-x.jsonl", "sourcea-x.jsonl-2"]


class TestSpace:
    def test_whole_numbers_stay_whole(self) -> None:
        space = flatten_space(
            {"model": {"r": {"low": 4, "high": 64}, "lr": {"low": "1e-5", "high": 1e-3, "log": True}}}
        )
        assert space == {
            "model.r": {"low": 4, "high": 64},
            "model.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        }

    @pytest.mark.parametrize(
        "range_",
        [
            {"low": 1},
            {"low": 2, "high": 1},
            {"low": 0.0, "high": 1.0, "log": True},
            {"low": 1, "high": 2, "log": True, "step": 1},
            {"choices": []},
            {"choices": [1], "low": 1},
            {"low": "x", "high": 1},
            {"low": 1, "high": 2, "prior": 3},
            [1, 2],
        ],
    )
    def test_impossible_ranges(self, range_: Any) -> None:
        with pytest.raises(LabError, match=r"sweep\.search: model\.lr"):
            flatten_space({"model.lr": range_})

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            (SEARCH | GRID, "a search and a grid"),
            (SEARCH | {"trials": 0}, "at least 1"),
            (GRID | {"prune": True}, "for a search"),
            ({"grid": {"run_dir": ["a"]}}, "run_dir cannot be varied"),
            ({"settings": [{"sweep.seed": 1}]}, "sweep.seed cannot be varied"),
        ],
    )
    def test_settings_that_exclude_each_other(self, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(LabError, match=says):
            Sweep(tmp_path, SweepSettings(**settings), "", lambda point: point, lambda points: None)


def start(folder: Path, settings: dict[str, Any], step_s: float = 0.02, name: str = "sweep") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "experiments" / "fake_lab.py"), "worker", name, json.dumps(settings)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STEP_S": str(step_s)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, settings: dict[str, Any], status: int = 0, step_s: float = 0.02) -> str:
    process = start(folder, settings, step_s)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == status, errors
    return errors


def record(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sweep" / "sweep.json").read_text())["trials"]


def steps(folder: Path) -> Counter[str]:
    return Counter((folder / "steps.log").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, GRID)
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    finish(folder, SEARCH | {"prune": True})
    return folder


def test_a_grid_runs_each_setting_once(whole: Path) -> None:
    trials = record(whole)
    assert [t["name"] for t in trials] == [
        "lr1e-4_r8",
        "lr1e-4_r16",
        "lr2e-4_r8",
        "lr2e-4_r16",
        "lr3e-4_r8",
        "lr3e-4_r16",
    ]
    assert {t["state"] for t in trials} == {"complete"}
    expected = [loss(lr, r, STEPS) + 0.1 for lr in (1e-4, 2e-4, 3e-4) for r in (8, 16)]
    assert [t["value"] for t in trials] == pytest.approx(expected, abs=1e-12)
    assert set(steps(whole).values()) == {1}
    assert all((whole / "sweep" / t["run"] / "test.json").is_file() for t in trials)


def test_the_same_command_again_does_nothing(whole: Path) -> None:
    before = steps(whole)
    finish(whole, GRID)
    assert steps(whole) == before


def kill_tree(process: "subprocess.Popen[str]", folder: Path) -> None:
    """The worker and the run that it started, which leads a session of its own."""
    process.kill()
    process.communicate()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd") == str(folder):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_points_it_ends_as_if_left_alone(whole: Path, tmp_path: Path, seed: int) -> None:
    """By SIGKILL of the worker, of worker and run, or by SIGTERM, which finishes a step first."""
    chance = random.Random(seed)
    for _ in range(4):
        process = start(tmp_path, GRID)
        time.sleep(0.6 + chance.random() * 2)
        how = chance.choice(["worker", "both", "term"])
        if how == "both":
            kill_tree(process, tmp_path)
        elif how == "worker":
            process.kill()
            process.communicate()
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode in (-15, 0, 143)  # -15: before the first trial
    finish(tmp_path, GRID)
    assert record(tmp_path) == record(whole)
    for trial in record(whole):
        ours, theirs = (folder / "sweep" / trial["run"] / "metrics.csv" for folder in (tmp_path, whole))
        assert ours.read_text() == theirs.read_text()


def test_two_workers_share_the_trials(whole: Path, tmp_path: Path) -> None:
    workers = [start(tmp_path, GRID) for _ in range(3)]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors
    assert set(steps(tmp_path).values()) == {1}  # no step was made twice
    begun = Counter(line for error in errors for line in error.splitlines() if line.endswith("begins"))
    assert len(begun) == 6
    assert set(begun.values()) == {1}
    assert (
        sum(any(line.endswith("begins") for line in error.splitlines()) for error in errors) > 1
    )  # more than one worked
    assert record(tmp_path) == record(whole)


def test_a_run_whose_worker_was_killed_is_left_to_end(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4]}}
    process = start(tmp_path, settings, step_s=0.4)
    deadline = time.monotonic() + 30
    while not (tmp_path / "steps.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    errors = finish(tmp_path, settings)
    assert "is run by another process; waiting for it" in errors
    assert steps(tmp_path) == Counter(f"lr1e-4 {step}" for step in range(1, STEPS + 1))  # each once


def test_a_failed_trial_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4, 5.0, 2e-4]}}
    errors = finish(tmp_path, settings, status=1)
    trials = record(tmp_path)
    assert [t["state"] for t in trials] == ["complete", "failed", "complete"]
    assert trials[1]["error"] == "step 3: the loss is not finite (model.lr 5.0)"
    assert "--sweep.retry_failed true" in errors
    finish(tmp_path, settings, status=1)  # it stays failed
    assert (tmp_path / "sweep" / "logs" / "lr5.log").read_text().count("$ ") == 1
    finish(tmp_path, settings | {"retry_failed": True}, status=1)
    assert (tmp_path / "sweep" / "logs" / "lr5.log").read_text().count("$ ") == 2
    assert [t["state"] for t in record(tmp_path)] == [
        "complete",
        "complete",
        "failed",
    ]  # the trial that was tried again


def test_a_run_killed_by_the_system_is_a_failed_trial(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4]}}
    process = start(tmp_path, settings, step_s=0.5)
    while not (tmp_path / "steps.log").exists():
        time.sleep(0.01)
    subprocess.run(["pkill", "-KILL", "-f", "run_dir=sweep/trials/lr1e-4"], check=True)
    assert process.wait(timeout=30) == 1
    assert record(tmp_path)[0]["error"] == "killed by SIGKILL, most likely for memory"
    finish(tmp_path, settings | {"retry_failed": True})
    assert record(tmp_path)[0]["state"] == "complete"


def test_a_grid_can_grow(whole: Path, tmp_path: Path) -> None:
    finish(tmp_path, {"grid": {"model.lr": [1e-4], "model.r": [8, 16]}})
    finish(tmp_path, GRID)
    assert set(steps(tmp_path).values()) == {1}
    assert {t["name"]: t["value"] for t in record(tmp_path)} == {t["name"]: t["value"] for t in record(whole)}


def test_ctrl_c_stops_after_the_step_and_saves(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4, 2e-4]}}
    process = start(tmp_path, settings, step_s=0.2)
    while not (tmp_path / "steps.log").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "the same command continues the sweep" in errors
    assert [t["state"] for t in record(tmp_path)] == ["running", "waiting"]
    finish(tmp_path, settings)
    assert set(steps(tmp_path).values()) == {1}  # it went on from the very step


class TestAnotherSweep:
    def test_in_the_same_directory(self, tmp_path: Path) -> None:
        def sweep(base: str, **settings: Any) -> Sweep:
            return Sweep(
                tmp_path / "sweep", SweepSettings(**settings), base, lambda point: point, lambda points: None, ("true",)
            )

        sweep("model: {lr: 1, r: 4}", **GRID)._open()
        sweep("model: {lr: 1, r: 4}", **GRID)._open()
        with pytest.raises(LabError, match=r"a sweep with model\.r 4, not 5"):
            sweep("model: {lr: 1, r: 5}", **GRID).run()
        with pytest.raises(LabError, match="whose kind is grid, not search"):
            sweep("model: {lr: 1, r: 4}", **SEARCH).run()
        with pytest.raises(LabError, match="whose tie is None"):
            sweep("model: {lr: 1, r: 4}", **GRID, tie={"model.alpha": "model.r"}).run()

    def test_over_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.csv").write_text("")
        sweep = Sweep(tmp_path, SweepSettings(**GRID), "", lambda point: point, lambda points: None)
        with pytest.raises(LabError, match="exists and is not a sweep"):
            sweep.run()
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


class TestSearch:
    def test_it_draws_in_the_ranges_and_tests_the_best(self, searched: Path) -> None:
        trials = record(searched)
        assert [t["name"] for t in trials] == [f"trial-{n:03d}" for n in range(6)]
        assert all(1e-5 <= t["settings"]["model.lr"] <= 1e-3 for t in trials)
        assert {t["settings"]["model.r"] for t in trials} <= {8, 16, 32}
        assert len({t["settings"]["model.lr"] for t in trials}) == 6
        best = min((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
        tested = [t["name"] for t in trials if (searched / "sweep" / t["run"] / "test.json").is_file()]
        assert tested == [best["name"]]

    def test_a_run_above_the_median_is_stopped_at_its_validation(self, searched: Path) -> None:
        """Optuna's median pruner looks from the sixth run on."""
        trials = record(searched)
        first_validation = [loss(t["settings"]["model.lr"], t["settings"]["model.r"], STEPS // 2) + 0.1 for t in trials]
        last = first_validation.pop()
        median = sorted(first_validation)[2]
        assert [t["state"] for t in trials[:5]] == ["complete"] * 5
        assert trials[5]["state"] == ("pruned" if last > median else "complete")

    @pytest.mark.parametrize("seed", range(3))
    def test_killed_it_draws_the_same(self, searched: Path, tmp_path: Path, seed: int) -> None:
        chance = random.Random(seed)
        settings = SEARCH | {"prune": True}
        for _ in range(3):
            process = start(tmp_path, settings)
            time.sleep(0.8 + chance.random() * 1.5)
            kill_tree(process, tmp_path)
        finish(tmp_path, settings)
        assert record(tmp_path) == record(searched)

    def test_workers_never_make_too_many(self, tmp_path: Path) -> None:
        workers = [start(tmp_path, SEARCH) for _ in range(3)]
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
        assert len(record(tmp_path)) == 6
        assert set(steps(tmp_path).values()) == {1}

    def test_more_trials_can_be_asked_for(self, tmp_path: Path) -> None:
        finish(tmp_path, SEARCH | {"trials": 2})
        finish(tmp_path, SEARCH | {"trials": 3})
        assert len(record(tmp_path)) == 3

    def test_tied_and_nested(self, tmp_path: Path) -> None:
        settings = {"search": {"model": {"r": {"choices": [8, 16]}}}, "tie": {"model.alpha": "2*model.r"}, "trials": 2}
        finish(tmp_path, settings)
        assert all(t["settings"]["model.alpha"] == 2 * t["settings"]["model.r"] for t in record(tmp_path))


def test_flags_of_lists_and_nothing() -> None:
    point = Point(
        "p", {"model.target_modules": ["q_proj"], "data.rows": None, "model.dora": True, "data.source": "a b"}
    )
    assert point.flags == [
        '--model.target_modules=["q_proj"]',
        "--data.rows=null",
        "--model.dora=true",
        "--data.source=a b",
    ]
