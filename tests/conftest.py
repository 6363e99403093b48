"""What every test has: seeded random numbers, one thread, and hypothesis without clocks."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before anybody imports Triton: its kernels run as Python then
    os.environ["TRITON_INTERPRET"] = "1"

# derandomized: a test that fails fails for everybody; no deadline: machines are shared
settings.register_profile(
    "tests", derandomize=True, deadline=None, database=None, print_blob=False, max_examples=60
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors only wait for a second one, and workers run beside


@pytest.fixture(autouse=True)
def own_main(monkeypatch):
    """`run_script` makes the process the script's; the tests' own goes on afterwards."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
