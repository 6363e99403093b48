"""SIGTERM, sent for real to processes that load this one module."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from batchnorm.cli import termination

PROCESS = """
import importlib.util, os, signal, sys, time
specification = importlib.util.spec_from_file_location("termination", {path!r})
termination = importlib.util.module_from_spec(specification)
specification.loader.exec_module(termination)

def act():
    print("told", flush=True)
    return {answer}

def ready():
    print("ready", flush=True)

{body}
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM is no signal there")


def ended(body: str, answer: str = "True") -> tuple[int, list[str]]:
    """The status of a process that is sent SIGTERM when it is ready, and what it printed."""
    body = textwrap.dedent(body)
    text = PROCESS.format(path=termination.__file__, answer=answer, body=body)
    with subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = process.stdout.readline().split()
        assert said == ["ready"], process.stderr.read()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert err == ""
    return process.returncode, out.split()


def test_what_is_to_be_done_is_done_and_then_the_signal_does_its_work():
    waits = """
        termination.before_termination(act)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ready()
        time.sleep(60)
    """
    assert ended(waits) == (-signal.SIGTERM, ["told"])
    assert ended(waits, "1 / 0") == (-signal.SIGTERM, ["told"])


def test_a_main_thread_that_runs_no_python_hinders_nothing():
    stuck = """
        import threading
        lock = threading.Lock()
        lock.acquire()
        termination.before_termination(act)
        ready()
        lock.acquire()
    """
    assert ended(stuck) == (-signal.SIGTERM, ["told"])


def test_a_process_that_ends_by_itself_is_left_to_it():
    assert ended(
        """
        import threading
        over = threading.Event()
        def act():
            over.set()
            return False
        termination.before_termination(act)
        ready()
        over.wait(60)
        print("ends")
        sys.exit(3)
        """
    ) == (3, ["ends"])


def test_the_script_s_own_handler_takes_its_place():
    assert ended(
        """
        def own(*_):
            print("own")
            sys.exit(7)
        termination.before_termination(act)
        signal.signal(signal.SIGTERM, own)
        ready()
        time.sleep(60)
        """
    ) == (7, ["own"])


def test_a_process_that_has_its_status_ends_with_it():
    assert ended(
        """
        termination.before_termination(act)
        termination.end_by_itself()
        import atexit
        atexit.register(print, "ends")
        ready()
        time.sleep(1)
        sys.exit(3)
        """
    ) == (3, ["ends"])
    assert ended(
        """
        termination.before_termination(act)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        termination.end_by_itself()
        ready()
        time.sleep(60)
        """
    ) == (7, [])


def test_a_handler_that_was_there_stays():
    assert ended(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        termination.before_termination(act)
        ready()
        time.sleep(60)
        """
    ) == (7, [])


def test_children_end_as_ever_and_tell_nobody():
    assert ended(
        """
        termination.before_termination(act)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGTERM, status
        assert os.waitstatus_to_exitcode(os.system("kill -TERM $$")) == -signal.SIGTERM
        ready()
        time.sleep(60)
        """
    ) == (-signal.SIGTERM, ["told"])
