"""What a conversion did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from batchnorm.repair.table import counted, table

__all__ = ["Conversion", "Made"]


class Made(NamedTuple):
    """What became of a module, by its path, and whether it is that still."""

    path: str
    is_still: Callable[[], bool]


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` did to a model, by the paths of its layers; the model itself is "".

    - `to`: what it converted to.
    - `converted`: what each layer was, and what it is.
    - `skipped`: why a layer was left as it was.
    - `fused`: the activation that a layer took over.
    - `unfused`: why a layer took over none, where that was asked for.
    - `lost`: what of a layer has no place in what it is now.
    - `parameters`: how many numbers the model learns, before and after.
    - `difference`: of the outputs on the example in eval mode, the largest, relative to the largest
      output; None without an example.
    - `needs_fine_tuning`: whether a trained layer became one that computes something else.
    """

    to: str
    converted: Mapping[str, tuple[str, str]]
    skipped: Mapping[str, str]
    fused: Mapping[str, str]
    unfused: Mapping[str, str]
    lost: Mapping[str, str]
    parameters: tuple[int, int]
    difference: float | None
    needs_fine_tuning: bool
    _made: list[Made] = field(repr=False)
    _undo: ExitStack = field(repr=False)

    def undo(self) -> None:
        """Make the layers what they were, with what their tensors have learned since.

        What this conversion took away comes back as it was, into the optimizer too; a layer that
        was frozen since learns again.

        Raises `ValueError`, and changes nothing, where a layer is another since: later conversions
        have to be undone first.
        """
        for path, is_still in self._made:
            if not is_still():
                raise ValueError(
                    f"the model has been changed since: its {path!r} is another layer than the one "
                    "that was put there; undo later changes first"
                )
        self._made.clear()
        self._undo.close()

    def __repr__(self) -> str:
        number = len(self.converted)
        counts = [counted(number, "layer")]
        counts += [f"{len(self.fused)} fused"] if self.fused else []
        counts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        text = f"Conversion to {self.to}: {', '.join(counts)}"
        before, after = self.parameters
        if before != after:
            text += f"; {before:,} → {after:,} parameters"
        if self.difference is not None:
            text += f"; outputs differ by {self.difference:.2g}"
        if self.needs_fine_tuning:
            text += "\ntrained layers compute something else now: the model needs fine-tuning"
        rows = [
            (_shown(path), *self.converted.get(path, ("", "as it was")), self._note(path))
            for path in dict.fromkeys((*self.converted, *self.unfused))
        ]
        text = table(text, ("layer", "was", "is", ""), rows)
        if self.skipped:
            skipped = [(_shown(path), why) for path, why in self.skipped.items()]
            text += "\n" + table("left as they were", ("layer", "why"), skipped)
        return text

    def _note(self, path: str) -> str:
        notes = []
        if path in self.lost:
            notes.append(f"lost: {self.lost[path]}")
        if path in self.fused:
            notes.append(f"fused: {self.fused[path]}")
        if path in self.unfused:
            notes.append(f"not fused: {self.unfused[path]}")
        return "; ".join(notes)


def _shown(path: str) -> str:
    return path or "the model"
