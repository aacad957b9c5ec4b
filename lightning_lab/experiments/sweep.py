"""Many runs of one recipe: a grid of settings, or a search, that can be killed at any moment and continued.

A run of the sweep is an ordinary run directory, trained by ``fit`` in a process of its own. What has been done, and by
whom, is in Optuna's storage; an interrupted run continues from its checkpoint with the same values.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from lightning_lab.errors import LabError
from lightning_lab.experiments.commands import POLL_S, Commands, StoppedError, say
from lightning_lab.experiments.points import Point, SweepSettings, draw, new_points, point, search_space, sweep_points
from lightning_lab.experiments.runs import SWEEP_FILE, TRIALS, read_run
from lightning_lab.experiments.study import Study, usable_database
from lightning_lab.files import flatten, make_directory, write_whole
from lightning_lab.hub import model_folder
from lightning_lab.rundir import CHECKPOINTS, METRICS, RUNS, is_locked, read_metrics

BASE_CONFIG, DATABASE, LOGS, LOCK = "base.yaml", "study.db", "logs", "sweep.lock"
DEFINING = ("search", "seed", "sampler", "prune", "tie")  # settings that cannot change once a run has begun
UNUSABLE = "{}?#%"  # in a directory's name they mean something in the database's URL


def sweep_command(cli: Any) -> int:
    """Work on the sweep of a command line and report on it; return 0, or 1 where a run failed.

    Args:
        cli: Has the parsed ``settings``, the ``arguments`` they came from, their text ``config_text()``, the config's
            ``name``, and ``check(arguments)``, which reads arguments as `fit` does, refuses what it would refuse, and
            returns the config and its data module.

    Raises:
        LabError: A setting is wrong, the directory is another sweep's, or the database cannot be used.

    """
    from lightning_lab.experiments.report import write_report

    directory = Path(cli.settings.run_dir or RUNS / cli.name).expanduser()
    cli.settings.run_dir = None
    needed: dict[str, tuple[Any, Any]] = {}

    def resolve(wanted: Point) -> Point:
        config, data = cli.check([*cli.arguments, *wanted.flags])
        needed[json.dumps([config.data.as_dict(), config.model.base], default=str)] = (config.model, data)
        return Point(wanted.name, {key: json.loads(json.dumps(config[key], default=str)) for key in wanted.settings})

    def prepare() -> None:
        for model, data in needed.values():
            model_folder(model.base, weights=True, revision=model.get("revision"))
            data.prepare(progress=True)

    status = Sweep(directory, SweepSettings(**vars(cli.settings.sweep)), cli.config_text(), resolve, prepare).run()
    report = write_report([directory], directory)
    for line in [*(f"error: {line}" for line in report.damaged), f"written: {directory}/report.md, report.html"]:
        say(line)
    print(report.ranking)
    return status


@dataclass
class Sweep:
    """One worker of a sweep; several on one directory or storage share its runs.

    Args:
        directory: The sweep's directory; made if it is not there, continued if it is.
        settings: Which runs it consists of.
        base: The resolved config that every run starts from, as YAML text.
        resolve: Checks one point's flags and returns its settings as the config has them (``"1e-4"`` as a number).
        prepare: Called before the first run, so that data and bases are made ready once.
        program: The command line that runs one command.
        heartbeat_s: A worker says this often that it lives.
        grace_s: Unheard of for longer, it is dead, and another continues its run.

    Raises:
        LabError: Bad settings.

    """

    directory: Path
    settings: SweepSettings
    base: str
    resolve: Callable[[Point], Point]
    prepare: Callable[[], None]
    program: Sequence[str] = (sys.executable, "-m", "lightning_lab")
    heartbeat_s: int = 5
    grace_s: int = 20

    def __post_init__(self) -> None:
        self.commands = Commands(self.program)
        self.space = search_space(self.settings.search or {})
        points = [self.resolve(wanted) for wanted in sweep_points(self.settings, self.space)]
        self.planned = [] if self.space else new_points(points, {})
        self.tests = self.settings.test or ("best" if self.space else "all")
        self.url = self.settings.storage or f"sqlite:///{self.directory / DATABASE}"
        self.study: Study
        self._opened = 0.0
        self._names: list[str] = []  # of all runs, those that have been queued first

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run everything that nobody else runs; return 0, or 1 where something failed.

        Raises:
            LabError: The directory is another sweep's or something else, or the database cannot be used.
            SystemExit: A signal came; the run in progress has saved its checkpoint.

        """
        with usable_database(self.url):
            self.open()
            try:
                with self.commands.passing_signals_on():
                    while self._await_work():
                        self.study.take(self._objective)
                    tested = self.tests != "best" or self._test_best()
            except StoppedError as stopped:
                self._write_state(self.study.requeue())
                say("stopped; the same command continues the sweep")
                raise SystemExit(128 + stopped.args[0]) from None
            failed = {name: t for name, t in self.study.runs().items() if t.state == TrialState.FAIL}
        for name, trial in failed.items():
            self._say(name, f"failed: {trial.user_attrs.get('error')}")
        if failed:
            say("failed runs are tried again with --sweep.retry_failed true")
        return 0 if tested and not failed else 1

    def open(self) -> None:
        """Make the sweep or continue it, and prepare what its runs share."""
        if self.directory.is_dir() and any(self.directory.iterdir()) and not (self.directory / TRIALS).is_dir():
            raise LabError(f"{self.directory}: exists and is not a sweep; pass another --run_dir")
        if not self.settings.storage and any(character in str(self.directory) for character in UNUSABLE):
            raise LabError(f"{self.directory}: a sweep's directory cannot have any of {UNUSABLE} in its name")
        make_directory(self.directory / TRIALS)
        make_directory(self.directory / LOGS)
        definition = flatten(yaml.safe_load(self.base) or {})
        definition |= {f"sweep.{key}": getattr(self.settings, key) for key in DEFINING}
        with self._alone():
            self.study = Study(
                self.url,
                self.directory.resolve().name if self.settings.storage else "sweep",
                prune=self.settings.prune,
                heartbeat_s=self.heartbeat_s,
                grace_s=self.grace_s,
            )
            self.study.define(json.loads(json.dumps(definition, default=str)), str(self.directory))
            taken = {name: trial.user_attrs.get("settings", {}) for name, trial in self.study.runs().items()}
            self.planned = new_points(self.planned, taken)
            runs = self.study.requeue(failed=self.settings.retry_failed)
            if self._next(runs) or not all(trial.state.is_finished() for trial in runs.values()):
                self.prepare()
        write_whole(self.directory / BASE_CONFIG, self.base)
        self._opened = time.monotonic()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker on this directory at a time; without locks in the file system some work is done twice."""
        with (self.directory / LOCK).open("w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _next(self, runs: dict[str, FrozenTrial]) -> dict[str, Any] | None:
        """Name and settings of the next run to queue; those of a search are drawn when it begins."""
        if self.space:
            return {"name": f"trial-{len(runs):03d}"} if len(runs) < self.settings.trials else None
        return next(({"name": p.name, "settings": dict(p.settings)} for p in self.planned if p.name not in runs), None)

    def _await_work(self) -> bool:
        """Wait until a run can be taken; return False once all have ended."""
        written: dict[str, FrozenTrial] | None = None
        said: set[str] = set()
        while True:
            self.commands.leave_if_signalled()
            runs = self.study.requeue()
            if runs != written:
                self._write_state(runs)
                written = runs
            states = [trial.state for trial in runs.values()]
            if TrialState.WAITING in states:
                self._seed_sampler(states.index(TrialState.WAITING))
                return True
            running = {name for name, trial in runs.items() if trial.state == TrialState.RUNNING}
            # what a killed worker left comes before new runs, and looks at first as if its worker lived
            unsure = running and time.monotonic() < self._opened + self.grace_s + 2
            if not unsure and (new := self._next(runs)):
                self.study.queue(new)
                continue
            if not running:
                return False
            for name in sorted(running - said):
                self._say(name, "is run by another worker, or was until that was killed; waiting")
            said |= running
            time.sleep(POLL_S)

    def _seed_sampler(self, *key: int) -> None:
        self.study.seed_sampler(self.settings.sampler, self.settings.seed, *key)

    def _write_state(self, runs: dict[str, FrozenTrial]) -> None:
        """Write ``sweep.json``, from which reports read."""
        rows = [
            {
                "name": name,
                "state": {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
                "settings": trial.user_attrs.get("settings", {}),
                "value": trial.value,
                "error": trial.user_attrs.get("error"),
            }
            for name, trial in runs.items()
        ]
        later = [wanted for wanted in self.planned if wanted.name not in runs]
        rows += [{"name": wanted.name, "state": "waiting", "settings": wanted.settings} for wanted in later]
        self._names = [row["name"] for row in rows]
        trials = [{"number": number, "run": f"{TRIALS}/{row['name']}", **row} for number, row in enumerate(rows)]
        state = {"name": self.directory.resolve().name, "kind": "search" if self.space else "grid", "trials": trials}
        write_whole(self.directory / SWEEP_FILE, json.dumps(state, indent=2) + "\n")

    # -- one run -------------------------------------------------------------------------------------------------

    def _objective(self, trial: optuna.Trial) -> float:
        """Train and test a run; return its lowest validation loss."""
        name = trial.user_attrs["name"]
        self._write_state(self.study.runs())
        # one that is queued again draws too: its values are fixed, and Optuna is to know them
        settings = self._draw(trial, name) if self.space else trial.user_attrs["settings"]
        self._train(trial, name, settings)
        if self.tests == "all":
            self._test(name)
        best = read_run(self.directory / TRIALS / name).best
        if best is None:
            raise LabError("it has no finite validation loss")
        self._say(name, f"val_loss {best['val_loss']:.6f}")
        return best["val_loss"]

    def _draw(self, trial: optuna.Trial, name: str) -> dict[str, Any]:
        """Settings for a run of a search.

        Raises:
            LabError: What was drawn turns out impossible.

        """
        values = {}
        for index, (key, range_) in enumerate(self.space.items()):
            self._seed_sampler(self._names.index(name), index)
            values[key] = draw(trial, key, range_)
        drawn = point(name, values, self.settings)
        try:
            drawn = self.resolve(drawn)
        finally:
            trial.set_user_attr("settings", dict(drawn.settings))
        return dict(drawn.settings)

    def _train(self, trial: optuna.Trial, name: str, settings: dict[str, Any]) -> None:
        run_dir = self.directory / TRIALS / name
        reported: set[int] = set()

        def report() -> None:
            for row in read_metrics(run_dir / METRICS)[0]:
                step = int(row.values["step"])
                if "val_loss" in row.values and step not in reported:
                    reported.add(step)
                    trial.report(row.values["val_loss"], step)
                    if trial.should_prune():
                        self._say(name, "pruned: above the median")
                        raise optuna.TrialPruned

        report()
        while True:
            if is_locked(run_dir):
                self._say(name, "is still run by the process that a killed worker left; waiting for it")
            while is_locked(run_dir):
                time.sleep(POLL_S)
                self.commands.leave_if_signalled()
            continued = (run_dir / CHECKPOINTS / "last.ckpt").is_file()
            if not continued and run_dir.is_dir():  # killed before its first checkpoint: nothing to keep
                shutil.rmtree(run_dir)
            self._say(name, "continues" if continued else "begins")
            flags = [f"--run_dir={run_dir}", *Point(name, settings).flags, *(["--ckpt_path=last"] if continued else [])]
            try:
                return self._command(name, ["fit", f"--config={self.directory / BASE_CONFIG}", *flags], report)
            except LabError:
                if not is_locked(run_dir):  # else by such a process that was still loading
                    raise

    def _test(self, name: str) -> None:
        run_dir = self.directory / TRIALS / name
        if not ((run_dir / "test.json").is_file() and (run_dir / "test_examples.csv").is_file()):
            self._command(name, ["test", f"--run_dir={run_dir}", "--ckpt_path=best"])

    def _test_best(self) -> bool:
        """Test the best run; return False where that failed."""
        runs = self.study.runs().items()
        values = [(trial.value, name) for name, trial in runs if trial.state == TrialState.COMPLETE]
        for _, name in sorted(values)[:1]:
            try:
                with self._alone():
                    self._test(name)
            except LabError as error:
                self._say(name, f"could not be tested: {error}")
                return False
        return True

    def _command(self, name: str, arguments: list[str], on_output: Callable[[], None] = lambda: None) -> None:
        def on_lines(lines: list[str]) -> None:
            for line in lines:
                self._say(name, line)
            on_output()

        self.commands.run(arguments, self.directory / LOGS / f"{name}.log", on_lines)

    def _say(self, name: str, text: str) -> None:
        total = self.settings.trials if self.space else len(self._names)
        say(f"[{self._names.index(name) + 1}/{total} {name}] {text}")
