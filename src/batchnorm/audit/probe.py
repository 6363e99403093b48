"""The probe: PyTorch's global module hooks, and the rules that listen to them.

Watching changes nothing: hooks see modules and inputs, write to neither, draw no random number,
and what a rule raises is noted instead of passed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

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
from batchnorm.audit.place import module_path
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES

__all__ = ["Probe"]


class Probe:
    """Watch every batch norm layer that is called while the context is open.

    ```python
    with Probe() as probe:
        train(model)
    probe.report().findings
    ```

    `torch.nn`'s layers and this library's are watched alike. Models under torch.compile are not
    seen: their hooks do not run.
    """

    def __init__(self, rules: Iterable[type[Rule]] = RULES) -> None:
        self._rules = [rule() for rule in rules]
        self._active = list(self._rules)
        self._disabled: dict[str, str] = {}
        self._paths: dict[TorchBatchNorm, str] = {}
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Probe:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

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
            layers=len(self._paths),
            calls=self._calls,
            rules=tuple(rule.code for rule in self._rules),
            disabled=dict(self._disabled),
        )

    def _before(self, module: nn.Module, inputs: object) -> None:
        if isinstance(module, TorchBatchNorm) and not torch.compiler.is_compiling():
            self._calls += 1
            self._tell(Rule.before.__name__, module, inputs)

    def _after(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, TorchBatchNorm) and not torch.compiler.is_compiling():
            self._tell(Rule.after.__name__, module, inputs)

    def _tell(self, moment: str, layer: TorchBatchNorm, inputs: object) -> None:
        if any(is_lazy(t) for t in (layer.weight, layer.running_mean) if t is not None):
            return
        x = inputs[0] if isinstance(inputs, tuple) and inputs else None
        x = x if isinstance(x, torch.Tensor) else None
        call = Call(layer, self._path(layer), x, has_gradients=torch.is_grad_enabled())
        with torch.no_grad():
            for rule in tuple(self._active):
                try:
                    getattr(rule, moment)(call)
                except Exception as error:
                    self._disable(rule, error)

    def _path(self, layer: TorchBatchNorm) -> str:
        path = self._paths.get(layer)
        if path is None:
            path = self._paths[layer] = module_path(layer)
        return path

    def _disable(self, rule: Rule, error: Exception) -> None:
        self._active.remove(rule)
        self._disabled[rule.code] = f"{type(error).__name__}: {error}"
