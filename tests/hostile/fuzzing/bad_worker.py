"""A worker that misbehaves: to show that whoever watches workers sees it.

Image 1 kills it, image 2 never ends, image 3 hangs, image 4 breaks a rule.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from .worker import say


def _main(arguments: list[str]) -> None:
    _, _, first, end, step, _ = arguments
    for number in range(int(first), int(end), int(step)):
        say("image", number)
        say("use", "read")
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif number == 2:
            say("use", "write", seconds=0.1)
            while True:
                pass
        elif number == 3:
            time.sleep(600)
        elif number == 4:
            say("broken", ["read: wrong"])
    say("done", None)


if __name__ == "__main__":
    _main(sys.argv[1:])
