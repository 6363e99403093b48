"""What a claim is: a sentence about batch normalization that an experiment answers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from matplotlib.figure import Figure

from batchnorm.lab.hypothesis import Hypothesis
from batchnorm.lab.profile import Profile
from batchnorm.lab.results import Outcome, Results

__all__ = ["AnyClaim", "AnyTrial", "Claim", "TrialT"]


@runtime_checkable
class AnyTrial(Protocol):
    """A frozen dataclass of plain fields, `seed` among them: all that a trial depends on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int:
        """What all that is random in it is drawn from."""


TrialT = TypeVar("TrialT", bound=AnyTrial)


class Claim(ABC, Generic[TrialT]):
    """A claim, its experiment and its figure.

    A subclass's docstring is its page, in Markdown: in its first line the claim, below it the
    protocol: what is compared, what is held equal between the arms, and how they were tuned.
    `hypotheses` are stated before the run and look at the results through their effects alone.

    A *trial* is the unit of work: it depends on its fields and on nothing else, so that it can run
    in any process and never has to run twice.
    """

    number: ClassVar[int]
    name: ClassVar[str]
    source: ClassVar[str]
    hypotheses: ClassVar[tuple[Hypothesis, ...]]

    @classmethod
    def sentence(cls) -> str:
        """What is claimed."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def protocol(cls) -> str:
        """How it is measured, in Markdown."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[2].strip()

    @abstractmethod
    def trials(self, profile: Profile) -> Iterable[TrialT]:
        """All that are to be run, each once."""

    @abstractmethod
    def run(self, trial: TrialT, device: torch.device) -> Outcome:
        """Run one trial, and say what it measured."""

    @abstractmethod
    def figure(self, results: Results) -> Figure:
        """Draw what was measured, for one seed or many; `batchnorm.lab.figures` has the parts."""


AnyClaim = Claim[Any]
