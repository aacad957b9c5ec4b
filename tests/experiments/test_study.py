"""Trials in Optuna's storage."""

import sqlite3
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_lab.errors import LabError
from lightning_lab.experiments.points import SweepSettings
from lightning_lab.experiments.study import Study


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_no_trial_is_taken_twice(tmp_path: Path) -> None:
    """Without a lock before the reading, four workers take 9 to 19 of 80 trials twice."""
    workers = [Study(f"sqlite:///{tmp_path}/study.db", "sweep", SweepSettings(), 5, 20) for _ in range(4)]
    for name in range(80):
        workers[0].optuna.enqueue_trial({}, user_attrs={"name": str(name)})

    def take(worker: Study) -> Iterable[int]:
        return [worker.optuna.ask().number for _ in range(20)]

    with ThreadPoolExecutor(len(workers)) as pool:
        taken = [number for numbers in pool.map(take, workers) for number in numbers]
    assert sorted(taken) == list(range(80))


class Workers:
    """Two workers, each with a connection of its own to one database, of which the first has taken a run."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "study.db"
        self.first, self.second = (
            Study(f"sqlite:///{self.database}", "sweep", SweepSettings(), 100, 200) for _ in range(2)
        )
        self.first.queue("a", create_trial(state=TrialState.WAITING, user_attrs={"settings": {"model.r": 8}}))
        self.taken = self.first.optuna.ask()

    def fall_silent(self) -> None:
        """No heartbeat of a worker has been heard for years."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute("UPDATE trial_heartbeats SET heartbeat = '2001-01-01 00:00:00'")

    def take_over(self) -> optuna.Trial:
        self.fall_silent()
        assert self.second.runs()["a"].state == TrialState.WAITING
        return self.second.optuna.ask()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore:fail_stale_trials")
class TestTakenOver:
    def test_by_another_in_the_moment_in_which_a_third_sees_it_stale(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workers = Workers(tmp_path)
        third = Study(f"sqlite:///{workers.database}", "sweep", SweepSettings(), 100, 200)
        change = third.optuna._storage.set_trial_state_values
        taken = []

        def after_another(*arguments: Any, **options: Any) -> bool:
            monkeypatch.undo()
            taken.append(workers.take_over())
            return change(*arguments, **options)

        workers.fall_silent()
        monkeypatch.setattr(third.optuna._storage, "set_trial_state_values", after_another)
        for worker in (third, workers.first, workers.second):
            run = worker.runs()["a"]
            assert (run.state, run.number) == (TrialState.RUNNING, taken[0].number)

    @pytest.mark.parametrize("end", [LabError("out of memory"), 0.5])
    def test_while_its_worker_was_suspended(self, tmp_path: Path, end: Any) -> None:
        workers = Workers(tmp_path)
        workers.first.optuna.tell(workers.taken, state=TrialState.FAIL)  # it stops, and continues
        workers.first.runs()
        successor = []

        def objective(trial: optuna.Trial) -> float:
            trial.suggest_float("model.lr", 0.0, 1.0)
            while not successor:  # its first heartbeat may come late
                workers.fall_silent()
                if workers.second.runs()["a"].state == TrialState.WAITING:
                    successor.append(workers.second.optuna.ask())
            if isinstance(end, float):
                return end
            raise end

        workers.first.take(objective)
        run = workers.second.runs()["a"]
        assert (run.state, run.number) == (TrialState.RUNNING, successor[0].number)
        assert run.user_attrs["settings"] == {"model.r": 8}
        assert run.params.keys() == {"model.lr"}
        workers.second.optuna.tell(successor[0], 0.25)
        assert workers.first.runs()["a"].value == 0.25

    def test_by_two_at_once(self, tmp_path: Path) -> None:
        """The run is made once, also where the one that counts fails."""
        workers = Workers(tmp_path)
        workers.fall_silent()
        lost = workers.first.runs()["a"]
        workers.second.queue("a", workers.first.optuna.trials[0])
        counted = workers.first.optuna.ask()
        assert lost.number == counted.number
        counted.set_user_attr("error", "out of memory")
        workers.first.optuna.tell(counted, state=TrialState.FAIL)
        workers.second.take(lambda trial: pytest.fail("made twice"))
        assert workers.second.runs()["a"].user_attrs["error"] == "out of memory"
