"""What is still done when the launcher tells a process to end."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["before_termination"]


@contextmanager
def before_termination(act: Callable[[], bool]) -> Iterator[None]:
    """When SIGTERM comes, call `act` in a thread of its own; then let the signal do its work.

    Also where the main thread hangs in a collective and runs no Python. The signal's handler is C
    and unknown to Python's table of handlers: a script that asks finds none, as without us, and
    one that it sets takes the place of this. Child processes have none.

    - `act`: returns whether the process is to end now; if not, it is about to end by itself.

    Where somebody has set a handler already, and on Windows, nothing is done.
    """
    is_ours = sys.platform != "win32" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_ours:
        yield
        return
    told, tell = os.pipe()
    os.set_blocking(tell, False)  # nobody waits in a signal's handler
    process = os.getpid()
    threading.Thread(target=_await, args=(told, act), name="batchnorm", daemon=True).start()
    os.register_at_fork(after_in_child=lambda: _forget(process))
    _waiting.add(process)
    # what it writes, where the process stood, only wakes the thread
    faulthandler.register(signal.SIGTERM, tell, all_threads=False)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else the script's own is there
            faulthandler.unregister(signal.SIGTERM)
        _waiting.discard(process)
        os.close(tell)


_waiting: set[int] = set()  # processes


def _await(told: int, act: Callable[[], bool]) -> None:
    while os.read(told, 4096):
        ends = True
        with suppress(Exception):  # whatever happens, who is told to end ends
            ends = act()
        if ends:
            faulthandler.unregister(signal.SIGTERM)  # to what it was, from any thread
            os.kill(os.getpid(), signal.SIGTERM)
    os.close(told)


def _forget(parent: int) -> None:
    """In a child: SIGTERM means to it what it means to any process."""
    if parent in _waiting:
        _waiting.discard(parent)
        faulthandler.unregister(signal.SIGTERM)
