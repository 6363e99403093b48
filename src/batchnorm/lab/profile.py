"""How much of the experiments is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

__all__ = ["FULL", "PROFILES", "QUICK", "Profile"]

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """`full` answers the claims; `quick` shows in minutes that the experiments run.

    Args:
        name: "quick" or "full".
        seeds: How many, counted from 0. A verdict needs five, and the full profile.
    """

    name: str
    seeds: int

    @property
    def is_full(self) -> bool:
        """Whether verdicts may be drawn from it."""
        return self.name == "full"

    def choose(self, *, full: T, quick: T) -> T:
        """What differs between the profiles: a number of steps, a grid of learning rates."""
        return full if self.is_full else quick


FULL = Profile("full", 5)
QUICK = Profile("quick", 1)
PROFILES = {profile.name: profile for profile in (QUICK, FULL)}
