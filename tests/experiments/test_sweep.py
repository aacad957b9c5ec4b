"""A sweep's settings, and its workers against kills, on a stand-in for training that takes milliseconds."""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_lab.errors import LabError
from lightning_lab.experiments.points import SweepSettings
from lightning_lab.experiments.sweep import Sweep
from tests.experiments.fake_lab import STEPS, loss, sweep_of
from tests.processes import processes_in

ROOT = Path(__file__).parents[2]
GRID = {"grid": {"model.lr": [1e-4, 2e-4, 3e-4], "model.r": [8, 16]}}
PRUNED = {"prune": True, "trials": 14}  # TPE draws at random until ten trials have ended
SEARCH = {
    "search": {"model.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "model.r": {"choices": [8, 16, 32]}},
    "trials": 6,
}


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            (SEARCH | GRID, "a search and a grid"),
            (SEARCH | {"trials": 0}, "sweep.trials is 0; it must be at least 1"),
            (SEARCH | {"seed": -1}, "sweep.seed is -1; it must be between 0 and"),
            (GRID | {"seed": 2**32}, "sweep.seed is 4.29497e"),
            (GRID | {"prune": True}, "for a search"),
        ],
    )
    def test_settings_that_exclude_each_other(self, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(LabError, match=says):
            sweep_of(tmp_path, settings)


def _hear_hangups() -> None:
    """The tests themselves may run under nohup, and what is ignored is inherited."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(
    folder: Path, settings: dict[str, Any], step_s: float = 0.02, before: tuple[str, ...] = (), grace_s: int = 1
) -> "subprocess.Popen[str]":
    fake = str(ROOT / "tests" / "experiments" / "fake_lab.py")
    return subprocess.Popen(
        [*before, sys.executable, fake, "worker", "sweep", json.dumps(settings)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STEP_S": str(step_s), "GRACE_S": str(grace_s)},
        preexec_fn=_hear_hangups,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, settings: dict[str, Any], status: int = 0, step_s: float = 0.02) -> str:
    """One worker in this process, which has Optuna imported; return what it says."""
    said, stderr = (folder / "stderr.log").open("w"), os.dup(2)
    with pytest.MonkeyPatch.context() as patch, said:
        patch.chdir(folder)
        patch.setenv("STEP_S", str(step_s))
        patch.setenv("PYTHONPATH", str(ROOT))
        os.dup2(said.fileno(), 2)
        try:
            result = sweep_of(Path("sweep"), settings).run()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    errors = (folder / "stderr.log").read_text()
    assert result == status, errors
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
    finish(folder, SEARCH | PRUNED)
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
    """The worker, and the run that it started, which leads a session of its own."""
    process.kill()
    process.communicate()
    for pid in processes_in(folder):
        os.kill(pid, signal.SIGKILL)


def wait_for_steps(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Until so many steps have been made in all, or the worker has ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and (
        not (folder / "steps.log").exists() or len((folder / "steps.log").read_text().splitlines()) < count
    ):
        assert time.monotonic() < deadline, "so many steps were never made"
        time.sleep(0.002)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_at_random_points_it_ends_as_if_left_alone(whole: Path, tmp_path: Path, seed: int) -> None:
    """By SIGKILL of the worker, of worker and run, or by SIGTERM, which finishes a step first."""
    chance = random.Random(seed)
    ways = ["worker", "both", "term"]
    for i, after in enumerate(sorted(chance.sample(range(1, 6 * STEPS), 3))):
        process = start(tmp_path, GRID)
        wait_for_steps(tmp_path, after, process)
        time.sleep(chance.random() * 0.1)
        how = ways[(i + seed) % 3]
        if how == "both":
            kill_tree(process, tmp_path)
        elif how == "worker":
            process.kill()
            process.communicate()
        else:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            # a run that outlived its worker may have made these steps: this one had not begun (-15), or had ended
            assert process.returncode in (143, 0, -15)
    finish(tmp_path, GRID)
    assert record(tmp_path) == record(whole)
    for trial in record(whole):
        ours, theirs = (folder / "sweep" / trial["run"] / "metrics.csv" for folder in (tmp_path, whole))
        assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4])
def test_killed_while_it_begins(whole: Path, tmp_path: Path, delay: float) -> None:
    process = start(tmp_path, GRID)
    deadline = time.monotonic() + 60
    while not (tmp_path / "sweep").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    kill_tree(process, tmp_path)
    finish(tmp_path, GRID)
    assert record(tmp_path) == record(whole)


def test_two_workers_share_the_trials(whole: Path, tmp_path: Path) -> None:
    # where nobody dies, a busy machine must not make it look so
    workers = [start(tmp_path, GRID, step_s=0.2, grace_s=3) for _ in range(3)]
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
    settings = {"grid": {"model.lr": [1e-4, 2e-4]}}
    process = start(tmp_path, settings, step_s=0.4)
    wait_for_steps(tmp_path, 1, process)
    process.kill()
    process.communicate()
    errors = finish(tmp_path, settings)
    assert "is still run by the process that a killed worker left; waiting for it" in errors
    made = (tmp_path / "steps.log").read_text().splitlines()
    # each once, and the next trial only after it
    assert made == [f"{name} {step}" for name in ("lr1e-4", "lr2e-4") for step in range(1, STEPS + 1)]


def test_a_suspended_worker_gives_its_run_away(tmp_path: Path) -> None:
    """Unheard of for longer than the grace period it counts as dead; awake again it does no harm."""
    settings = {"grid": {"model.lr": [1e-4]}}
    suspended = start(tmp_path, settings, step_s=0.3)
    wait_for_steps(tmp_path, 1, suspended)
    suspended.send_signal(signal.SIGSTOP)
    errors = finish(tmp_path, settings)
    assert "is still run by the process that a killed worker left" in errors
    suspended.send_signal(signal.SIGCONT)
    errors = suspended.communicate(timeout=30)[1]
    assert suspended.returncode == 0, errors
    assert "another worker has taken this run over" in errors
    assert record(tmp_path)[0]["state"] == "complete"
    assert set(steps(tmp_path).values()) == {1}


def test_killed_before_its_first_heartbeat(tmp_path: Path) -> None:
    """Optuna's own remedy does not see such a trial."""
    sweep = sweep_of(tmp_path / "sweep", {"grid": {"model.lr": [1e-4]}})
    sweep.open()
    sweep.study.queue("lr1e-4", sweep.runs["lr1e-4"])
    sweep.study.optuna.ask()
    finish(tmp_path, {"grid": {"model.lr": [1e-4]}})
    assert [t["state"] for t in record(tmp_path)] == ["complete"]


def test_a_run_that_two_workers_queue_is_made_once(tmp_path: Path) -> None:
    sweep_of(tmp_path / "sweep", {"grid": {"model.lr": [1e-4]}}).open()
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={"name": "lr1e-4", "settings": {"model.lr": 1e-4}})
    finish(tmp_path, {"grid": {"model.lr": [1e-4]}})
    assert [t["state"] for t in record(tmp_path)] == ["complete"]
    assert (tmp_path / "sweep" / "logs" / "lr1e-4.log").read_text().count("$ ") == 2  # fit, test


class TestDatabase:
    def test_machines_share_a_sweep_through_any_url(self, whole: Path, tmp_path: Path) -> None:
        """Each has a directory of its own."""
        settings = GRID | {"storage": f"sqlite:///{tmp_path}/shared.db"}
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        workers = [start(folder, settings, step_s=0.15, grace_s=3) for folder in folders]
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
        assert record(folders[0]) == record(folders[1]) == record(whole)
        assert sum((steps(folder) for folder in folders), Counter()) == steps(whole)
        assert not (folders[0] / "sweep" / "study.db").exists()

    @pytest.mark.parametrize("content", [b"", b"no database" * 1000, None])
    def test_that_is_damaged(self, whole: Path, tmp_path: Path, content: bytes | None) -> None:
        shutil.copytree(whole / "sweep", tmp_path / "sweep")
        database = tmp_path / "sweep" / "study.db"
        whole_content = database.read_bytes()
        database.write_bytes(content if content is not None else whole_content[:5000] + bytes(9000))
        if content == b"":  # as good as none: a grid finds its runs again
            finish(tmp_path, GRID)
            assert record(tmp_path) == record(whole)
            return
        with pytest.raises(LabError, match=r"study\.db: the sweep's database cannot be used \(.*can be deleted"):
            sweep_of(tmp_path / "sweep", GRID).run()

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("mysql+pymysql://me:secret@nowhere/x", r"me:\*\*\*@nowhere/x: .*No module named 'pymysql'"),
            ("sqlite:////nowhere/x.db", "unable to open database file"),
            ("sqlite:///{x}.db", "cannot be used"),
            ("nonsense", "Could not parse"),
            ("other://me:secret@nowhere/x", r"me:\*\*\*@nowhere"),
        ],
    )
    def test_that_cannot_be_reached(self, tmp_path: Path, url: str, says: str) -> None:
        with pytest.raises(LabError, match=says) as error:
            sweep_of(tmp_path / "sweep", GRID | {"storage": url}).run()
        assert "secret" not in str(error.value)


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
    assert [t["state"] for t in record(tmp_path)] == ["complete", "failed", "complete"]


def test_a_run_killed_by_the_system_is_a_failed_trial(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4]}}
    process = start(tmp_path, settings, step_s=0.5)
    wait_for_steps(tmp_path, 1, process)
    for pid in processes_in(tmp_path) - {process.pid}:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    assert record(tmp_path)[0]["error"] == "killed by SIGKILL, most likely for memory"
    finish(tmp_path, settings | {"retry_failed": True})
    assert record(tmp_path)[0]["state"] == "complete"


def test_a_run_that_is_stopped_alone_stops_its_worker(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4]}}
    process = start(tmp_path, settings, step_s=0.3)
    wait_for_steps(tmp_path, 1, process)
    for pid in processes_in(tmp_path) - {process.pid}:
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    finish(tmp_path, settings)
    assert set(steps(tmp_path).values()) == {1}


def test_a_damaged_run_is_a_failed_trial(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4, 2e-4]}}
    process = start(tmp_path, settings)
    wait_for_steps(tmp_path, STEPS + 1, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    (tmp_path / "sweep" / "trials" / "lr2e-4" / "config.yaml").write_text("[")
    with (tmp_path / "sweep" / "trials" / "lr2e-4" / "checkpoints" / "last.ckpt").open("w") as file:
        file.write("8")  # nothing left to train, so that the stand-in leaves the rest
    (tmp_path / "sweep" / "trials" / "lr2e-4" / "metrics.csv").write_text("step,train_loss,val_loss\n1,x,\n")
    finish(tmp_path, settings, status=1)
    assert "metrics.csv line 2" in record(tmp_path)[1]["error"]
    assert record(tmp_path)[0]["state"] == "complete"


def test_a_grid_can_grow(whole: Path, tmp_path: Path) -> None:
    finish(tmp_path, {"grid": {"model.lr": [1e-4], "model.r": [8, 16]}})
    finish(tmp_path, GRID)
    assert set(steps(tmp_path).values()) == {1}
    assert {t["name"]: t["value"] for t in record(tmp_path)} == {t["name"]: t["value"] for t in record(whole)}


def test_points_that_are_taken_out_before_they_begin_are_not_run(tmp_path: Path) -> None:
    process = start(tmp_path, {"grid": {"model.lr": [1e-4, 7.0, 2e-4]}}, step_s=0.2)
    wait_for_steps(tmp_path, 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    finish(tmp_path, {"grid": {"model.lr": [1e-4, 2e-4]}})
    assert [t["name"] for t in record(tmp_path)] == ["lr1e-4", "lr2e-4"]
    finish(tmp_path, {"grid": {"model.lr": [1e-4, 7.0, 2e-4]}}, status=1)  # and put back
    assert {t["name"]: t["state"] for t in record(tmp_path)} == {
        "lr1e-4": "complete",
        "lr2e-4": "complete",
        "lr7": "failed",
    }


def test_a_name_that_now_means_something_else(tmp_path: Path) -> None:
    finish(tmp_path, {"settings": [{"name": "baseline", "model.lr": 1e-4}]})
    with pytest.raises(LabError, match="a run baseline with {'model.lr': 0.0001} is there already"):
        finish(tmp_path, {"settings": [{"name": "baseline", "model.lr": 2e-4}]})
    assert [t["settings"] for t in record(tmp_path)] == [{"model.lr": 1e-4}]


def test_names_beside_each_other_are_runs_of_their_own(tmp_path: Path) -> None:
    """`fit --run_dir x` must write to x although x-2 is there."""
    settings = [{"name": "x-2", "model.lr": 1e-4}, {"name": "x", "model.lr": 2e-4}, {}]
    finish(tmp_path, {"settings": settings})
    assert sorted(p.name for p in (tmp_path / "sweep" / "trials").iterdir()) == ["base", "x", "x-2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    settings = {"grid": {"model.lr": [1e-4, 2e-4]}}
    process = start(tmp_path, settings, step_s=0.2)
    wait_for_steps(tmp_path, 1, process)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert "the same command continues the sweep" in errors
    assert [t["state"] for t in record(tmp_path)] == ["waiting", "waiting"]
    assert processes_in(tmp_path) == set()
    finish(tmp_path, settings)
    assert set(steps(tmp_path).values()) == {1}  # it went on from the very step


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, {"grid": {"model.lr": [1e-4]}}, step_s=5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("sweep/trials/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=4)
    assert process.returncode == 130
    assert processes_in(tmp_path) == set()


def test_nohup_is_respected(tmp_path: Path) -> None:
    settings = {"grid": {"model.lr": [1e-4]}}
    process = start(tmp_path, settings, step_s=0.1, before=("nohup",))
    wait_for_steps(tmp_path, 1, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0
    assert record(tmp_path)[0]["state"] == "complete"


class TestAnotherSweep:
    def test_in_the_same_directory(self, tmp_path: Path) -> None:
        def sweep(base: str, **settings: Any) -> Sweep:
            directory = tmp_path / "sweep"
            return Sweep(directory, SweepSettings(**settings), base, dict, lambda: None, ("false",))

        sweep("model: {lr: 1, r: 4}", **GRID).open()
        sweep("model: {lr: 1, r: 4}", **GRID).open()
        sweep("model: {lr: 1, r: 5}", **GRID).open()  # nothing has begun: it can still be put right
        assert sweep("model: {lr: 1, r: 5}", **GRID).run() == 1
        with pytest.raises(LabError, match=r"a sweep with model\.r 5, not 6"):
            sweep("model: {lr: 1, r: 6}", **GRID).run()
        with pytest.raises(LabError, match=r"a sweep with sweep\.search None, not"):
            sweep("model: {lr: 1, r: 5}", **SEARCH).run()
        with pytest.raises(LabError, match=r"with sweep\.tie None, not"):
            sweep("model: {lr: 1, r: 5}", **GRID, tie={"model.alpha": "model.r"}).run()
        sweep("model: {lr: 1, r: 5, new: 1}", **GRID).open()  # a key that an older version did not know

    def test_over_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.csv").write_text("")
        sweep = Sweep(tmp_path, SweepSettings(**GRID), "", dict, lambda: None)
        with pytest.raises(LabError, match="exists and is not a sweep"):
            sweep.run()
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


class TestSearch:
    def test_it_draws_in_the_ranges_and_tests_the_best(self, searched: Path) -> None:
        trials = record(searched)
        assert [t["name"] for t in trials] == [f"trial-{n:03d}" for n in range(14)]
        assert all(1e-5 <= t["settings"]["model.lr"] <= 1e-3 for t in trials)
        assert {t["settings"]["model.r"] for t in trials} <= {8, 16, 32}
        assert len({t["settings"]["model.lr"] for t in trials}) == 14
        best = min((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
        tested = [t["name"] for t in trials if (searched / "sweep" / t["run"] / "test.json").is_file()]
        assert tested == [best["name"]]

    def test_a_run_above_the_median_is_stopped_at_its_validation(self, searched: Path) -> None:
        """Once five are complete, against the complete ones' losses at the same step."""
        complete: list[float] = []
        states = []
        for trial in record(searched):
            first = loss(trial["settings"]["model.lr"], trial["settings"]["model.r"], STEPS // 2)
            states.append("pruned" if len(complete) >= 5 and first > statistics.median(complete) else "complete")
            if states[-1] == "complete":
                complete.append(first)
        assert [t["state"] for t in record(searched)] == states
        assert set(states) == {"complete", "pruned"}

    def test_killed_it_draws_the_same(self, searched: Path, tmp_path: Path) -> None:
        chance = random.Random(0)
        settings = SEARCH | PRUNED
        for after in sorted([*chance.sample(range(1, 60), 2), 85]):
            process = start(tmp_path, settings)
            wait_for_steps(tmp_path, after, process)
            time.sleep(chance.random() * 0.1)
            kill_tree(process, tmp_path)
        finish(tmp_path, settings)
        assert record(tmp_path) == record(searched)
        study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
        assert sum(trial.state.name != "FAIL" for trial in study.trials) == 14  # one a run beside the interrupted

    def test_workers_never_make_too_many(self, tmp_path: Path) -> None:
        workers = [start(tmp_path, SEARCH, step_s=0.15, grace_s=3) for _ in range(3)]
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
        assert len(record(tmp_path)) == 6
        assert set(steps(tmp_path).values()) == {1}

    def test_a_failed_trial_is_tried_again_with_its_values(self, tmp_path: Path) -> None:
        settings = {"search": {"model.lr": {"choices": [1e-4, 5.0]}}, "trials": 5}
        finish(tmp_path, settings, status=1)
        before = record(tmp_path)
        assert {t["state"] for t in before} == {"complete", "failed"}
        finish(tmp_path, settings | {"retry_failed": True}, status=1)
        after = record(tmp_path)
        assert sorted(t["name"] for t in after) == sorted(t["name"] for t in before)
        assert {t["name"]: t["settings"] for t in after} == {t["name"]: t["settings"] for t in before}

    def test_drawn_values_that_cannot_run_are_failed_trials(self, tmp_path: Path) -> None:
        """The ends of the range can; what lies between them cannot, and is never started."""

        def resolve(settings: Mapping[str, Any]) -> Mapping[str, Any]:
            if settings["model.lr"] not in (1.0, 2.0):
                raise LabError(f"model.lr is {settings['model.lr']}; it must be whole")
            return settings

        settings = SweepSettings(search={"model.lr": {"low": 1.0, "high": 2.0}}, trials=3)
        directory = tmp_path / "sweep"
        sweep = Sweep(directory, settings, "model: {}", resolve, lambda: None, ("false",))
        assert sweep.run() == 1
        assert [t["state"] for t in record(tmp_path)] == ["failed"] * 3
        assert all("it must be whole" in t["error"] for t in record(tmp_path))
        assert not list((directory / "logs").iterdir())

    def test_more_trials_can_be_asked_for(self, tmp_path: Path) -> None:
        finish(tmp_path, SEARCH | {"trials": 2})
        finish(tmp_path, SEARCH | {"trials": 3})
        assert len(record(tmp_path)) == 3

    def test_tied_and_nested(self, tmp_path: Path) -> None:
        settings = {"search": {"model": {"r": {"choices": [8, 16]}}}, "tie": {"model.alpha": "2*model.r"}, "trials": 2}
        finish(tmp_path, settings)
        assert all(t["settings"]["model.alpha"] == 2 * t["settings"]["model.r"] for t in record(tmp_path))
