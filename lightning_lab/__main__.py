"""Entry: ``python -m lightning_lab COMMAND ...``; one line and status 2 for anything the user can put right."""

import errno
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from lightning_lab.errors import LabError
from lightning_lab.signals import listen

COMMANDS = {
    "fit": "train: lightning_lab fit --config lr3e-4_r32.yaml",
    "validate": "evaluate the validation split of a run: --ckpt_path best, last, base or a file",
    "test": "evaluate the held-out test split of a run: --ckpt_path best, last, base or a file",
    "predict": "write answers for a split or a file to JSONL",
    "plan": "before any weight is loaded: steps, tokens, trainable parameters, predicted peak memory by part",
    "sweep": "run a grid or a search of settings, resumable: sweep --config lab_grid.yaml",
    "report": "the lab's tables, a ranking, curves and comparisons of runs, finished or not: report RUN...",
    "preview": "show conversations as the model sees them, trained tokens marked",
}

USAGE = """\
usage: python -m lightning_lab COMMAND [--config FILE ...] [--KEY VALUE ...]

Fine-tune a Llama on chat data: 4-bit QLoRA in plain PyTorch Lightning.

commands:
{commands}

A config's bare name is looked up in the working directory, then among the packaged ones:
  {configs}
Several --config merge left to right, then flags. `COMMAND --help` lists every key, and
`COMMAND --config FILE --print_config` shows the merged result without loading anything.
"""

OUT_OF_MEMORY = {
    "fit": "lower data.micro_batch_tokens, or set model.checkpointing to full (on a GPU also offload)",
    "validate": "lower data.eval_micro_batch_tokens or data.micro_batch_tokens",
    "test": "lower data.eval_micro_batch_tokens or data.micro_batch_tokens",
    "predict": "lower model.max_new_tokens or data.max_length, or use a smaller model.base",
}
# Of the system, never of this program: full and read-only disks, quotas, rights.
OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENAMETOOLONG)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        from lightning_lab import __version__
        from lightning_lab.configs_lookup import packaged_configs

        if argv and argv[0] == "--version":
            print(__version__)
            return 0
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=commands, configs="  ".join(packaged_configs())), end="")
        return 0 if argv else 2
    command = argv[0]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command == "report":  # it reads files alone: no torch, which takes seconds to import
        from lightning_lab.experiments.report import main as report

        return report(argv[1:])
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Unbreakable(sys.stdout), _Unbreakable(sys.stderr)
    stop_listening = listen(lambda received, _: sys.exit(128 + received))
    try:
        return _run(command, argv[1:])
    finally:
        sys.stdout, sys.stderr = streams
        stop_listening()


def _run(command: str, argv: list[str]) -> int:
    """Run a command; say in one line what the user can put right."""
    gc.disable()  # what is imported stays: to search it for cycles again and again takes a third of the imports' time
    try:
        import torch
        from jsonargparse import ArgumentError
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from lightning_lab.cli import run
    finally:
        gc.enable()
    if not gc.get_freeze_count():  # once: what is garbage by then is never freed
        gc.freeze()
    _quieten()  # not earlier: the libraries set their own levels when they are imported
    try:
        return run(command, argv)
    except (LabError, ArgumentError, MisconfigurationException) as error:
        message = str(error)
    except (MemoryError, OSError, RuntimeError) as error:
        advice = OUT_OF_MEMORY.get(command, "free some, or use a smaller model.base")
        if isinstance(error, torch.OutOfMemoryError):
            message = f"the GPU is out of memory; {advice}"
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            message = f"this machine is out of memory; {advice}"
        elif isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            message = f"{error.filename or 'a file'}: {error.strerror}"
        elif isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            message = "lost another process of this run, whose own line says why"
        else:
            raise
    rank = os.environ.get("LOCAL_RANK", "0")
    who = "" if rank == "0" else f"process {rank}: "
    print(f"error: {who}{LabError(message)}", file=sys.stderr)
    return 2


class _Unbreakable:
    """A standard stream whose reader may go away, as `tee` does on Ctrl-C: what only prints never ends a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable[..., Any], *args: str) -> None:
        try:
            function(*args)
        except OSError:
            # nowhere goes what is still to come, also that of code which writes to the descriptor itself
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _quieten() -> None:
    """Keep library chatter that says nothing about this run away from the screen; warnings about it stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # on CPUs with AVX512-BF16 its import warns that the optional package `kernels` is absent
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*GPU available but not used.*",
        ".*recommended to use `self.log.*sync_dist.*",  # what is logged has been added up over the processes already
        ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation needs no Checkpoints callback
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", pattern)


if __name__ == "__main__":
    sys.exit(main())
