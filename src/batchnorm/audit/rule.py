"""What a rule is: a code, a name, a check, and a docstring that is its page."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import ClassVar

from torch.nn.parallel import DistributedDataParallel

from batchnorm.audit.call import Call
from batchnorm.audit.evidence import Evidence
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.rank_view import RankViews
from batchnorm.audit.state import State
from batchnorm.models.graph import Graph

__all__ = ["Rule", "repair"]


def repair(call: str, remark: str = "") -> str:
    """A repair, to paste into a script that has a `model`, a `loader`, an `optimizer`.

    `import batchnorm; batchnorm.recalibrate(model, loader)  # before evaluating`
    """
    return f"import batchnorm; batchnorm.{call}" + (f"  # {remark}" if remark else "")


class Rule:
    """One way in which batch normalization goes wrong.

    A subclass's docstring is its page, in Markdown, with the headings What it finds, Why it
    hurts, Example, Fix, When it is fine, Evidence.

    A rule that looks at a training run has `before` and `after`, which are called around every
    forward pass of a batch norm layer, must change nothing and should cost next to nothing, and
    `findings` for the end. A rule that looks at what lies still, a checkpoint or a model, has
    `examine`, and `compare` where there is another to compare it with; one that looks at the order
    of a model's operations has `read`. One that looks at layers at work, in batches or in a
    training run, has `weigh`; one that looks at several ranks side by side, `confront`.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    looks_at: ClassVar[str]

    @classmethod
    def page(cls) -> str:
        """The rule's page."""
        return f"# {cls.code}: {cls.name}\n\n{inspect.cleandoc(cls.__doc__ or '')}"

    def found(
        self,
        severity: Severity,
        message: str,
        modules: Iterable[str],
        fix: str,
        *,
        place: str | None = None,
        is_guess: bool = False,
        **numbers: float,
    ) -> Finding:
        """A finding of this rule; see `Finding`."""
        return Finding(
            self.code, severity, message, tuple(modules), fix, place, numbers, self.name, is_guess
        )

    def entering(self, model: DistributedDataParallel) -> None:
        """See a distributed model before it passes a batch on to the one that it wraps."""

    def before(self, call: Call) -> None:
        """See a call before the layer computes."""

    def after(self, call: Call) -> None:
        """See a call after the layer has computed."""

    def broken_off(self, call: Call) -> None:
        """See a call that did not return: it raised, or a checkpoint had seen enough of it."""

    def findings(self) -> Iterator[Finding]:
        """What was found in the calls up to now."""
        yield from ()

    def examine(self, state: State) -> Iterator[Finding]:
        """What is found in a checkpoint or a model."""
        yield from ()

    def compare(self, state: State, reference: State) -> Iterator[Finding]:
        """What is found in a checkpoint or a model beside its reference."""
        yield from ()

    def read(self, graph: Graph) -> Iterator[Finding]:
        """What is found in the order of a model's operations."""
        yield from ()

    def weigh(self, evidence: Evidence) -> Iterator[Finding]:
        """What is found in what layers were given."""
        yield from ()

    def confront(self, ranks: RankViews) -> Iterator[Finding]:
        """What is found between the ranks that train or look together."""
        yield from ()
