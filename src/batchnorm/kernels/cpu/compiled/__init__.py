"""What Numba compiles: read as Numba's language, not as Python's."""
