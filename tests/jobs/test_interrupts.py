"""A signal may come at any moment of a job: it ends, and never waits for ever."""

from __future__ import annotations

import subprocess
import sys

_ROUNDS = """
import random, signal
from contextlib import closing
from underlay.jobs.workers import in_parallel

def end(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, end)
random.seed(1)
hit = 0
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.004))
        work = in_parallel(abs, range(10**9), parallel=4, executor=None, stop=lambda: None)
        with closing(work) as results:
            for _ in results:
                pass
    except KeyboardInterrupt:
        hit += 1
    except RuntimeError as error:
        # The interrupt came inside a lock of the standard library's executor, which then says that
        # it does not hold it. What this test is for is that nothing hangs.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        hit += 1
print(hit)
"""


def test_tasks_are_interrupted_at_any_moment() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ROUNDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr
