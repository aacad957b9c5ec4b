"""Commands run one after another in processes of their own: what they say, how they fail, which signals stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lightning_lab.errors import LabError
from lightning_lab.signals import SIGNALS, listen

POLL_S = 0.25


class StoppedError(Exception):
    """A signal came to this process, or stopped its command alone; the argument is its number."""


def say(text: str) -> None:
    """Print a line to standard error; a terminal that is gone stops nothing."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


class Commands:
    """Runs commands.

    Args:
        program: What starts each of them.

    """

    def __init__(self, program: Sequence[str]) -> None:
        self.program = program
        self._child: subprocess.Popen[bytes] | None = None
        self._received: int | None = None

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Pass the first signal on to the command, which saves and leaves; leave at once on a second."""
        stop_listening = listen(self._on_signal)
        try:
            yield
        finally:
            stop_listening()

    def leave_if_signalled(self) -> None:
        """Raise StoppedError once a signal has come."""
        if self._received is not None:
            raise StoppedError(self._received)

    def run(self, arguments: Sequence[str], log: Path, on_lines: Callable[[list[str]], None]) -> None:
        """Run one command to its end.

        Args:
            arguments: For the program.
            log: File that gets what it says, behind what is there.
            on_lines: Called with what the command has said; an exception from it ends the command.

        Raises:
            LabError: It failed; the message is what it said last.
            StoppedError: A signal came to this process and was passed on, or stopped the command alone.

        """
        command = [*self.program, *arguments]
        with log.open("ab") as output, log.open("rb") as tail:
            output.write(f"$ {' '.join(command[1:])}\n".encode())
            output.flush()
            start = tail.seek(0, os.SEEK_END)
            # a session of its own: Ctrl-C reaches this process alone, which passes it on once
            self._child = child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            try:
                if self._received is not None:  # it came while the process was being started
                    child.send_signal(signal.SIGTERM)
                status = None
                while status is None:
                    with suppress(subprocess.TimeoutExpired):
                        status = child.wait(POLL_S)
                    if lines := tail.readlines():
                        on_lines([line.decode(errors="replace").rstrip() for line in lines])
            finally:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)
                    child.wait()
                _kill_group(child)  # other ranks of a run on several devices
                self._child = None
            tail.seek(start)
            said = [line for line in tail.read().decode(errors="replace").splitlines() if line.strip()]
        self.leave_if_signalled()
        number = -status if status < 0 else status - 128
        if number in SIGNALS:
            raise StoppedError(number)
        if status < 0:
            memory = ", most likely for memory" if number == signal.SIGKILL else ""
            raise LabError(f"killed by {signal.Signals(number).name}{memory}")
        if status:
            errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
            raise LabError((errors or said or [f"exit status {status}"])[-1])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._received, child = self._received is not None, number, self._child
        how = "leaving at once" if again else "the run in progress saves and ends; once more to leave at once"
        say(f"\n{signal.Signals(number).name}: {how}")
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
            if again:
                time.sleep(POLL_S)  # the run leaves by itself, its checkpoint whole
                _kill_group(child)
        if again:
            os._exit(128 + number)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the processes that a command started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
