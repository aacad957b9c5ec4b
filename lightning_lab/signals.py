"""The signals that end a program in an orderly way, and how one listens to them.

What then happens: `training.callbacks.checkpoints` saves a run, `experiments.commands` passes them on to the run of a
sweep, `__main__` ends everything else.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def listen(handler: Callable[[int, FrameType | None], object]) -> Callable[[], None]:
    """Let a handler hear `SIGNALS`; return what puts the handlers before it back.

    A signal that is ignored stays so, which is what nohup asks for. Outside the main thread, where no handler may be
    set, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, handler) for number in heard}

    def put_back() -> None:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)
        previous.clear()

    return put_back
