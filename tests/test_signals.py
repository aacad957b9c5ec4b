"""Who hears the signals that end a program."""

import os
import signal
import threading

from lightning_lab.signals import SIGNALS, listen


def test_a_handler_hears_the_signals_until_the_ones_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    heard: list[int] = []
    put_back = listen(lambda number, _: heard.append(number))
    try:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        put_back()
    assert heard == list(SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        put_back = listen(lambda number, _: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        put_back()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=lambda: listen(lambda number, _: None)())
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in SIGNALS] == before
