"""What is still done when the launcher tells a process to end."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["before_termination", "end_by_itself"]


def before_termination(act: Callable[[], bool]) -> None:
    """From now on when SIGTERM comes, call `act` in a thread of its own; then let it do its work.

    Also where the main thread hangs in a collective and runs no Python. The signal's handler is C
    and unknown to Python's table of handlers: a script that asks finds none, as without us, and
    one that it sets takes the place of this. Child processes have none.

    - `act`: returns whether the process is to end now; if not, it is about to end by itself.

    Where somebody has set a handler already, and on Windows, nothing is done.
    """
    if sys.platform == "win32" or not _is_default():
        return
    told, tell = os.pipe()
    os.set_blocking(tell, False)  # nobody waits in a signal's handler
    threading.Thread(target=_await, args=(told, act), name="batchnorm", daemon=True).start()
    _Handler.tell = tell
    os.register_at_fork(
        before=_Handler.take_off, after_in_parent=_Handler.put_on, after_in_child=_Handler.forget
    )
    _Handler.put_on()


def end_by_itself() -> None:
    """From now on SIGTERM is not heard: the process has its exit status, and is about to end.

    Another rank may end with an error in the meantime, and the launcher tell all to end. Where the
    script has set a handler, that stays.
    """
    if _is_default():
        _Handler.take_off()
        _Handler.forget()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _await(told: int, act: Callable[[], bool]) -> None:
    while os.read(told, 4096):
        ends = True
        with suppress(Exception):  # whatever happens, who is told to end ends
            ends = act()
        if ends:
            faulthandler.unregister(signal.SIGTERM)  # to what it was, from any thread
            os.kill(os.getpid(), signal.SIGTERM)


class _Handler:
    """This process's handler; it is taken off while a child is forked, which gets none."""

    tell: int | None = None  # what it writes to

    @classmethod
    def put_on(cls) -> None:
        if cls.tell is not None and _is_default():
            # what it writes, where the process stood, only wakes the thread
            faulthandler.register(signal.SIGTERM, cls.tell, all_threads=False)

    @classmethod
    def take_off(cls) -> None:
        if cls.tell is not None and _is_default():  # else the script's own is there
            faulthandler.unregister(signal.SIGTERM)

    @classmethod
    def forget(cls) -> None:
        cls.tell = None


def _is_default() -> bool:
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
