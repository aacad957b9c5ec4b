"""Trials in Optuna's storage."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
