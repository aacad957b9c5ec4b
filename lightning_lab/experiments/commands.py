"""Commands run one after another in processes of their own: what they say, how they fail, which signals stop them."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lightning_lab.errors import LabError
from lightning_lab.signals import SIGNALS

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

    def leave_if_signalled(self) -> None:
        """Raise StoppedError once a signal has come."""
        if self._received is not None:
            raise StoppedError(self._received)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Let the command save and leave on a first signal; leave at once on a second."""
        again, self._received = self._received is not None, number
        how = "leaving at once" if again else "the run in progress saves and ends; once more to leave at once"
        say(f"\n{signal.Signals(number).name}: {how}")
        if self._child is not None:
            _kill_group(self._child) if again else self._child.terminate()
        if again:
            os._exit(128 + number)

    def run(self, arguments: Sequence[str], log: Path, on_line: Callable[[str], None]) -> None:
        """Run one command to its end.

        Args:
            arguments: For the program.
            log: File that gets what it says, behind what is there; also after this process has been killed.
            on_line: Called with each line that it says; an exception from it ends the command.

        Raises:
            LabError: It failed; the message is what it said last.
            StoppedError: A signal came to this process and was passed on, or stopped the command alone.

        """
        said = b""
        with log.open("a") as output, log.open("rb") as tail:
            print("$", *arguments, file=output, flush=True)
            tail.seek(0, os.SEEK_END)
            # a session of its own: Ctrl-C reaches this process alone, which passes it on once
            self._child = child = subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            try:
                if self._received is not None:  # it came while the process was being started
                    child.terminate()
                status = None
                while status is None:
                    with suppress(subprocess.TimeoutExpired):
                        status = child.wait(POLL_S)
                    new = tail.read()
                    said += new
                    for line in new.decode(errors="replace").splitlines():
                        on_line(line)
            finally:
                child.terminate()
                child.wait()
                _kill_group(child)  # other ranks of a run on several devices
                self._child = None
        self.leave_if_signalled()
        number = -status if status < 0 else status - 128
        if number in SIGNALS:
            raise StoppedError(number)
        if status < 0:
            memory = ", most likely for memory" if number == signal.SIGKILL else ""
            raise LabError(f"killed by {signal.Signals(number).name}{memory}")
        if status:
            text = said.decode(errors="replace").strip()
            errors = re.findall("^error: (.+)", text, re.MULTILINE)
            raise LabError((errors or text.splitlines() or [f"exit status {status}"])[-1])


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the processes that a command started; checkpoints are whole at any moment."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
