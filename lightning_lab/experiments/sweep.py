"""Many runs of one recipe: a grid of settings, or a search, that can be killed at any moment and continued.

A trial is an ordinary run directory, trained by ``fit`` in a process of its own. What has been done is in SQLite,
through Optuna's storage. Who is doing it is told by locks (flock), which the system drops when their holder dies,
however it dies: a trial that the database calls running and whose worker is gone is one to continue from its
checkpoint. A second lock is inherited by the trial's own process, so a run that outlived its worker is left in peace
until it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from lightning_lab.errors import LabError
from lightning_lab.experiments.points import (
    Point,
    SweepSettings,
    distinct,
    draw,
    drawn_point,
    grid_points,
    search_corners,
    search_space,
)
from lightning_lab.experiments.runs import SWEEP_FILE, TRIALS, flatten, read_run, write_whole

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

BASE_CONFIG = "base.yaml"
DATABASE = "study.db"
LOGS = "logs"
LOCKS = "locks"
DATABASE_TIMEOUT_S = 60  # a worker waits this long for another one's write
POLL_S = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNUSABLE = "{}?#%"  # in a directory's name they mean something in the database's address


class Sweep:
    """One worker of a sweep; several on the same directory share its trials.

    Args:
        directory: The sweep's directory; made if it is not there, continued if it is.
        settings: Which runs it consists of.
        base: The resolved config that every run starts from, as YAML text.
        resolve: Checks one point's flags and returns its settings as the config has them (``"1e-4"`` as a number).
        prepare: Called with points before the first trial, so that data and bases are made ready once.
        program: The command line that runs one command.

    Raises:
        LabError: Bad settings, or the directory holds something else.

    """

    def __init__(
        self,
        directory: Path,
        settings: SweepSettings,
        base: str,
        resolve: Callable[[Point], Point],
        prepare: Callable[[Sequence[Point]], None],
        program: Sequence[str] = (sys.executable, "-m", "lightning_lab"),
    ) -> None:
        self.directory = directory
        self.settings = settings
        self.base = base
        self.resolve = resolve
        self.prepare = prepare
        self.program = program
        self._received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._study: optuna.Study
        self._storage: optuna.storages.RDBStorage
        self._locks: dict[int, IO[str]] = {}  # of this worker's trials
        if settings.search and (settings.grid or settings.settings):
            raise LabError("the sweep is a search and a grid; keep sweep.search, or sweep.grid and sweep.settings")
        if settings.search and settings.trials < 1:
            raise LabError(f"sweep.trials is {settings.trials}; it must be at least 1")
        if settings.prune and not settings.search:
            raise LabError("sweep.prune is for a search: a grid runs each of its settings to the end")
        if any(character in str(directory) for character in UNUSABLE):
            raise LabError(f"{directory}: a sweep's directory cannot have any of {UNUSABLE} in its name; set --run_dir")
        self.space = search_space(settings.search or {})
        points = search_corners(settings, self.space) if self.space else grid_points(settings)
        self.points = [resolve(point) for point in points]  # of a search, those that are checked and prepared
        if not self.space:
            distinct(self.points, {})

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run every trial that nobody else runs; return 0, or 1 where some failed.

        Raises:
            LabError: The directory is another sweep's.
            SystemExit: A signal came; the trial in progress has saved its checkpoint.

        """
        self._open()
        # one that is ignored stays so: that is what nohup asks for
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            waited_for: set[int] = set()
            while True:
                number = self._claim()
                if number is not None:
                    self._run_trial(number)
                others = self._running() if number is None else []
                self._leave_if_signalled()
                if number is None and not others:
                    break
                for other in others:
                    if other not in waited_for:
                        self._say(other, "is run by another worker; waiting for it")
                if others:
                    waited_for |= set(others)
                    time.sleep(POLL_S)
            untested = self._test_best() if self._tests == "best" else None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        failed = [trial for trial in self._current() if trial.state.name == "FAIL"]
        for trial in failed:
            self._say(trial.number, f"failed: {trial.user_attrs.get('error')}")
        if failed:
            print("failed runs are tried again with --sweep.retry_failed true", file=sys.stderr)
        return 1 if failed or untested else 0

    def _open(self) -> None:
        """Make the sweep or continue it; the first worker prepares what all runs share, the others wait for it."""
        directory = self.directory
        names_of_files = (BASE_CONFIG, SWEEP_FILE, DATABASE)
        # a kill may leave temporary files and the database's journal
        own = (TRIALS, LOGS, LOCKS, *names_of_files, *(f".{name}." for name in names_of_files))
        if directory.is_dir():
            names = [entry.name for entry in directory.iterdir()]
            if BASE_CONFIG not in names and any(not name.startswith(own) for name in names):
                raise LabError(f"{directory}: exists and is not a sweep; pass another --run_dir")
        for folder in (TRIALS, LOGS, LOCKS):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        with self._exclusive("prepare.lock", waiting_for="another worker that prepares the data"):
            if not self._is_done():  # before anything is written down: it may find that a setting is wrong
                self.prepare(self.points or [Point("", {})])
        with self._exclusive():
            self._connect()
            self._define()
            self._enqueue()
            if self.settings.retry_failed:
                self._requeue_failed()
            self._write_state()

    def _connect(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._storage = optuna.storages.RDBStorage(
            f"sqlite:///{self.directory / DATABASE}", engine_kwargs={"connect_args": {"timeout": DATABASE_TIMEOUT_S}}
        )
        self._study = optuna.create_study(
            storage=self._storage, study_name="sweep", direction="minimize", load_if_exists=True
        )

    def _is_done(self) -> bool:
        """Whether every run that is asked for has ended, by what ``sweep.json`` says."""
        try:
            trials = json.loads((self.directory / SWEEP_FILE).read_text())["trials"]
        except (OSError, ValueError, KeyError):
            return False
        ended = [trial for trial in trials if trial["state"] in ("complete", "pruned", "failed")]
        if self.settings.retry_failed and any(trial["state"] == "failed" for trial in trials):
            return False
        if self.space:
            return len(ended) == len(trials) >= self.settings.trials
        settings = [trial["settings"] for trial in ended]
        return len(ended) == len(trials) and all(dict(point.settings) in settings for point in self.points)

    def _enqueue(self) -> None:
        """Queue a grid's new points; take back those that are no longer in it and have not begun."""
        import optuna

        if self.space:
            return
        wanted = [dict(point.settings) for point in self.points]
        for trial in self._current():
            waits = trial.state == optuna.trial.TrialState.WAITING
            if waits and trial.user_attrs["settings"] not in wanted:
                self._storage.set_trial_user_attr(self._id(trial.number), "withdrawn", True)
                self._storage.set_trial_state_values(self._id(trial.number), state=optuna.trial.TrialState.FAIL)
        current = {trial.user_attrs["name"]: trial.user_attrs["settings"] for trial in self._current()}
        new = [point for point in self.points if dict(point.settings) not in current.values()]
        for point in distinct(new, current):
            self._study.enqueue_trial({}, user_attrs={"name": point.name, "settings": dict(point.settings)})

    def _define(self) -> None:
        """Write down what the sweep is; once a run has begun, see that it is still the same."""
        definition = json.loads(
            json.dumps(
                {
                    "kind": "search" if self.space else "grid",
                    "search": {"space": self.space, "seed": self.settings.seed} if self.space else None,
                    "sampler": self.settings.sampler if self.space else None,
                    "prune": self.settings.prune,
                    "tie": self.settings.tie,
                }
            )
        )
        config, record = self.directory / BASE_CONFIG, self.directory / SWEEP_FILE
        begun = any(self.space or trial.state.name != "WAITING" for trial in self._current())
        if config.is_file() and record.is_file() and begun:
            import yaml

            before, now = (flatten(yaml.safe_load(text) or {}) for text in (config.read_text(), self.base))
            recorded = json.loads(record.read_text()).get("definition", {})
            for old, new in ((before, now), (recorded, definition)):
                for key in old:
                    if key in new and old[key] != new[key]:
                        raise LabError(
                            f"{self.directory} is a sweep with {key} {old[key]!r}, not {new[key]!r}; put it back, pass "
                            "another --run_dir, or delete the sweep"
                        )
            return
        empty = {"name": self.directory.name, "definition": definition, "trials": []}
        write_whole(record, (json.dumps(empty) + "\n").encode())
        write_whole(config, self.base.encode())

    @contextmanager
    def _exclusive(self, name: str = "sweep.lock", waiting_for: str = "") -> Iterator[None]:
        """One worker at a time."""
        with (self.directory / LOCKS / name).open("w") as file:
            if not _try_lock(file):
                if waiting_for:
                    print(f"waiting for {waiting_for}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _current(self) -> list[FrozenTrial]:
        """All trials but those that were tried again or taken back."""
        trials = self._trials()
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        return [t for t in trials if t.number not in retried and "withdrawn" not in t.user_attrs]

    def _write_state(self) -> None:
        """Write ``sweep.json``, from which reports read; under the exclusive lock."""
        path = self.directory / SWEEP_FILE
        definition = json.loads(path.read_text())["definition"]
        states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "WAITING": "waiting"}
        trials = [
            {
                "number": trial.number,
                "name": trial.user_attrs.get("name"),
                "run": f"{TRIALS}/{trial.user_attrs.get('name')}",
                "state": states.get(trial.state.name, "running"),
                "settings": trial.user_attrs.get("settings", {}),
                "value": trial.value if trial.state.name in ("COMPLETE", "PRUNED") else None,
                "error": trial.user_attrs.get("error") if trial.state.name == "FAIL" else None,
            }
            for trial in self._current()
        ]
        record = {
            "name": self.directory.resolve().name,
            "kind": definition["kind"],
            "definition": definition,
            "trials": trials,
        }
        write_whole(path, (json.dumps(record, indent=2) + "\n").encode())

    # -- who runs what -------------------------------------------------------------------------------------------

    def _claim(self) -> int | None:
        """Take a trial: one whose worker is gone, else the next that waits, else a new one of the search."""
        import optuna

        state = optuna.trial.TrialState
        while self._received is None:
            with self._exclusive():
                trials = self._trials()
                left = (t.number for t in trials if t.state == state.RUNNING and self._lock(t.number))
                number = next(left, None)
                if number is None:
                    if not any(t.state == state.WAITING for t in trials) and not self._more_to_search():
                        return None
                    self._study.sampler = self._sampler(len(trials))
                    number = self._study.ask().number
                    self._lock(number)
                usable = self._settle(number)
                self._write_state()
            if usable:
                return number
        return None

    def _id(self, number: int) -> int:
        """The storage's own number of a trial."""
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _lock(self, number: int) -> bool:
        """Become a trial's worker, unless it has a living one."""
        if number in self._locks:
            return False
        file = (self.directory / LOCKS / f"{number}.worker").open("w")
        if not _try_lock(file):
            file.close()
            return False
        self._locks[number] = file
        return True

    def _running(self) -> list[int]:
        """Trials that other workers run."""
        import optuna

        return [t.number for t in self._trials() if t.state == optuna.trial.TrialState.RUNNING]

    def _more_to_search(self) -> bool:
        return bool(self.space) and len(self._current()) < self.settings.trials

    def _sampler(self, number: int, index: int = 0) -> optuna.samplers.BaseSampler:
        """A sampler for one value of one trial, so that a sweep that was killed in between draws the same values."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self.settings.seed, number, index]).generate_state(1)[0])
        if self.settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def _settle(self, number: int) -> bool:
        """Give a trial of a search its values, settings and name; return False where they turn out impossible."""
        if not self.space:
            return True
        import optuna

        self._study.sampler = self._sampler(number)
        trial = optuna.Trial(self._study, self._id(number))
        values = {}
        for index, (key, range_) in enumerate(self.space.items()):
            self._study.sampler = self._sampler(number, index)
            values[key] = draw(trial, key, range_)
        if "settings" in trial.user_attrs:
            return True
        point, error = drawn_point(number, values, self.settings), None
        try:
            point = self.resolve(point)
        except LabError as problem:
            error = str(problem)
        trial.set_user_attr("name", point.name)
        trial.set_user_attr("settings", dict(point.settings))
        if error is not None:
            self._end(number, None, error)
        return error is None

    def _requeue_failed(self) -> None:
        for trial in self._current():
            if trial.state.name == "FAIL":
                attributes = {key: trial.user_attrs[key] for key in ("name", "settings")}
                self._study.enqueue_trial(trial.params, user_attrs={**attributes, "retry_of": trial.number})

    # -- one trial -----------------------------------------------------------------------------------------------

    @property
    def _tests(self) -> str:
        return self.settings.test or ("best" if self.space else "all")

    def _run_trial(self, number: int) -> None:
        """Train and test one trial and record what came of it."""
        trial = self._trials()[number]
        name = trial.user_attrs["name"]
        run_dir = self.directory / TRIALS / name
        started = time.monotonic()
        value = None
        try:
            with self._held_by_run(number) as held:
                if self._catch_up(number, again=True):
                    raise _PrunedError
                if not trial.user_attrs.get("fitted"):
                    continued = (run_dir / "checkpoints" / "last.ckpt").is_file()
                    if not continued and run_dir.is_dir():  # killed before its first checkpoint: nothing to keep
                        shutil.rmtree(run_dir)
                    resume = ["--ckpt_path=last"] if continued else []
                    self._say(number, "continues" if continued else "begins")
                    flags = Point(name, trial.user_attrs["settings"]).flags
                    config = f"--config={self.directory / BASE_CONFIG}"
                    self._command(number, name, ["fit", config, *flags, f"--run_dir={run_dir}", *resume], held)
                    self._storage.set_trial_user_attr(self._id(number), "fitted", True)
                if self._tests == "all":
                    self._test(number, name, held)
                best = read_run(run_dir).best
                if best is None:
                    raise LabError("it has no finite validation loss")
            value = best["val_loss"]
            said, error = f"val_loss {value:.6f} after {(time.monotonic() - started) / 60:.1f} min", None
        except _PrunedError:
            said, error = "pruned: above the median", None
        except LabError as problem:
            said, error = f"failed: {problem}", str(problem)
        with self._exclusive():
            self._end(number, value, error)
            self._write_state()
        self._say(number, said)

    def _end(self, number: int, value: float | None, error: str | None) -> None:
        """Tell Optuna: an error, a value, or neither for a pruned trial. Under the exclusive lock."""
        import optuna

        state = optuna.trial.TrialState
        if error is not None:
            self._storage.set_trial_user_attr(self._id(number), "error", error)
            self._study.tell(number, state=state.FAIL)
        elif value is None:
            self._study.tell(number, state=state.PRUNED)
        else:
            self._study.tell(number, value)
        self._locks.pop(number).close()

    @contextmanager
    def _held_by_run(self, number: int) -> Iterator[IO[str]]:
        """Hold the lock that a trial's processes inherit, once a run that outlived its worker has ended.

        Raises:
            SystemExit: A signal came while waiting.

        """
        with (self.directory / LOCKS / f"{number}.run").open("w") as file:
            if not _try_lock(file):
                self._say(number, "is still run by the process that a killed worker left; waiting for it")
            while not _try_lock(file):
                time.sleep(POLL_S)
                self._leave_if_signalled()
            yield file

    def _test(self, number: int, name: str, held: IO[str] | None = None) -> None:
        run_dir = self.directory / TRIALS / name
        if not ((run_dir / "test.json").is_file() and (run_dir / "test_examples.csv").is_file()):
            self._command(number, name, ["test", f"--run_dir={run_dir}", "--ckpt_path=best"], held)

    def _test_best(self) -> str | None:
        """Test the best trial; return why that failed."""
        import optuna

        if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in self._trials()):
            return None
        best = self._study.best_trial
        try:
            with self._exclusive("test.lock", waiting_for="another worker that tests the best run"):
                self._test(best.number, best.user_attrs["name"])
        except LabError as error:
            self._say(best.number, f"could not be tested: {error}")
            return str(error)
        return None

    def _command(self, number: int, name: str, arguments: list[str], held: IO[str] | None) -> None:
        """Run one command of a trial to its end.

        Raises:
            LabError: It failed; the message is what it said last.
            SystemExit: A signal came to this process and was passed on, or stopped the command alone.

        """
        log = self.directory / LOGS / f"{name}.log"
        command = [*self.program, *arguments]
        with log.open("ab") as output, log.open("rb") as tail:
            output.write(f"$ {' '.join(command[1:])}\n".encode())
            output.flush()
            start = tail.seek(0, os.SEEK_END)
            # a session of its own: Ctrl-C reaches the sweep alone, which passes it on once
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[held.fileno()] if held else [],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            if self._received is not None:  # it came while the process was being started
                self._child.send_signal(self._received)
            pruned = False
            try:
                while not pruned and self._child.poll() is None:
                    time.sleep(POLL_S)
                    if self._echo(number, tail) and arguments[0] == "fit" and self._received is None:
                        pruned = self._catch_up(number)  # a validation comes with a line
            finally:
                if self._child.poll() is None:  # pruned, or its files cannot be read
                    self._child.send_signal(signal.SIGTERM)
                status = self._child.wait()
                _kill_group(self._child.pid)  # other ranks of a run on several devices
                self._child = None
            self._echo(number, tail)
            if arguments[0] == "fit" and status == 0:
                pruned = pruned or self._catch_up(number)
            self._leave_if_signalled()
            if pruned:
                raise _PrunedError
            if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                self._say(number, "was stopped; the same command continues the sweep")
                raise SystemExit(status)
            if status:
                tail.seek(start)
                raise LabError(_why(status, tail.read().decode(errors="replace")))

    def _catch_up(self, number: int, again: bool = False) -> bool:
        """Tell Optuna of validations that it does not know; return whether one of them says to stop the trial.

        Args:
            number: The trial's.
            again: Also ask for the last one that it knows: a kill may have come before the answer.

        """
        if not self.space:
            return False
        import optuna

        frozen = self._trials()[number]
        run_dir = self.directory / TRIALS / frozen.user_attrs["name"]
        if not run_dir.is_dir():
            return False
        known = frozen.intermediate_values
        for row in read_run(run_dir).validation:
            step = int(row["step"])
            if step not in known:
                self._storage.set_trial_intermediate_value(self._id(number), step, row["val_loss"])
            elif not again or step != max(known):
                continue
            if self.settings.prune:
                trial = self._study.get_trials(deepcopy=True)[number]
                if optuna.pruners.MedianPruner().prune(self._study, trial):
                    return True
        return False

    def _echo(self, number: int, tail: IO[bytes]) -> bool:
        """Show what the command has said since; return whether it said anything."""
        lines = [line.decode(errors="replace").rstrip() for line in tail.readlines()]
        for line in lines:
            if line and not line.startswith("|"):
                self._say(number, line)
        return bool(lines)

    def _say(self, number: int, text: str) -> None:
        current = self._current()
        position = next((i for i, trial in enumerate(current, start=1) if trial.number == number), number + 1)
        total = self.settings.trials if self.space else len(current)
        with suppress(OSError):  # the terminal may be gone
            name = self._trials()[number].user_attrs.get("name")
            print(f"[{position}/{total} {name}] {text}", file=sys.stderr, flush=True)

    # -- signals -------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._received is not None
        self._received = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        how = (
            "leaving at once"
            if again
            else "the run in progress finishes its step and saves; once more to leave at once"
        )
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {how}\n".encode())
        if again:
            if self._child is not None:
                time.sleep(POLL_S)  # the run leaves by itself, its checkpoint whole
                _kill_group(self._child.pid)
            os._exit(128 + number)

    def _leave_if_signalled(self) -> None:
        if self._received is not None:
            with suppress(OSError):
                print("stopped; the same command continues the sweep", file=sys.stderr)
            raise SystemExit(128 + self._received)


class _PrunedError(Exception):
    """A trial is to be ended for its validation loss."""


def _try_lock(file: IO[str]) -> bool:
    """Take an flock if nobody holds it.

    Raises:
        LabError: The file system has none.

    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LabError(
            f"{file.name}: this file system cannot lock files ({error.strerror}); put --run_dir on another one"
        ) from None
    return True


def _kill_group(leader: int) -> None:
    """End what is left of the processes that a command started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _why(status: int, log: str) -> str:
    """What a failed command said last."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", most likely for memory" if status == -signal.SIGKILL else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")[:500]
