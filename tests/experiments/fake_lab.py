"""A stand-in for `python -m lightning_lab` that trains nothing, and a worker of a sweep that uses it.

`fit` writes what the run directory's contract says, one step every STEP_S seconds, with losses that are a function of
the settings and the step; it continues from its checkpoint, and on SIGTERM or SIGINT saves and leaves. Each finished
step is noted in `steps.log` of the working directory, which shows what was done twice.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lab.rundir import lock_run

if TYPE_CHECKING:
    from lightning_lab.experiments.sweep import Sweep

STEPS, EVERY = 8, 4
STEP_S = float(os.environ.get("STEP_S", "0.02"))


def loss(lr: float, r: int, step: int) -> float:
    """Lower for a higher lr and r, and later."""
    return 4.0 - 1000 * lr * step / STEPS - r * step / STEPS / 100


def fit(options: dict[str, str]) -> int:
    run = Path(options["run_dir"])
    lr, r = float(options.get("model.lr", 1e-4)), int(options.get("model.r", 8))
    if lr > 1:
        print(f"error: step 3: the loss is not finite (model.lr {lr})", file=sys.stderr)
        return 2
    if run.exists() and "ckpt_path" not in options:  # as the real one, which takes another directory
        run = run.with_name(f"{run.name}-2")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = lock_run(run)  # held until the process ends
    checkpoint, metrics = run / "checkpoints" / "last.ckpt", run / "metrics.csv"
    done = int(checkpoint.read_text()) if "ckpt_path" in options else 0
    (run / "environment.json").write_text(json.dumps({"total_steps": STEPS}))
    (run / "config.yaml").write_text(json.dumps({"model": {"lr": lr, "r": r}}))
    rows = metrics.read_text().splitlines() if done else ["step,train_loss,val_loss"]
    metrics.write_text("\n".join(row for row in rows if row[0] == "s" or int(row.split(",")[0]) <= done) + "\n")
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: received.append(n))
    save(checkpoint, done)
    for step in range(done + 1, STEPS + 1):
        time.sleep(STEP_S)
        with metrics.open("a") as file:
            file.write(f"{step},{loss(lr, r, step)!r},\n")
            if step % EVERY == 0:
                file.write(f"{step},,{loss(lr, r, step) + 0.1!r}\n")
        with Path("steps.log").open("a") as file:
            file.write(f"{run.name} {step}\n")
        if step % EVERY == 0 or received:
            save(checkpoint, step)
            print(f"validation at step {step}", file=sys.stderr, flush=True)
        if received:
            return 128 + received[0]
    lock.close()
    return 0


def save(checkpoint: Path, step: int) -> None:
    temporary = checkpoint.with_suffix(".tmp")
    temporary.write_text(str(step))
    os.replace(temporary, checkpoint)


def test(options: dict[str, str]) -> int:
    run = Path(options["run_dir"])
    (run / "test.json").write_text(json.dumps({"test_loss": 1.0, "test_perplexity": 2.7, "test_token_accuracy": 0.5}))
    (run / "test_examples.csv").write_text("row,loss,supervised_tokens\n")
    return 0


def sweep_of(directory: Path, settings: dict[str, Any], base: str = "model:\n  bits: 4\n") -> "Sweep":
    """One worker of a sweep of this stand-in."""
    from lightning_lab.experiments.points import SweepSettings
    from lightning_lab.experiments.sweep import Sweep

    return Sweep(
        directory,
        SweepSettings(**settings),
        base,
        resolve=dict,
        prepare=lambda: None,
        program=(sys.executable, str(Path(__file__).resolve())),
        heartbeat_s=1,
        grace_s=int(os.environ.get("GRACE_S", "1")),
    )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "worker":
        sys.exit(sweep_of(Path(arguments[0]), json.loads(arguments[1])).run())
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    sys.exit({"fit": fit, "test": test}[command](flags))
