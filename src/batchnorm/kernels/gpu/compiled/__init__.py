"""The kernels in Triton's language; imported when the first is asked for.

`no_type_check` keeps run-time checkers of annotations away: these are for Triton's compiler.
"""
