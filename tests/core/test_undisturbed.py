"""Interrupts wait for what would be left half done."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from underlay.interrupts import ENDING, undisturbed


def test_an_interrupt_waits_for_the_end_of_the_block_whatever_threads_there_are() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    done: list[str] = []
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()

    def work() -> None:
        with undisturbed(), undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    ended.set()
    other.join()
    assert done == ["all of it"]
    assert [signal.getsignal(number) for number in ENDING] == before


def test_a_block_that_nobody_interrupts_leaves_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(KeyError), undisturbed():
        raise KeyError
    assert [signal.getsignal(number) for number in ENDING] == before
    with undisturbed():
        thread = threading.Thread(target=undisturbed().__enter__)  # as it is in any thread
        thread.start()
        thread.join()
    assert [signal.getsignal(number) for number in ENDING] == before
