"""What is fused behind a normalization, as functions that the loops inline."""

from collections import namedtuple

from batchnorm.kernels.cpu.compiled.activations import DERIVATIVES, VALUES
from batchnorm.kernels.cpu.compiled.language import inlined, load, store

__all__ = ["Blocks", "Epilogue", "epilogue", "write", "write_nothing"]

Epilogue = namedtuple("Epilogue", "value derivative add keep_first keep_last reads_kept")
Blocks = namedtuple("Blocks", "moments apply backward_reduce backward_apply backward_frozen")


@inlined
def add_residual(z, residual, at):
    return z + load(residual, at)


@inlined
def add_nothing(z, residual, at):
    return z


@inlined
def write(target, at, g):
    store(target, at, g)


@inlined
def write_nothing(target, at, g):
    pass


def epilogue(act, residual, bits):
    """The functions of an activation and of a residual before it, in 32 or 64 bits.

    g is the residual's gradient, and written: in the first sweep of a backward pass, which spares
    the second to compute it, or in the second. A block that stays in the cache through both has
    it written last, for lines that one core writes and reads again are lines that the
    prefetcher of the next one takes away.
    """
    functions = VALUES[bits][act], DERIVATIVES[bits][act]
    if residual == "none":
        return Epilogue(*functions, add_nothing, write_nothing, write_nothing, False)
    if residual == "kept_first":
        return Epilogue(*functions, add_residual, write, write_nothing, True)
    return Epilogue(*functions, add_residual, write_nothing, write, False)
