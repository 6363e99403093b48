"""English text that ships with every Python: the language's own documentation."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["CHARACTERS", "Text", "documentation"]

_KNOWN = {c: i for i, c in enumerate(string.ascii_lowercase + string.digits + " \n.,()`*='_:")}
CHARACTERS = len(_KNOWN) + 1
"""How many there are; the last stands for all others."""


@dataclass(frozen=True)
class Text:
    """Characters by number, in three parts: what is learned, chosen by, and reported."""

    train: Int[Tensor, " n_train"]
    validation: Int[Tensor, " n_validation"]
    test: Int[Tensor, " n_test"]

    @staticmethod
    def windows(
        part: Int[Tensor, " n"], length: int, starts: Int[Tensor, " batch"]
    ) -> Int[Tensor, "batch {length}+1"]:
        """Pieces of `length` characters and the one after each of them."""
        return part[starts[:, None] + torch.arange(length + 1, device=starts.device)]


@cache
def _characters() -> Int[Tensor, " n"]:
    whole = "\n".join(topics[name] for name in sorted(topics)).lower()
    return torch.tensor([_KNOWN.get(character, CHARACTERS - 1) for character in whole])


def documentation() -> Text:
    """Python's reference in lower case, some 465,000 characters: 80 % to train, 10 % and 10 %.

    The version of Python decides what it says; the parts are contiguous, so that none has seen
    another.
    """
    whole = _characters()
    ends = (len(whole) * 8 // 10, len(whole) * 9 // 10)
    return Text(whole[: ends[0]], whole[ends[0] : ends[1]], whole[ends[1] :])
