"""Many runs of one recipe: a grid of settings, or a search, that can be killed at any moment and continued.

A trial is an ordinary run directory, trained by ``fit`` in a process of its own. What has been done is in SQLite,
through Optuna's storage. Who is doing it is told by locks (flock), which the system drops when their holder dies,
however it dies: a trial that the database calls running and nobody holds is one to continue from its checkpoint. A
trial's process inherits the lock, so a trial whose sweep was killed alone is left in peace until it ends.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Literal

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import SWEEP_FILE, TRIALS, flatten, read_run

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

BASE_CONFIG = "base.yaml"
DATABASE = "study.db"
DATABASE_TIMEOUT_S = 60  # a worker waits this long for another one's write
POLL_S = 0.25
TIE = re.compile(r"(?:([\d.]+)\s*\*\s*)?([\w.]+)")
RESERVED = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class SweepSettings:
    """Which runs a sweep consists of.

    Args:
        grid: Values by config key, such as ``{model.lr: [1e-4, 2e-4], model.r: [16, 32]}``; every combination is run.
        settings: Combinations given one by one, such as ``[{model.lr: 3e-4, model.r: 32}]``; ``name`` in one names its
            run. With a grid as well, each of them at each point of the grid.
        search: In place of both, a range by config key: ``{low: 1e-5, high: 1e-3, log: true}`` (with ``step``, in
            steps; whole numbers stay whole) or ``{choices: [8, 16, 32]}``.
        trials: How many runs a search makes; failed and pruned ones count.
        sampler: Of a search: ``tpe`` (Bergstra et al. 2011, by Optuna) or ``random``.
        prune: Stop a run of a search at a validation where its loss is above the median of the earlier runs'.
        tie: Keys that follow another: ``{model.alpha: model.r}``, or ``{model.alpha: 2 * model.r}``.
        seed: Of the search.
        test: Evaluate the held-out test split with the best checkpoint of ``all`` runs, of the ``best`` one (the
            default of a search) or of ``none``.
        retry_failed: Run failed trials again, from their checkpoint if they have one.

    """

    grid: dict[str, Any] | None = None
    settings: list[dict[str, Any]] | None = None
    search: dict[str, Any] | None = None
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    prune: bool = False
    tie: dict[str, str] | None = None
    seed: int = 3407
    test: Literal["all", "best", "none"] | None = None
    retry_failed: bool = False


@dataclass(frozen=True)
class Point:
    """One trial's settings by dotted config key, and the name of its run."""

    name: str
    settings: Mapping[str, Any]

    @property
    def flags(self) -> list[str]:
        """The same as flags of `fit`."""
        return [f"--{key}={flag_value(value)}" for key, value in self.settings.items()]


def flag_value(value: Any) -> str:
    """A setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def grid_points(sweep: SweepSettings) -> list[Point]:
    """Every combination that a grid and single settings make, in the order in which they are written.

    Raises:
        LabError: Nothing to combine, a key that a sweep sets itself, or one combination twice.

    """
    grid = flatten(sweep.grid or {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise LabError(f"sweep.grid: {key} needs a list of values, such as [1e-4, 2e-4]")
    if not grid and not sweep.settings:
        raise LabError(
            "the sweep has no settings: give sweep.grid, sweep.settings or sweep.search, e.g. "
            "--sweep.grid '{model.lr: [1e-4, 2e-4, 3e-4]}', or --config lab_grid.yaml"
        )
    points: list[Point] = []
    for setting in sweep.settings or [{}]:
        fixed = flatten(setting)
        name = fixed.pop("name", None)
        both = [key for key in fixed if key in grid]
        if both:
            raise LabError(f"sweep: {both[0]} is in sweep.grid and in sweep.settings; leave it in one of them")
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            given = name or run_name(fixed)
            shown = "_".join(filter(None, [given, run_name(varied)]))
            points.append(Point(shown, tied(fixed | varied, sweep.tie or {})))
    for i, point in enumerate(points):
        if any(point.settings == other.settings for other in points[:i]):
            raise LabError(f"sweep: the settings of {point.name} come twice; leave one out")
    return _unique_names(points)


def tied(settings: Mapping[str, Any], ties: Mapping[str, str]) -> dict[str, Any]:
    """Add the keys that follow others.

    Raises:
        LabError: A tie to a key that the sweep does not vary, or that is not a number; or a tied key that is set too.

    """
    result = dict(settings)
    for key, rule in flatten(ties).items():
        match = TIE.fullmatch(str(rule).strip())
        source = match.group(2) if match else ""
        if source not in settings:
            raise LabError(f"sweep.tie: {key}: {rule} follows no key of the sweep; it has {', '.join(settings)}")
        if key in settings:
            raise LabError(f"sweep.tie: {key} is tied and set; leave it out of the settings")
        value = settings[source]
        if match and match.group(1):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise LabError(f"sweep.tie: {key}: {rule}: {value!r} is not a number")
            value = float(match.group(1)) * value
            value = int(value) if value == int(value) else value
        result[key] = value
    return result


def run_name(settings: Mapping[str, Any]) -> str:
    """A directory name from settings, such as ``lr3e-4_r32``."""
    parts = []
    for key, value in settings.items():
        last = {"seed_everything": "seed"}.get(key, key.rpartition(".")[2])
        parts.append(last + re.sub(r"[^\w.+-]+", "-", _short(value)).strip("-"))
    return "_".join(parts)[:120]


def _short(value: Any) -> str:
    if isinstance(value, float) and value != 0 and not 0.01 <= abs(value) < 1000:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _unique_names(points: list[Point]) -> list[Point]:
    names: dict[str, int] = {}
    result = []
    for point in points:
        names[point.name] = number = names.get(point.name, 0) + 1
        result.append(point if number == 1 else Point(f"{point.name}-{number}", point.settings))
    return result


class Sweep:
    """One worker of a sweep; several on the same directory share its trials.

    Args:
        directory: The sweep's directory; made if it is not there, continued if it is.
        settings: Which runs it consists of.
        base: The resolved config that every run starts from, as YAML text.
        resolve: Checks one point's flags and returns its settings as the config has them (``"1e-4"`` as a number).
        prepare: Called with a grid's points before the first trial, so that data and base are made ready once.
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
        self.space = flatten_space(settings.search or {})
        # of a search its two corners are checked, and each drawn point when it is drawn
        points = [self._corner(0), self._corner(-1)] if self.space else grid_points(settings)
        for key in dict.fromkeys(key for point in points for key in point.settings):
            if key in RESERVED or key.startswith("sweep."):
                raise LabError(f"sweep: {key} cannot be varied; a sweep sets it itself")
        resolved = [resolve(point) for point in points]
        self.points = [] if self.space else resolved

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run every trial that nobody else runs; return 0, or 1 where some failed.

        Raises:
            LabError: The directory is another sweep's.
            SystemExit: A signal came; the trial in progress has saved its checkpoint.

        """
        self._open()
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            waited_for: set[int] = set()
            while True:
                number = self._claim()
                if number is not None:
                    self._run_trial(number)
                elif (others := self._running()) and self._received is None:
                    for other in [n for n in others if n not in waited_for]:
                        self._say(other, "is run by another process; waiting for it")
                    waited_for |= set(others)
                    time.sleep(POLL_S)
                else:
                    break
                self._leave_if_signalled()
            if self._tests == "best":
                self._test_best()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        failed = [trial for trial in self._current() if trial.state.name == "FAIL"]
        for trial in failed:
            self._say(trial.number, f"failed: {trial.user_attrs.get('error')}")
        if failed:
            print("failed trials are tried again with --sweep.retry_failed true", file=sys.stderr)
        return 1 if failed else 0

    def _open(self) -> None:
        """Make the sweep or continue it; the first worker prepares what all runs share, the others wait for it."""
        directory = self.directory
        begun = (directory / BASE_CONFIG).is_file()
        if not begun and directory.is_dir() and any(p.name != "sweep.lock" for p in directory.iterdir()):
            raise LabError(f"{directory}: exists and is not a sweep; pass another --run_dir")
        (directory / TRIALS).mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        (directory / "locks").mkdir(exist_ok=True)
        with self._exclusive(waiting_for="another process to prepare the sweep"):
            self._same_sweep()
            import optuna

            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self._storage = optuna.storages.RDBStorage(
                f"sqlite:///{directory / DATABASE}", engine_kwargs={"connect_args": {"timeout": DATABASE_TIMEOUT_S}}
            )
            self._study = optuna.create_study(
                storage=self._storage, study_name="sweep", direction="minimize", load_if_exists=True
            )
            known = [trial.user_attrs.get("settings") for trial in self._trials()]
            for point in self.points:
                if dict(point.settings) not in known:
                    self._study.enqueue_trial({}, user_attrs={"name": point.name, "settings": dict(point.settings)})
            if self.settings.retry_failed:
                self._requeue_failed()
            if any(not trial.state.is_finished() for trial in self._trials()) or self._more_to_search():
                self.prepare(self.points)
            self._write_state()

    def _same_sweep(self) -> None:
        """Write down what the sweep is, or see that it is still the same."""
        definition = {
            "kind": "search" if self.space else "grid",
            "search": self.settings.search and {"space": self.space, "seed": self.settings.seed},
            "sampler": self.settings.sampler if self.space else None,
            "prune": self.settings.prune,
            "tie": self.settings.tie,
        }
        config, record = self.directory / BASE_CONFIG, self.directory / SWEEP_FILE
        if not config.is_file():
            _write(record, json.dumps({"name": self.directory.name, "definition": definition, "trials": []}) + "\n")
            _write(config, self.base)
            return
        import yaml

        before = flatten(yaml.safe_load(config.read_text()) or {})
        now = flatten(yaml.safe_load(self.base) or {})
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                raise LabError(
                    f"{self.directory} is a sweep with {key} {before.get(key)!r}, not {now.get(key)!r}; put it back, "
                    "or pass another --run_dir"
                )
        recorded = json.loads(record.read_text()).get("definition", {})
        for key, value in json.loads(json.dumps(definition)).items():
            if recorded.get(key) != value:
                raise LabError(
                    f"{self.directory} is a sweep whose {key} is {recorded.get(key)}, not {value}; put it back, or "
                    "pass another --run_dir"
                )

    @contextmanager
    def _exclusive(self, waiting_for: str = "") -> Iterator[None]:
        """One worker at a time."""
        with (self.directory / "sweep.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting_for:
                    print(f"waiting for {waiting_for}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _current(self) -> list[FrozenTrial]:
        """All trials but those that were tried again."""
        trials = self._trials()
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        return [trial for trial in trials if trial.number not in retried]

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
        _write(path, json.dumps(record, indent=2) + "\n")

    # -- who runs what -------------------------------------------------------------------------------------------

    def _claim(self) -> int | None:
        """Take a trial: one whose process is gone, else the next that waits, else a new one of the search."""
        if self._received is not None:
            return None
        import optuna

        with self._exclusive():
            for trial in self._trials():
                if trial.state == optuna.trial.TrialState.RUNNING and self._lock(trial.number):
                    self._settle(optuna.Trial(self._study, self._id(trial.number)), trial.number)
                    return trial.number
            waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in self._trials())
            if not waiting and not self._more_to_search():
                return None
            self._study.sampler = self._sampler(len(self._trials()))
            asked = self._study.ask()
            if not self._lock(asked.number):
                raise LabError(f"{self.directory}/locks/{asked.number}.lock: held by another process; stop it first")
            self._settle(asked, asked.number)
            self._write_state()
            return asked.number

    def _id(self, number: int) -> int:
        """The storage's own number of a trial."""
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _lock(self, number: int) -> bool:
        if number in self._locks:
            return False
        file = (self.directory / "locks" / f"{number}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A sampler that depends on the trial's number alone, so that a sweep that was killed draws the same values."""
        import optuna

        seed = self.settings.seed + number
        if self.settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def _settle(self, trial: optuna.Trial, number: int) -> None:
        """Give a trial of a search its settings and its name, unless it has them."""
        if "settings" in trial.user_attrs:
            return
        self._study.sampler = self._sampler(number)
        values = {key: _suggest(trial, key, space) for key, space in self.space.items()}
        point = self.resolve(Point(f"trial-{number:03d}", tied(values, self.settings.tie or {})))
        trial.set_user_attr("name", point.name)
        trial.set_user_attr("settings", dict(point.settings))

    def _requeue_failed(self) -> None:
        for trial in self._current():
            if trial.state.name == "FAIL":
                attributes = {key: trial.user_attrs[key] for key in ("name", "settings")}
                self._study.enqueue_trial({}, user_attrs={**attributes, "retry_of": trial.number})

    def _corner(self, which: Literal[0, -1]) -> Point:
        ends = ("low", "high")
        values = {
            key: space["choices"][which] if "choices" in space else space[ends[which]]
            for key, space in self.space.items()
        }
        return Point("search", tied(values, self.settings.tie or {}))

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
        error = None
        if self._catch_up(number, again=True):
            self._finish(number, None, None, "pruned")
            return
        if not trial.user_attrs.get("fitted"):
            continued = (run_dir / "checkpoints" / "last.ckpt").is_file()
            if not continued and run_dir.is_dir():  # killed before its first checkpoint: nothing to keep
                _remove(run_dir)
            resume = ["--ckpt_path=last"] if continued else []
            self._say(number, "continues" if continued else "begins")
            flags = Point(name, trial.user_attrs["settings"]).flags
            config = f"--config={self.directory / BASE_CONFIG}"
            error = self._command(number, name, ["fit", config, *flags, f"--run_dir={run_dir}", *resume])
            if error == "pruned":
                self._finish(number, None, None, "pruned")
                return
            if error is None:
                self._storage.set_trial_user_attr(self._id(number), "fitted", True)
        if error is None and self._tests == "all":
            error = self._test(number, name)
        best = read_run(run_dir).best if error is None else None
        if error is None and best is None:
            error = "it has no finite validation loss"
        took = f"{(time.monotonic() - started) / 60:.1f} min"
        value = best["val_loss"] if best else None
        self._finish(number, value, error, f"val_loss {value:.6f} after {took}" if best else f"failed: {error}")

    def _finish(self, number: int, value: float | None, error: str | None, said: str) -> None:
        import optuna

        state = optuna.trial.TrialState
        with self._exclusive():
            if error is not None:
                self._storage.set_trial_user_attr(self._id(number), "error", error)
                self._study.tell(number, state=state.FAIL)
            elif value is None:
                self._study.tell(number, state=state.PRUNED)
            else:
                self._study.tell(number, value)
            self._write_state()
        self._locks.pop(number).close()
        self._say(number, said)

    def _test(self, number: int, name: str) -> str | None:
        run_dir = self.directory / TRIALS / name
        if (run_dir / "test.json").is_file() and (run_dir / "test_examples.csv").is_file():
            return None
        return self._command(number, name, ["test", f"--run_dir={run_dir}", "--ckpt_path=best"])

    def _test_best(self) -> None:
        import optuna

        if any(trial.state == optuna.trial.TrialState.COMPLETE for trial in self._trials()):
            best = self._study.best_trial
            with (self.directory / "locks" / "test.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                error = self._test(best.number, best.user_attrs["name"])
            if error is not None:
                self._say(best.number, f"could not be tested: {error}")

    def _command(self, number: int, name: str, arguments: list[str]) -> str | None:
        """Run one command of a trial to its end.

        Returns:
            None if it went well, ``pruned``, or why it failed.

        Raises:
            SystemExit: A signal came to this process and was passed on.

        """
        log = self.directory / "logs" / f"{name}.log"
        command = [*self.program, *arguments]
        held = [file.fileno() for file in (self._locks.get(number),) if file is not None]
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
                pass_fds=held,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            if self._received is not None:  # it came while the process was being started
                self._child.send_signal(self._received)
            pruned = running = False
            while not pruned and (running := self._child.poll() is None):
                time.sleep(POLL_S)
                if self._echo(number, tail) and arguments[0] == "fit" and self._received is None:
                    pruned = self._catch_up(number)  # a validation comes with a line
            if running:
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
            self._child = None
            self._echo(number, tail)
            if arguments[0] == "fit" and status == 0:
                pruned = self._catch_up(number)
            self._leave_if_signalled()
            if pruned:
                return "pruned"
            if status == 0:
                return None
            tail.seek(start)
            return _why(status, tail.read().decode(errors="replace"))

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
        trials = self._trials()
        total = self.settings.trials if self.space else len(trials)
        print(f"[{number + 1}/{total} {trials[number].user_attrs.get('name')}] {text}", file=sys.stderr, flush=True)

    # -- signals -------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._received is not None
        self._received = number
        name = signal.Signals(number).name
        how = (
            "leaving at once"
            if again
            else "the run in progress finishes its step and saves; once more to leave at once"
        )
        os.write(2, f"\n{name}: {how}\n".encode())
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if again:
            os._exit(128 + number)

    def _leave_if_signalled(self) -> None:
        if self._received is not None:
            print("stopped; the same command continues the sweep", file=sys.stderr)
            raise SystemExit(128 + self._received)


def flatten_space(search: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A search space by dotted key; keys may be written nested.

    Raises:
        LabError: A range that is neither ``low``/``high`` nor ``choices``, or an empty or impossible one.

    """
    space: dict[str, dict[str, Any]] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node.keys() & {"low", "high", "choices"}:
            space[prefix] = dict(node)
        elif isinstance(node, Mapping) and node:
            for key, inner in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            raise LabError(f"sweep.search: {prefix} needs {{low: ..., high: ...}} or {{choices: [...]}}")

    if search:
        visit("", search)
    for key, range_ in space.items():
        wrong = LabError(f"sweep.search: {key} needs {{low: ..., high: ...}} (log, step) or {{choices: [...]}}")
        if "choices" in range_:
            if set(range_) != {"choices"} or not isinstance(range_["choices"], list) or not range_["choices"]:
                raise wrong
            continue
        if not {"low", "high"} <= set(range_) <= {"low", "high", "log", "step"}:
            raise wrong
        for bound in ("low", "high", "step"):
            if bound in range_:
                try:
                    number = float(range_[bound])
                except (TypeError, ValueError):
                    raise wrong from None
                exact = isinstance(range_[bound], int) and not isinstance(range_[bound], bool)
                range_[bound] = range_[bound] if exact else number
        if not range_["low"] < range_["high"] or (range_.get("log") and range_["low"] <= 0):
            raise LabError(f"sweep.search: {key}: low must be below high, and above 0 with log")
        if range_.get("log") and "step" in range_:
            raise LabError(f"sweep.search: {key}: step and log exclude each other")
    return space


def _suggest(trial: optuna.Trial, key: str, space: Mapping[str, Any]) -> Any:
    if "choices" in space:  # lists and the like as text: Optuna's choices are single values
        choices = [
            c if c is None or isinstance(c, bool | int | float | str) else json.dumps(c) for c in space["choices"]
        ]
        return space["choices"][choices.index(trial.suggest_categorical(key, choices))]
    low, high, log = space["low"], space["high"], bool(space.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, step=int(space.get("step", 1)), log=log)
    return trial.suggest_float(key, low, high, step=space.get("step"), log=log)


def _why(status: int, log: str) -> str:
    """What a failed command said last."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", most likely for memory" if status == -signal.SIGKILL else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")[:500]


def _remove(run_dir: Path) -> None:
    import shutil

    shutil.rmtree(run_dir)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
