"""What a rule is: a code, a name, a check, and a docstring that is its page."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Finding

__all__ = ["Rule"]


class Rule(ABC):
    """One way in which batch normalization goes wrong.

    A subclass's docstring is its page, in Markdown, with the headings What it finds, Why it
    hurts, Example, Fix, When it is fine, Evidence. `before` and `after` are called around every
    forward pass of a batch norm layer; they must change nothing and should cost next to nothing.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    looks_at: ClassVar[str]

    @classmethod
    def page(cls) -> str:
        """The rule's page."""
        return f"# {cls.code}: {cls.name}\n\n{inspect.cleandoc(cls.__doc__ or '')}"

    def before(self, call: Call) -> None:  # noqa: B027 - most rules look only once
        """See a call before the layer computes."""

    def after(self, call: Call) -> None:  # noqa: B027 - or not at all
        """See a call after the layer has computed."""

    @abstractmethod
    def findings(self) -> Iterator[Finding]:
        """What was found up to now."""
