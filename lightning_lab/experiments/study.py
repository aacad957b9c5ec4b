"""The runs of a sweep as trials in Optuna's storage, which any number of workers share.

A run is queued as a trial just before it begins. A trial whose worker is gone has failed without an error, and its run
is queued again. Workers may queue one run twice in the same moment: the first trial of a name counts, then the first
that was queued in its place.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from typing_extensions import override

from lightning_lab.errors import LabError
from lightning_lab.experiments.commands import say

DATABASE_TIMEOUT_S = 60  # SQLite: a worker waits this long for another one's write


@contextmanager
def usable_database(url: str, *also: type[Exception]) -> Iterator[None]:
    """One line for a database that is damaged, out of reach or without its driver.

    Args:
        url: SQLAlchemy's, for the message.
        also: Exceptions besides those of Optuna and SQLAlchemy that speak of it.

    """
    speaking_of_it: tuple[type[Exception], ...] = (SQLAlchemyError, OptunaError, *also)
    try:
        yield
    except speaking_of_it as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        with suppress(SQLAlchemyError):
            url = make_url(url).render_as_string(hide_password=True)
        raise LabError(
            f"{url}: the sweep's database cannot be used ({reason}); check sweep.storage, its server and driver; a "
            "damaged study.db can be deleted, and a grid then continues from its runs' checkpoints"
        ) from error


class _Storage(optuna.storages.RDBStorage):
    """Optuna's, whose heart goes on after a beat that could not be written."""

    @override
    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


class Study:
    """Optuna's study of a sweep, for one worker.

    Args:
        url: SQLAlchemy's URL of the database.
        name: The study's name in it.
        prune: Stop runs above the median.
        heartbeat_s: This worker says this often that it lives.
        grace_s: Unheard of for longer, a worker is dead.

    Raises:
        LabError: The database cannot be used.

    """

    def __init__(self, url: str, name: str, *, prune: bool, heartbeat_s: int, grace_s: int) -> None:
        self.grace_s = grace_s
        self._taken = 0  # number of the trial in progress
        timeout = {"connect_args": {"timeout": DATABASE_TIMEOUT_S}}
        engine = timeout if url.startswith("sqlite") else {"pool_pre_ping": True}
        pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats
        with usable_database(url, ImportError, RuntimeError, KeyError, ValueError):
            for attempts_left in (2, 1, 0):
                try:
                    storage = _Storage(url, engine, heartbeat_interval=heartbeat_s, grace_period=grace_s)
                    break
                except (IntegrityError, ProgrammingError):  # another machine makes the same tables
                    if not attempts_left:
                        raise
                    time.sleep(1)
            self.optuna = optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)

    def define(self, definition: dict[str, Any], directory: str) -> None:
        """Write down what the sweep is; once a run has been queued, see that it is still the same.

        Raises:
            LabError: Names the first setting that is not.

        """
        before = self.optuna.user_attrs.get("definition", {}) if self.runs() else {}
        for key in before:
            if key in definition and before[key] != definition[key]:
                raise LabError(
                    f"{directory} is a sweep with {key} {before[key]!r}, not {definition[key]!r}; put it back, pass "
                    "another --run_dir, or delete the sweep"
                )
        self.optuna.set_user_attr("definition", before | definition)

    def runs(self) -> dict[str, FrozenTrial]:
        """The runs that have been queued, in that order: for each name the trial that counts."""
        runs: dict[str, FrozenTrial] = {}
        for trial in self.optuna.get_trials():
            name = trial.user_attrs.get("name")
            if name is not None and (name not in runs or trial.user_attrs.get("retry_of") == runs[name].number):
                runs[name] = trial
        return runs

    def queue(self, attributes: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> None:
        """Queue a run: its ``name``, and its ``settings`` unless it is to draw them."""
        self.optuna.enqueue_trial(dict(params or {}), user_attrs=dict(attributes))

    def requeue(self, *, failed: bool = False) -> dict[str, FrozenTrial]:
        """Queue again what lost its worker, or on demand failed; return all runs."""
        optuna.storages.fail_stale_trials(self.optuna)
        past = datetime.now() - timedelta(seconds=self.grace_s)
        for trial in self.optuna.get_trials(states=(TrialState.RUNNING,)):
            # killed before its first heartbeat, without which Optuna never calls it stale
            if "begun" not in trial.user_attrs and trial.datetime_start and trial.datetime_start < past:
                self.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in self.runs().values():
            if trial.state == TrialState.FAIL and (failed or "error" not in trial.user_attrs):
                kept = {key: trial.user_attrs[key] for key in ("name", "settings") if key in trial.user_attrs}
                self.queue(kept | {"retry_of": trial.number}, trial.params)
        return self.runs()

    def take(self, objective: Callable[[optuna.Trial], float]) -> None:
        """Take the first run that waits; a LabError of the objective is its error."""
        try:
            self.optuna.optimize(lambda trial: self._run(objective, trial), 1, catch=(LabError,))
        except (ValueError, UpdateFinishedTrialError):
            if self.optuna.get_trials()[self._taken].state == TrialState.RUNNING:
                raise
            say("another worker has taken this run over: this one was suspended, or without its database for long")

    def _run(self, objective: Callable[[optuna.Trial], float], trial: optuna.Trial) -> float:
        self._taken = trial.number
        name = trial.user_attrs.get("name")
        if name is None or self.runs()[name].number != trial.number:
            raise LabError("another worker has queued this run too, or has taken it over")  # the trial does not count
        trial.set_user_attr("begun", True)
        try:
            return objective(trial)
        except LabError as error:
            trial.set_user_attr("error", str(error))
            raise

    def seed_sampler(self, kind: str, *key: int) -> None:
        """Make the next draws depend on a key alone, so that a search that was killed in between repeats them."""
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random = kind == "random"
        self.optuna.sampler = optuna.samplers.RandomSampler(seed) if random else optuna.samplers.TPESampler(seed=seed)
