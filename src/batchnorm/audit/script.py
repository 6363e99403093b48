"""Run somebody's script, unchanged, as `__main__` under the probe."""

from __future__ import annotations

import builtins
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures.thread import _threads_queues
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from batchnorm.audit.finding import Report
from batchnorm.audit.probe import Probe
from batchnorm.audit.selection import Selection

__all__ = ["run_script"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run_script(
    script: Path,
    arguments: Sequence[str],
    selection: Selection | None = None,
    *,
    probe: Probe | None = None,
) -> tuple[int, Report]:
    """Run `script` as `python script arguments…` would, and report what the probe saw.

    From here on the process is the script's: `__main__`, `sys.argv` and `sys.path` stay as it
    had them, for what it left to run at exit.

    - `selection`: what to report.
    - `probe`: what watches it, for who wants to ask it more; by default one with that selection.

    Returns the exit status that Python would have given, and the report, whether the script
    ended, called `sys.exit`, raised (its traceback is printed as ever) or was interrupted.

    Raises `OSError` where the script cannot be read.
    """
    source = script.read_bytes()
    path = str(Path.cwd() / script)  # as Python has it: absolute, links not resolved
    main = _become_main(path, [str(script), *arguments])
    process = os.getpid()
    with probe or Probe(selection=selection) as watching:
        try:
            # our own __future__ imports are not the script's
            code = compile(source, path, "exec", dont_inherit=True)
            exec(code, main.__dict__)  # noqa: S102 - the job
            status = 0
        except SystemExit as exit:
            status = _status_of(exit)
        except KeyboardInterrupt as error:
            _print_traceback(error)
            status = INTERRUPTED
        except BaseException as error:
            _print_traceback(error)
            status = 1
        if os.getpid() != process:
            sys.exit(status)  # a child that the script forked: its parent reports
        try:
            _join_threads()
        except KeyboardInterrupt:  # told twice: wait no longer, and report
            status = status or INTERRUPTED
    return status, watching.report()


def _become_main(path: str, argv: list[str]) -> ModuleType:
    """A fresh `__main__` for the script, with the sys.argv and sys.path it would have."""
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    main.__dict__.update(__builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    sys.argv = argv
    sys.path[0] = str(Path(path).resolve().parent)
    return main


def _join_threads() -> None:
    """Wait for what the script left running, as the interpreter does before it exits.

    But not for the workers of executors, such as torch.compile's, which end when it exits.
    """
    for thread in threading.enumerate():
        waits = thread is not threading.main_thread() and not thread.daemon
        if waits and thread not in _threads_queues:
            thread.join()


def _status_of(exit: SystemExit) -> int:
    if exit.code is None:
        return 0
    if isinstance(exit.code, int):
        return exit.code
    print(exit.code, file=sys.stderr)  # noqa: T201 - what Python does with sys.exit("…")
    return 1


def _print_traceback(error: BaseException) -> None:
    """As Python prints it, from the script's own first line on."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
