"""The runs of a sweep as trials in Optuna's storage, which any number of workers share.

A run is queued as a trial just before it begins. Where its worker is gone or was stopped, that trial fails without an
error, and the run is queued again as another one with the same values: what a suspended worker, or one that sees this
late, still says of the first cannot touch the second. Workers may queue one run twice in the same moment: of the trials
that follow a failed one, the first counts.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from typing_extensions import override

from lightning_lab.errors import LabError
from lightning_lab.experiments.commands import say
from lightning_lab.experiments.points import SweepSettings, draw

SAMPLERS: dict[str, Any] = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
DATABASE_TIMEOUT_S = 60  # SQLite: a worker waits this long for another one's write


@contextmanager
def usable_database(url: str, *kinds: type[Exception]) -> Iterator[None]:
    """One line for a database that is damaged, out of reach or without its driver.

    Args:
        url: SQLAlchemy's, for the message.
        kinds: Exceptions that speak of it, besides those of Optuna and SQLAlchemy.

    """
    known: tuple[type[Exception], ...] = (SQLAlchemyError, OptunaError, *kinds)
    try:
        yield
    except known as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        with suppress(SQLAlchemyError):
            url = make_url(url).render_as_string(hide_password=True)
        raise LabError(
            f"{url}: the sweep's database cannot be used ({reason}); check sweep.storage, its server and driver; a "
            "damaged study.db can be deleted, and a grid then continues from its runs' checkpoints"
        ) from error


class _Storage(optuna.storages.RDBStorage):
    """Optuna's, whose heart beats before a trial runs, and goes on after a beat that could not be written."""

    @override
    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)

    @override
    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state == TrialState.RUNNING:  # one killed before its first beat would never be stale
            self.record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)


class Study:
    """Optuna's study of a sweep, for one worker.

    Args:
        url: SQLAlchemy's URL of the database.
        name: The study's name in it.
        settings: The sampler and its seed.
        heartbeat_s: This worker says this often that it lives.
        grace_s: Unheard of for longer, a worker is dead.

    Raises:
        LabError: The database cannot be used.

    """

    def __init__(self, url: str, name: str, settings: SweepSettings, heartbeat_s: int, grace_s: int) -> None:
        self.settings = settings
        timeout = {"connect_args": {"timeout": DATABASE_TIMEOUT_S}}
        options = timeout if url.startswith("sqlite") else {"pool_pre_ping": True}
        connect = partial(_Storage, url, options, heartbeat_interval=heartbeat_s, grace_period=grace_s)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats
        with usable_database(url, Exception):
            try:
                storage = connect()
            except DBAPIError:  # another machine makes the same tables
                time.sleep(1)
                storage = connect()
            if url.startswith("sqlite"):  # taking a trial reads and then writes: the lock comes before the reading
                engine = storage.engine
                event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
                event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
                engine.dispose()  # the connection without them
            self.optuna = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)

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
        optuna.storages.fail_stale_trials(self.optuna)
        runs: dict[str, FrozenTrial] = {}
        for trial in self.optuna.get_trials():
            name = trial.user_attrs.get("name")
            if name is not None and (name not in runs or trial.user_attrs.get("after") == runs[name].number):
                runs[name] = trial
        failed = [(name, run) for name, run in runs.items() if run.state == TrialState.FAIL]
        interrupted = [(name, run) for name, run in failed if "error" not in run.user_attrs]
        for name, run in interrupted:
            self.queue(name, run)
        return self.runs() if interrupted else runs

    def queue(self, name: str, run: FrozenTrial) -> None:
        """Queue a run that is planned, was interrupted or has failed; its settings and values stay."""
        trial = create_trial(state=TrialState.WAITING, params=run.params, distributions=run.distributions)
        trial.user_attrs = {"name": name, "settings": run.user_attrs["settings"], "after": run.number}
        self.optuna.add_trial(trial)

    def take(self, objective: Callable[[optuna.Trial], float]) -> None:
        """Take the first run that waits; a LabError of the objective is its error."""
        try:
            self.optuna.optimize(lambda trial: self._run(objective, trial), 1, catch=(LabError,))
        except Exception as error:
            # a value for a trial that has ended breaks an assertion of Optuna's as well
            reason = error.__context__ if isinstance(error, AssertionError) else error
            if not isinstance(reason, UpdateFinishedTrialError) and "Cannot tell" not in str(reason):
                raise
            say("another worker has taken this run over: one was suspended, or without its database for long")

    def _run(self, objective: Callable[[optuna.Trial], float], trial: optuna.Trial) -> float:
        try:
            counted = self.runs().get(trial.user_attrs.get("name", ""))
            if counted is None or counted.number != trial.number:
                trial.set_user_attr("name", None)
                raise LabError("another worker has queued this run too, or has taken it")
            return objective(trial)
        except LabError as error:
            trial.set_user_attr("error", str(error))
            raise

    def draw(self, trial: optuna.Trial, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Values for a trial, or those it has: they depend on the seed, its run and the trials before alone."""
        seed = random.Random(f"{self.settings.seed} {trial.user_attrs['name']}").getrandbits(32)
        self.optuna.sampler = SAMPLERS[self.settings.sampler](seed=seed)
        return {key: draw(trial, key, range_) for key, range_ in space.items()}
