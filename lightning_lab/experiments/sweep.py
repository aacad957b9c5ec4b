"""Many runs of one recipe: a grid of settings, or a search, that can be killed at any moment and continued.

A run of the sweep is an ordinary run directory, trained by ``fit`` in a process of its own. What has been done, and by
whom, is in Optuna's storage; an interrupted run continues from its checkpoint with the same values.
"""

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_lab.errors import LabError
from lightning_lab.experiments.commands import POLL_S, Commands, StoppedError, say
from lightning_lab.experiments.points import Point, SweepSettings, all_runs, flags, search_space, sweep_points, tied
from lightning_lab.experiments.runs import SWEEP_FILE, TRIALS, Run
from lightning_lab.experiments.study import Study, usable_database
from lightning_lab.files import flatten, make_directory, write_whole
from lightning_lab.hub import model_folder
from lightning_lab.rundir import CHECKPOINTS, METRICS, RUNS, is_locked, read_metrics
from lightning_lab.signals import listen

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
    from lightning_lab.experiments.sections import ranking_table
    from lightning_lab.experiments.summary import Summary

    directory = Path(cli.settings.run_dir or RUNS / cli.name).expanduser()
    cli.settings.run_dir = None
    needed: dict[str, tuple[Any, Any]] = {}

    def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
        config, data = cli.check([*cli.arguments, *flags(settings)])
        needs = config.data.as_dict(), config.model.base, config.model.revision, config.trainer.limit_val_batches
        needed[json.dumps(needs, default=str)] = (config, data)
        return {key: json.loads(json.dumps(config[key], default=str)) for key in settings}

    def prepare() -> None:
        for config, data in needed.values():
            model_folder(config.model.base, weights=True, revision=config.model.get("revision"))
            data.prepare(progress=True)
            if not len(data.splits["validation"].rows) or config.trainer.limit_val_batches == 0:
                wanted = "a validation split (data.split or data.validation_source), no trainer.limit_val_batches 0"
                raise LabError(f"a sweep compares its runs by their validation loss: give {data.rows.name} {wanted}")
            _ = data.duplicates  # found here, once for all runs

    status = Sweep(directory, SweepSettings(**vars(cli.settings.sweep)), cli.config_text(), resolve, prepare).run()
    summary = Summary([directory])
    write_report(summary, directory)
    for line in [*(f"error: {line}" for line in summary.damaged), f"written: {directory}/report.md, report.html"]:
        say(line)
    print(ranking_table(summary).markdown())
    return status


@dataclass
class Sweep:
    """One worker of a sweep; several on one directory or storage share its runs.

    Args:
        directory: The sweep's directory; made if it is not there, continued if it is.
        settings: Which runs it consists of.
        base: The resolved config that every run starts from, as YAML text.
        resolve: Checks one run's settings and returns them as the config has them (``"1e-4"`` as a number).
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
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    prepare: Callable[[], None]
    program: Sequence[str] = (sys.executable, "-m", "lightning_lab")
    heartbeat_s: int = 5
    grace_s: int = 20

    def __post_init__(self) -> None:
        self.commands = Commands(self.program)
        self.space = search_space(self.settings.search or {})
        points = sweep_points(self.settings, self.space)
        self.points = [Point(name, self.resolve(settings)) for name, settings in points]
        self.tests = self.settings.test or ("best" if self.space else "all")
        self.url = self.settings.storage or f"sqlite:///{self.directory / DATABASE}"
        self.runs: dict[str, FrozenTrial] = {}  # all by name, begun or not
        # what a killed worker left looks until then as if its worker lived
        self._sure_at = time.monotonic() + self.grace_s + 2

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run everything that nobody else runs; return 0, or 1 where something failed.

        Raises:
            LabError: The directory is another sweep's or something else, or the database cannot be used.
            SystemExit: A signal came; the run in progress has saved its checkpoint.

        """
        with usable_database(self.url):
            self.open()
            stop_listening = listen(self.commands.on_signal)
            try:
                while self._await_work():
                    self.study.take(self._objective)
                runs = self.runs.items()
                failed = {name: trial.user_attrs.get("error") for name, trial in runs if trial.state == TrialState.FAIL}
                complete = [(trial.value, name) for name, trial in runs if trial.state == TrialState.COMPLETE]
                if self.tests == "best" and complete:
                    _, best = min(complete)
                    try:
                        with self._alone():
                            self._test(best)
                    except LabError as untested:
                        failed[best] = f"could not be tested: {untested}"
            except StoppedError as stopped:
                self._refresh()
                say("stopped; the same command continues the sweep")
                raise SystemExit(128 + stopped.args[0]) from None
            finally:
                stop_listening()
        for name, error in failed.items():
            self._say(name, f"failed: {error}")
        if failed:
            say("failed runs are tried again with --sweep.retry_failed true")
        return 1 if failed else 0

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
            name = self.directory.resolve().name if self.settings.storage else "sweep"
            self.study = Study(self.url, name, self.settings, self.heartbeat_s, self.grace_s)
            self.study.define(json.loads(json.dumps(definition, default=str)), str(self.directory))
            queued = self.study.runs()
            for name, trial in queued.items():
                if trial.state == TrialState.FAIL and self.settings.retry_failed:
                    self.study.queue(name, trial)
            begun = {name: trial.user_attrs["settings"] for name, trial in queued.items()}
            drawn: Mapping[str, Any] = {f"trial-{number:03d}": {} for number in range(self.settings.trials)}
            for name, settings in (drawn if self.space else all_runs(self.points, begun)).items():
                self.runs[name] = create_trial(state=TrialState.WAITING, user_attrs={"settings": settings})
            self.runs |= self.study.runs()
            if not all(trial.state.is_finished() for trial in self.runs.values()):
                self.prepare()
        write_whole(self.directory / BASE_CONFIG, self.base)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker on this directory at a time; without locks in the file system some work is done twice."""
        with (self.directory / LOCK).open("w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _await_work(self) -> bool:
        """Wait until a run can be taken; return False once all have ended."""
        said = False
        while True:
            self.commands.leave_if_signalled()
            queued = self._refresh()
            states = [trial.state for trial in queued.values()]
            if TrialState.WAITING in states:
                return True
            running = TrialState.RUNNING in states
            new = next((name for name in self.runs if name not in queued), None)
            if new and not (running and time.monotonic() < self._sure_at):  # what was interrupted comes first
                self.study.queue(new, self.runs[new])
                return True
            if not running:
                return False
            if not said:
                say("waiting for runs of other workers, or of killed ones until it is sure that they are gone")
                said = True
            time.sleep(POLL_S)

    def _refresh(self) -> dict[str, FrozenTrial]:
        """Look what has become of all runs and write it to ``sweep.json`` for reports; return those that are queued."""
        queued = self.study.runs()
        self.runs |= queued
        trials = [
            {
                "number": number,
                "run": f"{TRIALS}/{name}",
                "name": name,
                "state": "failed" if trial.state == TrialState.FAIL else trial.state.name.lower(),
                "settings": trial.user_attrs["settings"],
                "value": trial.value,
                "error": trial.user_attrs.get("error"),
            }
            for number, (name, trial) in enumerate(self.runs.items())
        ]
        state = {"name": self.directory.resolve().name, "kind": "search" if self.space else "grid", "trials": trials}
        content, path = json.dumps(state, indent=2) + "\n", self.directory / SWEEP_FILE
        if not path.is_file() or path.read_text() != content:
            write_whole(path, content)
        return queued

    # -- one run -------------------------------------------------------------------------------------------------

    def _objective(self, trial: optuna.Trial) -> float:
        """Train and test a run; return its lowest validation loss."""
        self._refresh()
        name, settings = trial.user_attrs["name"], trial.user_attrs["settings"]
        if self.space:
            settings = tied(self.study.draw(trial, self.space), self.settings.tie)
            trial.set_user_attr("settings", settings)
            self.resolve(settings)
        self._train(trial, name, settings)
        if self.tests == "all":
            self._test(name)
        best = Run(self.directory / TRIALS / name).best
        if best is None:
            raise LabError("it has no finite validation loss")
        self._say(name, f"val_loss {best['val_loss']:.6f}")
        return best["val_loss"]

    def _train(self, trial: optuna.Trial, name: str, settings: Mapping[str, Any]) -> None:
        run_dir = self.directory / TRIALS / name
        reported: set[int] = set()

        def report(line: str) -> None:
            self._say(name, line)
            for row in read_metrics(run_dir / METRICS)[0]:
                step = int(row.values["step"])
                if "val_loss" in row.values and step not in reported:
                    reported.add(step)
                    trial.report(row.values["val_loss"], step)
                    if self.settings.prune and trial.should_prune():  # by Optuna's median pruner
                        self._say(name, "pruned: above the median")
                        raise optuna.TrialPruned

        while True:
            if is_locked(run_dir):
                self._say(name, "is still run by the process that a killed worker left; waiting for it")
            while is_locked(run_dir):
                time.sleep(POLL_S)
                self.commands.leave_if_signalled()
            command = ["fit", f"--config={self.directory / BASE_CONFIG}", f"--run_dir={run_dir}", *flags(settings)]
            if (run_dir / CHECKPOINTS / "last.ckpt").is_file():
                command.append("--ckpt_path=last")
            elif run_dir.is_dir():  # killed before its first checkpoint: nothing to keep
                shutil.rmtree(run_dir)
            report("continues" if "--ckpt_path=last" in command else "begins")
            try:
                return self.commands.run(command, self.directory / LOGS / f"{name}.log", report)
            except LabError:
                if not is_locked(run_dir):  # else by such a process that was still loading
                    raise

    def _test(self, name: str) -> None:
        run_dir = self.directory / TRIALS / name
        if not (run_dir / "test_examples.csv").is_file():  # which comes after test.json
            command = ["test", f"--run_dir={run_dir}", "--ckpt_path=best"]
            self.commands.run(command, self.directory / LOGS / f"{name}.log", partial(self._say, name))

    def _say(self, name: str, text: str) -> None:
        say(f"[{[*self.runs].index(name) + 1}/{len(self.runs)} {name}] {text}")
