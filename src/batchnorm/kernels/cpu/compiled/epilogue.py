"""What is fused behind a normalization, as functions that the loops inline."""

from collections import namedtuple

from batchnorm.kernels.cpu.compiled.activations import DERIVATIVES, VALUES
from batchnorm.kernels.cpu.compiled.language import inlined, load, store

__all__ = ["Blocks", "Epilogue", "epilogue"]

Epilogue = namedtuple("Epilogue", "value derivative add keep")
Blocks = namedtuple("Blocks", "moments apply backward_reduce backward_apply")


@inlined
def add_residual(z, residual, at):
    return z + load(residual, at)


@inlined
def add_nothing(z, residual, at):
    return z


@inlined
def keep(target, at, g):
    store(target, at, g)


@inlined
def keep_nothing(target, at, g):
    pass


def epilogue(act, residual, bits):
    """The functions of an activation, with a residual before it or none, in 32 or 64 bits."""
    value, derivative = VALUES[bits][act], DERIVATIVES[bits][act]
    if residual:
        return Epilogue(value, derivative, add_residual, keep)
    return Epilogue(value, derivative, add_nothing, keep_nothing)
