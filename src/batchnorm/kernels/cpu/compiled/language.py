"""The few words the compiled kernels need beyond Numba's own: spans, bfloat16, task counters."""

import inspect
import operator

from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic, lower_builtin

__all__ = [
    "claim",
    "inlined",
    "like",
    "load",
    "power_of_two",
    "scratch",
    "span",
    "store",
    "summing",
    "within",
]


def inlined(function):
    """Compile a function that kernels call, into each that calls it."""
    # unwrapped: a type checker's run-time wrapper is no code for Numba
    return njit(inspect.unwrap(function), error_model="numpy", forceinline=True)


def summing(function):
    """As `inlined`, and sums may be taken in lanes: in an order of the code's, not of the run's."""
    options = {"error_model": "numpy", "forceinline": True, "fastmath": {"reassoc", "nsz"}}
    return njit(inspect.unwrap(function), **options)


class Span(types.CPointer):
    """A pointer into memory that spans of other roles do not overlap: so LLVM may vectorize."""

    def __init__(self, dtype, role):
        super().__init__(dtype)
        self.role = role
        self.name = f"{role}:{self.name}"

    @property
    def key(self):
        return self.dtype, self.role


register_default(Span)(models.PointerModel)


def _promise(builder, instruction, role):
    """Tell LLVM that only accesses of the same role may meet (its `alias.scope` and `noalias`)."""
    module = builder.module
    domain = module.add_metadata(["batchnorm"])
    scopes = {name: module.add_metadata([name, domain]) for name in _ROLES}
    others = [scope for name, scope in scopes.items() if name != role]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[role]]))
    instruction.set_metadata("noalias", module.add_metadata(others))


_ROLES = []


def _span_type(dtype, role):
    if role not in _ROLES:
        _ROLES.append(role)
    return Span(dtype, role)


def _loaded(builder, values, pointer, index):
    value = builder.load(builder.gep(pointer, [index]))
    _promise(builder, value, values.role)
    return value


def _stored(builder, values, pointer, index, value):
    store = builder.store(value, builder.gep(pointer, [index]))
    _promise(builder, store, values.role)


@lower_builtin(operator.getitem, Span, types.Integer)
def _get(context, builder, signature, arguments):
    return _loaded(builder, signature.args[0], *arguments)


@lower_builtin(operator.setitem, Span, types.Integer, types.Any)
def _set(context, builder, signature, arguments):
    values, _, given = signature.args
    pointer, index, value = arguments
    _stored(builder, values, pointer, index, context.cast(builder, value, given, values.dtype))


@intrinsic
def span(typing_context, address, dtype, role):
    """What lies at an address, as a span of a role."""
    if not isinstance(role, types.StringLiteral):
        return None
    result = _span_type(dtype.dtype, role.literal_value)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, dtype, role), generate


@intrinsic
def within(typing_context, base, offset, dtype, role):
    """What lies so many values behind the start of another span."""
    if not isinstance(role, types.StringLiteral):
        return None
    result = _span_type(dtype.dtype, role.literal_value)

    def generate(context, builder, signature, arguments):
        target = builder.gep(arguments[0], [arguments[1]])
        return builder.bitcast(target, context.get_value_type(result))

    return result(base, types.int64, dtype, role), generate


@intrinsic
def scratch(typing_context, dtype, values):
    """Room for so many values on the thread's own stack."""
    if not isinstance(values, types.IntegerLiteral):
        return None
    result = _span_type(dtype.dtype, "scratch")

    def generate(context, builder, signature, arguments):
        array = ir.ArrayType(context.get_data_type(dtype.dtype), values.literal_value)
        with builder.goto_entry_block():  # not alloca_once, which fills it with zeros
            room = builder.alloca(array)
        return builder.bitcast(room, context.get_value_type(result))

    return result(dtype, values), generate


@intrinsic
def load(typing_context, values, index):
    """values[index], bfloat16 as the float32 whose upper half it is."""
    narrow = values.dtype == types.uint16
    result = types.float32 if narrow else values.dtype

    def generate(context, builder, signature, arguments):
        value = _loaded(builder, values, *arguments)
        if not narrow:
            return value
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(value, word), word(16))
        return builder.bitcast(bits, ir.FloatType())

    return result(values, types.int64), generate


@intrinsic
def store(typing_context, values, index, value):
    """values[index] = value, bfloat16 rounded to the nearest, ties to even; NaN stays NaN."""
    narrow = values.dtype == types.uint16
    wide = types.float32 if narrow else values.dtype

    def generate(context, builder, signature, arguments):
        pointer, index, number = arguments
        if not narrow:
            _stored(builder, values, pointer, index, number)
            return context.get_dummy_value()
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(number, word)
        last = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(last, word(0x7FFF)))
        finite = builder.fcmp_ordered("ord", number, number)
        rounded = builder.select(finite, rounded, word(0x7FC00000))
        upper = builder.trunc(builder.lshr(rounded, word(16)), half)
        _stored(builder, values, pointer, index, upper)
        return context.get_dummy_value()

    return types.void(values, types.int64, wide), generate


@intrinsic
def claim(typing_context, record, field):
    """One of the record's first numbers, raised by one for the next thread that asks.

    What a thread wrote before is seen by those that get a higher number.
    """

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        numbers = builder.bitcast(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", builder.gep(numbers, [arguments[1]]), word(1), "acq_rel")

    return types.int64(record, types.int64), generate


@intrinsic
def like(typing_context, number, model):
    """A number in the float type of another."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], number, model)

    return model(number, model), generate


@intrinsic
def power_of_two(typing_context, shifted):
    """2^k, where k stands in the lowest bits of 1.5 · 2^52 + k."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        bits = builder.bitcast(arguments[0], word)
        exponent = builder.shl(builder.add(bits, word(1023)), word(52))
        return builder.bitcast(exponent, ir.DoubleType())

    return types.float64(types.float64), generate
