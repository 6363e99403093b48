"""Pieces of work that take turns and meet: threads of which one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import overrides as function_modes
from torch.utils import _python_dispatch as dispatch_modes

__all__ = ["ask", "in_lockstep"]


def in_lockstep(
    works: Sequence[Callable[[], Any]], meet: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """What each of several pieces of work returns, which `ask` for what needs all of them.

    Each runs in a thread, and only while no other does: the first until it asks or ends, then the
    second, and so on; so random numbers are drawn in one order. When all have had their turn,
    `meet` gets their questions, None from those that ended, and gives the answers.

    Autograd's and autocast's modes, the default device, streams and hooks for saved tensors are
    the caller's. What one piece of work or `meet` raises ends all, and is raised here.
    """
    around = _Surroundings()
    lanes = [_Lane(work, around) for work in works]
    try:
        for lane in lanes:
            lane.start()
        answers: list[Any] = [None] * len(lanes)
        while True:
            # an answer is let go with its lane's turn: it may be a large tensor
            events = [lane.resume(answers.pop(0)) for lane in lanes]
            if all(isinstance(event, _Ended) for event in events):
                return [event.value for event in events]
            answers = meet([None if isinstance(e, _Ended) else e.value for e in events])
    finally:
        for lane in lanes:
            lane.end()


def ask(question: Any) -> Any:
    """In a piece of work: wait until all others ask too, and get the answer.

    Raises `RuntimeError` in any other thread.
    """
    lane: _Lane | None = getattr(_here, "lane", None)
    if lane is None:
        raise RuntimeError(
            "a layer that waits for the other micro-batches was called in a thread of the model's "
            "own, such as torch.nn.DataParallel starts: call the model within one thread"
        )
    return lane.ask(question)


_here = threading.local()


@dataclass(frozen=True)
class _Asked:
    value: Any


@dataclass(frozen=True)
class _Ended:
    value: Any


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _Cancellation(Exception):  # noqa: N818 - nobody's error
    """Ends a lane that waits; an Exception, lest hooks be passed over that clean up."""


_CANCEL = object()


class _Lane(threading.Thread):
    """The thread of one piece of work."""

    def __init__(self, work: Callable[[], Any], around: _Surroundings) -> None:
        super().__init__(daemon=True)
        self._work, self._around, self._context = work, around, copy_context()
        self._events: SimpleQueue[_Asked | _Ended | _Failed] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()

    def run(self) -> None:
        """Work, from the first turn on."""
        _here.lane = self
        try:
            self._wait()
            with self._around.entered():
                self._events.put(_Ended(self._context.run(self._work)))
        except _Cancellation:
            pass
        except BaseException as error:
            self._events.put(_Failed(error))

    def resume(self, answer: Any) -> _Asked | _Ended:
        """Let it run on with an answer, until it asks again or ends; raise what it raises."""
        self._answers.put(answer)
        del answer
        event = self._events.get()
        if not isinstance(event, _Failed):
            return event
        try:
            raise event.error
        finally:
            del event  # an error that its own traceback holds would keep all tensors there

    def ask(self, question: Any) -> Any:
        """In the lane itself."""
        self._events.put(_Asked(question))
        return self._wait()

    def end(self) -> None:
        """Have it end, unless it has, and wait for that."""
        if self.is_alive():
            self._answers.put(_CANCEL)
            self.join()

    def _wait(self) -> Any:
        answer = self._answers.get()
        if answer is _CANCEL:
            self._answers.put(_CANCEL)  # for good, whoever catches this
            raise _Cancellation
        return answer


_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


class _Surroundings:
    """What PyTorch keeps for each thread apart, as it is in this one."""

    def __init__(self) -> None:
        self._records = torch.is_grad_enabled()
        self._infers = torch.is_inference_mode_enabled()
        devices = [device for device in _AUTOCAST if torch.is_autocast_enabled(device)]
        self._autocast = [(device, torch.get_autocast_dtype(device)) for device in devices]
        self._caches = torch.is_autocast_cache_enabled()
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._function_modes = function_modes._get_current_function_mode_stack()
        self._dispatch_modes = dispatch_modes._get_current_dispatch_mode_stack()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same in another thread."""
        with ExitStack() as stack:
            if self._infers:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._records))
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=self._caches))
            if self._hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._hooks))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            # pushed and not entered: to enter a mode once more may reset what it counts
            for mode in self._function_modes:
                function_modes._push_mode(mode)
                stack.callback(function_modes._pop_mode)
            for mode in self._dispatch_modes:
                dispatch_modes._push_mode(mode)
                stack.callback(dispatch_modes._pop_mode)
            yield
