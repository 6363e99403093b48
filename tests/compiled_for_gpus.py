"""Compile what the GPU's backend would launch, for a GPU that is not there; a line of JSON each.

    python compiled_for_gpus.py cuda 90 '[[[32, 64, 56, 56], "channels_last", "bfloat16", "relu"]]'

A case is a shape, a layout, a dtype, an activation, and whether there is a residual, whether the
moments are frozen. Triton's compiler refuses what its interpreter lets through, and what it makes
of a kernel says how memory is read.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from batchnorm.kernels import Activation, Epilogue, gpu
from batchnorm.kernels.gpu import launcher
from strategies import lay_out

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


class Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, name, kernel):
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid):
        def compile_only(**arguments):
            made = self.kernel.warmup(grid=grid, **arguments)
            found = {"kernel": self.name, "programs": grid[0], **resources(made)}
            print(json.dumps(found), flush=True)  # noqa: T201

        return compile_only


def resources(made):
    """Registers, bytes that did not fit them, and accesses by their bytes; of AMD nothing."""
    if "cubin" not in made.asm:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        asked = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    accesses = collections.Counter(
        int(width) * int(count or 1) // 8
        for count, width in re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", made.asm["ptx"])
    )
    return {
        "registers": int(used["REG"]),
        "spilled": int(used["STACK"]),
        "accesses": accesses,
        "contracts": made.metadata.enable_fp_fusion,
        # whether threads wait for each other between the first load and the last store
        "waits": bool(re.search(r"ld\.global.*bar\.sync.*st\.global", made.asm["ptx"], re.DOTALL)),
    }


def main(backend, arch, cases):
    lanes = 32 if backend == "cuda" else 64
    driver.set_active(Absent(GPUTarget(backend, int(arch) if lanes == 32 else arch, lanes)))
    find = launcher.kernel
    launcher.kernel = lambda name: Compiled(name, find(name))
    torch.cuda.current_device = lambda: None  # a CPU's tensor has no index
    for shape, layout, dtype, act, residual, frozen in cases:
        x = lay_out(torch.empty(shape, dtype=getattr(torch, dtype)), layout)
        weight, bias = torch.empty(shape[1]), torch.empty(shape[1])
        epilogue = Epilogue(torch.empty_like(x) if residual else None, None, Activation.of(act))
        _, batch = gpu.forward(x, weight, bias, 1e-5, epilogue)
        gpu.backward(x, x, batch, weight, bias, 1e-5, epilogue, frozen=frozen)
        gpu.track(weight, bias, torch.tensor(0), batch, None)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
