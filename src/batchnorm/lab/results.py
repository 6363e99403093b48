"""What the trials of a claim gave, to be asked by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

__all__ = ["Outcome", "Results", "Row"]

Outcome = dict[str, float | int | bool | str | list[float] | None]
"""What a trial measured, by name: numbers, or curves of them; None for "never"."""

Row = Mapping[str, Any]
"""A trial's fields and what it measured, side by side."""


class Results:
    """Rows of trials, each with its seed.

        results.where(arm="batch").tuned("rate", by="validation", best="high").values("test")

    are the test accuracies, one a seed, at the learning rate that was best on the validation set.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(sorted(rows, key=lambda row: row["seed"]))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def seeds(self) -> list[int]:
        """All that there are, in order."""
        return self.distinct("seed")

    def distinct(self, name: str) -> list[Any]:
        """The values of a field, each once, in order."""
        return sorted({row[name] for row in self.rows})

    def where(self, **equal: object) -> Results:
        """The rows whose fields have these values.

        Raises:
            LookupError: There is none.
        """
        found = [row for row in self.rows if all(row[k] == v for k, v in equal.items())]
        if not found:
            raise LookupError(f"no trial has {equal}")
        return Results(found)

    def tuned(self, over: str, *, by: str, best: Literal["high", "low"]) -> Results:
        """The rows with that value of a field which is best on the mean of all seeds.

        Args:
            over: What is tuned, such as the learning rate. Besides it only the seed may vary.
            by: The measure to choose by, of which each trial has a number, not one the claim is
                judged by: a validation set's, not the test set's.
            best: Whether a high or a low value is a good one.
        """
        sign = 1 if best == "high" else -1
        means = {
            value: sum(sign * v for v in self.where(**{over: value}).values(by))
            for value in self.distinct(over)
        }
        return self.where(**{over: max(means, key=lambda value: means[value])})

    def values(self, measure: str) -> list[float]:
        """What one trial a seed measured, in the order of the seeds.

        Raises:
            LookupError: There are several trials of a seed, so that it is not said which is meant.
        """
        if len(self.rows) != len(self.seeds):
            raise LookupError(
                f"{len(self.rows)} trials of {len(self.seeds)} seeds: say which with where(...)"
            )
        return [float(row[measure]) for row in self.rows]
