"""Run somebody's script, unchanged, as `__main__` under the probe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType

from batchnorm.audit.finding import Report
from batchnorm.audit.probe import Probe

__all__ = ["run_script"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run_script(script: Path, arguments: Sequence[str]) -> tuple[int, Report]:
    """Run `script` as `python script arguments…` would, and report what the probe saw.

    Returns the exit status that Python would have given, and the report, whether the script
    ended, called `sys.exit`, raised (its traceback is printed as ever) or was interrupted.

    Raises `OSError` where the script cannot be read.
    """
    source = script.read_bytes()
    with _as_main(script, arguments) as main, Probe() as probe:
        try:
            exec(compile(source, str(script), "exec"), main.__dict__)  # noqa: S102 - the job
            status = 0
        except SystemExit as exit:
            status = _status_of(exit)
        except KeyboardInterrupt as error:
            _print_traceback(error)
            status = INTERRUPTED
        except BaseException as error:
            _print_traceback(error)
            status = 1
        return status, probe.report()


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """A fresh `__main__` for the script, with the sys.argv and sys.path it would have."""
    main = ModuleType("__main__")
    main.__file__ = str(script)
    main.__dict__["__builtins__"] = __builtins__
    before = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"] = main
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    try:
        yield main
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before


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
    sys.excepthook(type(error), error, trace)
