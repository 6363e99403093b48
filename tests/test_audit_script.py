from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from batchnorm.audit import run_script

# small models only wait for a second thread
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`python words…` in a folder."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=ONE_THREAD,
    )


def watched(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return python(folder, "-m", "batchnorm", "run", *words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with what a script may change in this process put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return tmp_path


def without_report(stderr: str) -> str:
    """Standard error before the report, which starts with an empty line."""
    return stderr.partition("\nbatchnorm ")[0]


# What a script sees

EXPRESSIONS = [
    "__name__",
    "__file__",
    "__doc__",
    "__package__",
    "__spec__",
    "sys.argv",
    "sys.path[0]",
    "type(__builtins__).__name__",
    "annotated.__annotations__",
    "annotated.__module__",
    "sys.modules['__main__'].__dict__ is globals()",
    "__import__('__main__').annotated is annotated",
    "__import__('sibling').value",
    "__import__('inspect').getsource(annotated)",
]


@pytest.mark.parametrize("where", ["script.py", "below/script.py", "link.py"])
def test_a_script_sees_what_it_sees_under_python(folder, capsys, where):
    text = '"""A script."""\nimport sys\ndef annotated(x: int) -> float: ...\n'
    text += "".join(f"print({e!r}, '=', repr({e}))\n" for e in EXPRESSIONS)
    (folder / "below").mkdir()
    for at in (folder, folder / "below"):
        (at / "script.py").write_text(text)
        (at / "sibling.py").write_text(f"value = {at.name!r}\n")
    (folder / "link.py").symlink_to(folder / "below" / "script.py")
    sys.modules.pop("sibling", None)
    try:
        status, _ = run_script(Path(where), ["--epochs", "3", "--", "-x", ""])
    finally:
        sys.modules.pop("sibling", None)
    plain = python(folder, where, "--epochs", "3", "--", "-x", "")
    assert plain.returncode == status == 0
    assert capsys.readouterr().out.splitlines() == plain.stdout.splitlines()


def test_a_script_may_have_an_encoding_of_its_own(folder, capsys):
    text = "# -*- coding: latin-1 -*-\nprint(len('Gauß'))\n"
    (folder / "script.py").write_bytes(text.encode("latin-1"))
    status, _ = run_script(Path("script.py"), [])
    assert (status, capsys.readouterr().out) == (0, "4\n")


def test_the_process_stays_the_script_s_for_what_runs_at_exit(folder):
    text = """
        import atexit, pickle
        class Own: pass
        atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Own()))).__name__))
    """
    (folder / "script.py").write_text(textwrap.dedent(text))
    run = watched(folder, "script.py")
    assert (run.returncode, run.stdout) == (0, "Own\n")


def test_threads_are_waited_for_and_watched(folder):
    text = """
        import threading, time, torch
        norm = torch.nn.BatchNorm1d(3)
        def work():
            time.sleep(0.5)
            with torch.no_grad():
                norm(torch.randn(4, 3))
        threading.Thread(target=work).start()
    """
    (folder / "script.py").write_text(textwrap.dedent(text))
    _, report = run_script(Path("script.py"), [])
    assert [f.code for f in report.findings] == ["BN108"]


def test_a_forked_child_does_not_report(folder):
    text = """
        import os, sys
        child = os.fork()
        if child == 0:
            sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    (folder / "script.py").write_text(textwrap.dedent(text))
    run = watched(folder, "-o", "report.json", "script.py")
    assert (run.returncode, run.stdout) == (0, "3\n")
    assert run.stderr.count("batchnorm saw no batch norm layer") == 1


def test_a_script_that_cannot_be_read_raises(folder):
    with pytest.raises(FileNotFoundError):
        run_script(Path("nowhere.py"), [])
    assert getattr(sys.modules["__main__"], "__file__", "") != "nowhere.py"


# How a script ends

ENDINGS = {
    "falls off its end": "print('done')",
    "sys.exit()": "import sys; sys.exit()",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "sys.exit(3)": "import sys; sys.exit(3)",
    "sys.exit(-1)": "import sys; sys.exit(-1)",
    "sys.exit(True)": "import sys; sys.exit(True)",
    "sys.exit(text)": "import sys; print('out'); sys.exit('no data: Gauß')",
    "sys.exit(list)": "import sys; sys.exit([1, 2])",
    "sys.exit in a function": "def stop():\n    raise SystemExit(7)\nstop()",
    "an exception": "def step():\n    raise ValueError('loss is nan')\nprint('x')\nstep()",
    "an exception on the first line": "1 / 0",
    "an exception from another": (
        "def a():\n    return {}['k']\ndef b():\n    try:\n        a()\n"
        "    except KeyError as error:\n        raise RuntimeError('b') from error\nb()"
    ),
    "an exception while handling another": (
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    missing"
    ),
    "an exception of its own": "class Odd(BaseException): ...\nraise Odd('why')",
    "an exception in a module beside it": "import failing_beside_script",
    "a syntax error": "x = = 1",
    "an indentation error": "if 1:\npass",
    "an exception hook of its own": (
        "import sys\nsys.excepthook = lambda *e: print('hook:', e[0].__name__, file=sys.stderr)\n"
        "raise ValueError('x')"
    ),
}


@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS)
def test_a_script_ends_as_under_python(folder, capsys, text):
    (folder / "script.py").write_text(text, encoding="utf-8")
    (folder / "failing_beside_script.py").write_text("def f():\n    raise OSError('disk')\nf()\n")
    status, report = run_script(Path("script.py"), [])
    plain = python(folder, "-X", "utf8", "script.py")
    ours = capsys.readouterr()
    assert status % 256 == plain.returncode
    assert ours.out == plain.stdout
    assert ours.err.splitlines() == plain.stderr.splitlines()
    assert (report.layers, report.findings) == (0, ())


def test_an_interrupted_script_has_the_shells_status_and_a_report(folder, capsys):
    text = "import torch\ntorch.nn.BatchNorm1d(2)(torch.ones(3, 2))\nraise KeyboardInterrupt\n"
    (folder / "script.py").write_text(text)
    status, report = run_script(Path("script.py"), [])
    assert status == 130
    assert (report.layers, report.calls) == (1, 1)
    assert capsys.readouterr().err.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("end", ["", "sys.exit(4)", "raise ValueError('x')"])
def test_what_was_seen_is_reported_however_the_script_ends(folder, end):
    (folder / "script.py").write_text(
        "import sys\nimport torch\nfrom batchnorm import BatchNorm1d\n"
        "with torch.no_grad():\n    BatchNorm1d(2)(torch.randn(3, 2))\n" + end
    )
    _, report = run_script(Path("script.py"), [])
    assert [(f.code, f.place) for f in report.findings] == [("BN108", "script.py:5")]


# Real processes

TRAINING = """
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm

for seed in (torch.manual_seed, random.seed, np.random.seed):
    seed(1)


def train(norm, *more):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, stride=2, bias=False), norm(8), nn.ReLU(), *more,
        nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(4),
    )
    model(torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(40):
        x, y = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        print(f"step {step} loss {loss.item():.9g}")
        if step % 10 == 9:
            with torch.no_grad():
                losses.append(model(x).square().sum())  # the classic mistake
                losses.append(model.eval()(x).square().sum())
    return {**model.state_dict(), "losses": torch.stack(losses)}


left = {
    f"{norm.__module__}: {name}": value
    for norm in (nn.BatchNorm2d, batchnorm.BatchNorm2d)
    for name, value in train(norm).items()
}
left["torch's random state"] = torch.get_rng_state()
left["the others' next numbers"] = torch.tensor(
    [random.random(), np.random.random()], dtype=torch.float64
)
torch.save(left, sys.argv[1])
"""


def test_a_training_run_is_the_same_to_the_last_bit_when_watched(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    plain = python(tmp_path, "train.py", "plain.pt")
    seen = watched(tmp_path, "-o", "report.json", "--strict", "train.py", "watched.pt")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert seen.returncode == 1, seen.stderr  # --strict, and there is a warning
    assert seen.stdout == plain.stdout
    assert len(plain.stdout.splitlines()) == 80

    ours, theirs = (torch.load(tmp_path / f"{name}.pt") for name in ("watched", "plain"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["disabled"] == {}
    assert report["layers"] == 4
    line = 1 + TRAINING[: TRAINING.index("  # the classic mistake")].count("\n")
    places = [f["place"] for f in report["findings"] if f["code"] == "BN108"]
    assert places == [f"train.py:{line}"]


PROCESSES = """
import multiprocessing
import pickle
import sys


class Sample:
    def __init__(self, i):
        self.i = i


def collate(samples):
    import torch

    return torch.tensor([float(sample.i) for sample in samples])


def child(sample, queue):
    queue.put((sample.i + 1, __name__, sys.argv))


def main():
    copied = pickle.loads(pickle.dumps(Sample(3)))
    print(type(copied) is Sample, copied.i)

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(copied, queue))
    process.start()
    print(queue.get())
    process.join()
    print(process.exitcode)

    from torch import nn
    from torch.utils.data import DataLoader

    norm = nn.BatchNorm1d(1)
    data = [Sample(i) for i in range(12)]
    for batch in DataLoader(data, batch_size=4, num_workers=2, collate_fn=collate):
        print(norm(batch[:, None]).flatten().tolist())


if __name__ == "__main__":
    main()
"""


def test_pickles_and_child_processes_of_a_script_work_as_under_python(tmp_path):
    (tmp_path / "script.py").write_text(PROCESSES)
    plain = python(tmp_path, "script.py", "argument")
    seen = watched(tmp_path, "script.py", "argument")
    assert plain.returncode == seen.returncode == 0, seen.stderr
    assert plain.stdout.splitlines()[:3] == [
        "True 3",
        "(4, '__mp_main__', ['script.py', 'argument'])",
        "0",
    ]
    assert seen.stdout == plain.stdout
    assert without_report(seen.stderr) == plain.stderr
    assert seen.stderr.count("batchnorm watched 1 layer in 3 forward passes") == 1


def test_ctrl_c_ends_a_watched_script_with_130_and_the_report(tmp_path):
    (tmp_path / "script.py").write_text(
        "import time, torch\n"
        "torch.nn.BatchNorm1d(2)(torch.randn(3, 2))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "batchnorm", "run", "--strict", "script.py"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert without_report(err).endswith("KeyboardInterrupt\n")
    assert "batchnorm watched 1 layer in 1 forward pass" in err


def test_an_executor_that_was_left_open_is_not_waited_for(folder):
    (folder / "train.py").write_text(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(2)\n"
        "print(pool.submit(sum, [1, 2]).result())\n"
    )
    run = watched(folder, "train.py")
    assert (run.returncode, run.stdout) == (0, "3\n")
    assert "batchnorm saw no batch norm layer" in run.stderr
