"""The probe: PyTorch's global module hooks, and the rules that listen to them.

Watching changes nothing: hooks see modules and inputs, write to neither, draw no random number,
and what a rule raises is noted instead of passed on.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from batchnorm.audit.call import Call, TorchBatchNorm
from batchnorm.audit.finding import Finding, Report
from batchnorm.audit.place import root_module
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES

__all__ = ["Probe"]

_COMPILE_WARNING = "Using `torch.compile.module.` when there are global hooks"


class Probe:
    """Watch every batch norm layer that is called while the context is open.

    ```python
    with Probe() as probe:
        train(model)
    probe.report().findings
    ```

    `torch.nn`'s layers and this library's are watched alike. Compiled and traced models are left
    alone, and not seen.
    """

    def __init__(self, rules: Iterable[type[Rule]] = RULES) -> None:
        self._rules = [rule() for rule in rules if _listens(rule)]
        self._active = list(self._rules)
        self._listeners = _listeners(self._active)
        self._disabled: dict[str, str] = {}
        self._watched: dict[int, _Watched] = {}  # by id; an entry goes when its layer does
        self._models: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._names: Counter[str] = Counter()
        self._layers = 0
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Probe:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
        ]
        # torch.compile warns of global hooks; the script's author did not put them there
        warnings.filterwarnings("ignore", _COMPILE_WARNING)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        warnings.filters[:] = [f for f in warnings.filters if not _is_ours(f[1])]  # type: ignore[index]

    def report(self) -> Report:
        """What the rules found up to now, worst first."""
        findings: list[Finding] = []
        for rule in tuple(self._active):
            try:
                findings.extend(rule.findings())
            except Exception as error:
                self._disable(rule, error)
        findings.sort(key=lambda f: (f.severity.rank, f.code, f.modules))
        return Report(
            tuple(findings),
            layers=self._layers,
            calls=self._calls,
            rules=tuple(rule.code for rule in self._rules),
            disabled=dict(self._disabled),
        )

    def _before(self, module: nn.Module, inputs: object) -> None:
        if not isinstance(module, TorchBatchNorm) or _is_traced():
            return
        watched = self._watched.get(id(module)) or self._watch(module)
        if watched is None:
            return
        self._calls += 1
        x = inputs[0] if isinstance(inputs, tuple) and inputs else None
        call = watched.call = Call(
            module,
            watched.number,
            watched.path,
            x if isinstance(x, torch.Tensor) else None,
            torch.is_grad_enabled(),
        )
        self._tell(self._listeners[0], call)

    def _after(self, module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(module, TorchBatchNorm):
            return
        # only where the rules saw the beginning: a lazy layer comes into being in between
        watched = self._watched.get(id(module))
        if watched is None or watched.call is None:
            return
        call, watched.call = watched.call, None
        self._tell(self._listeners[1], call)

    def _tell(self, listeners: list[_Listener], call: Call) -> None:
        # as torch.no_grad() does, at a fraction of its price: this runs in every pass
        torch._C._set_grad_enabled(False)
        try:
            for rule, hear in listeners:
                try:
                    hear(call)
                except Exception as error:
                    self._disable(rule, error)
        finally:
            torch._C._set_grad_enabled(call.has_gradients)

    def _watch(self, layer: TorchBatchNorm) -> _Watched | None:
        """Begin with a layer at its first call, unless it is a passing or an unborn one."""
        lazy = any(is_lazy(t) for t in (layer.weight, layer.running_mean) if t is not None)
        # nn.DataParallel makes new replicas at every step
        if lazy or getattr(layer, "_is_replica", False):
            return None
        key = id(layer)
        # weak: watching must not keep a model alive
        reference = ref(layer, lambda _: self._watched.pop(key, None))
        watched = self._watched[key] = _Watched(reference, self._layers, self._path(layer))
        self._layers += 1
        return watched

    def _path(self, layer: TorchBatchNorm) -> str:
        """`ResNet.layer1.0.bn2`; of a second model of the class, `ResNet#2.layer1.0.bn2`."""
        root = root_module() or layer
        if root not in self._models:
            name = type(root).__name__
            self._names[name] += 1
            count = self._names[name]
            self._models[root] = name if count == 1 else f"{name}#{count}"
        modules = root.named_modules(prefix=self._models[root])
        return next((name for name, m in modules if m is layer), type(layer).__name__)

    def _disable(self, rule: Rule, error: Exception) -> None:
        self._disabled[rule.code] = f"{type(error).__name__}: {error}"
        self._active = [r for r in self._active if r is not rule]
        self._listeners = _listeners(self._active)


@dataclass
class _Watched:
    """A layer's number and path, and the call of it that is under way."""

    layer: ref[TorchBatchNorm]
    number: int
    path: str
    call: Call | None = None


_Listener = tuple[Rule, Callable[[Call], None]]


def _listens(rule: type[Rule]) -> bool:
    """Whether a rule looks at a training run."""
    return rule.findings is not Rule.findings


def _listeners(rules: list[Rule]) -> tuple[list[_Listener], list[_Listener]]:
    """Who listens before a pass and who after it: the rules that say anything there."""
    return (
        [(r, r.before) for r in rules if type(r).before is not Rule.before],
        [(r, r.after) for r in rules if type(r).after is not Rule.after],
    )


def _is_traced() -> bool:
    """Whether what runs becomes a graph or has no values: the rules would be seen in it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
    )


def _is_ours(pattern: object) -> bool:
    return getattr(pattern, "pattern", pattern) == _COMPILE_WARNING
