"""Scripts of `scripts/`, run as people run them: by Python, and by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


def torchrun(ranks: int) -> tuple[str, ...]:
    """The words after `python` that start so many ranks on this machine."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def python(*words: str) -> subprocess.CompletedProcess:
    """`python words…` beside the scripts, with nothing fetched and nothing left there."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # small models only wait for a second thread
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [sys.executable, *words],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


def line_of(script: str, comment: str) -> str:
    """`file:line` of the line that ends with a comment."""
    lines = (SCRIPTS / script).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"  # {comment}"))
    return f"{script}:{number}"
