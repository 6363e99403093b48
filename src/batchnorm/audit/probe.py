"""The probe: PyTorch's global module hooks, and the rules that listen to them.

Watching changes nothing: hooks see modules and inputs, write to neither, draw no random number,
and what a rule raises is noted instead of passed on.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Report
from batchnorm.audit.history import History
from batchnorm.audit.judge import Look, evidence_for, judge
from batchnorm.audit.place import root_module
from batchnorm.audit.profiling import profiles_of
from batchnorm.audit.rank_view import RankView, Statistics
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES
from batchnorm.audit.selection import Selection
from batchnorm.models.compiled import is_compiled, original
from batchnorm.models.norms import TorchBatchNorm

__all__ = ["Probe", "watch"]

_COMPILE_WARNING = "Using `torch.compile.module.` when there are global hooks"


class Probe:
    """Watch every batch norm layer that is called while the context is open.

    ```python
    with Probe() as probe:
        train(model)
    probe.report().findings
    ```

    `torch.nn`'s layers and this library's are watched alike. A compiled model's layers are seen
    by what its passes did to their running statistics, where the model was compiled by
    `torch.compile(model)`; what is compiled in other ways, and traced models, are not seen.

    - `rules`: those that look.
    - `selection`: what of that to report.
    - `model`: watch its layers alone, and name them as it does.
    """

    def __init__(
        self,
        rules: Iterable[type[Rule]] = RULES,
        selection: Selection | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._selection = selection or Selection()
        chosen = [rule() for rule in rules if self._selection.looks(rule.code)]
        self._rules = [rule for rule in chosen if _listens(rule) or _weighs(rule)]
        self._entering = [r for r in self._rules if type(r).entering is not Rule.entering]
        self._disabled: dict[str, str] = {}
        remembers = any(_weighs(rule) or _confronts(rule) for rule in chosen)
        self._history = History() if remembers else None
        self._watched: dict[int, _Watched] = {}  # by id; an entry goes when its layer does
        self._models: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._names: Counter[str] = Counter()
        self._only = model
        self._own = set() if model is None else {id(m) for m in model.modules()}
        self._layers = 0
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Probe:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        if self._history is not None:
            self._handles.append(register_optimizer_step_post_hook(self._stepped))
        # torch.compile warns of global hooks; the script's author did not put them there
        warnings.filterwarnings("ignore", _COMPILE_WARNING)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        warnings.filters[:] = [f for f in warnings.filters if not _is_ours(f[1])]  # type: ignore[index]

    def report(self) -> Report:
        """What the rules found up to now, worst first."""
        history, evidence = self._history, None
        if history is not None:
            try:
                with torch.no_grad():
                    evidence = history.evidence(self._uncalled())
            except Exception as error:
                self._disable(history, error)
        looks: list[Look] = []
        for rule in self._rules:
            if rule.code in self._disabled:
                continue
            if _listens(rule):
                looks.append((rule, rule.findings))
            if _weighs(rule) and evidence is not None:
                seen = evidence_for(rule.code, evidence, self._selection)
                looks.append((rule, partial(rule.weigh, seen)))
        return Report(
            tuple(judge(looks, self._selection, self._disabled)),
            layers=self._layers,
            calls=self._calls,
            rules=tuple(rule.code for rule in self._rules),
            disabled=dict(self._disabled),
            profiles=() if evidence is None else profiles_of(evidence),
            timeline=() if history is None else history.timeline(),
        )

    def view(self, rank: int, status: int | None) -> tuple[RankView, dict[str, Statistics]]:
        """What this rank tells the others, and the statistics that its digests stand for.

        - `rank`, `status`: its number, and the exit status of its script; None before its end.
        """
        history = self._history
        if history is not None:
            try:
                with torch.no_grad():
                    return history.view(rank, status), history.statistics()
            except Exception as error:
                self._disable(history, error)
        return RankView(rank, status=status), {}

    def _before(self, module: nn.Module, inputs: object) -> None:
        if not _is_seen(module) or _is_traced():
            return
        if isinstance(module, TorchBatchNorm):
            x = inputs[0] if isinstance(inputs, tuple) and inputs else None
            self._begin(module, x if isinstance(x, torch.Tensor) else None)
        elif is_compiled(module):
            for layer in _layers_of(module):
                if layer.training or layer.running_mean is not None:
                    self._begin(layer, None)
        elif isinstance(module, DistributedDataParallel):
            for rule in self._entering:
                try:
                    rule.entering(module)
                except Exception as error:
                    self._disable(rule, error)
            if self._history is not None:
                try:
                    self._history.entering(module)
                except Exception as error:
                    self._disable(self._history, error)

    def _begin(self, layer: TorchBatchNorm, x: torch.Tensor | None) -> None:
        watched = self._watched.get(id(layer)) or self._watch(layer)
        if watched is None:
            return
        self._calls += 1
        if x is not None and watched.call is not None and watched.call.input is None:
            watched.call.input = x  # a compiled model's layer, which runs uncompiled
            return
        root = watched.root()
        call = watched.call = Call(
            layer,
            watched.number,
            watched.path,
            x,
            torch.is_grad_enabled(),
            layer if root is None else root,
        )
        self._tell(watched.befores, call)

    def _after(self, module: nn.Module, inputs: object, output: object) -> None:
        if not _is_seen(module) or _is_traced():
            return
        if isinstance(module, TorchBatchNorm):
            self._end(module, output, returned=output is not None)
        elif is_compiled(module):
            for layer in _layers_of(module):
                self._end(layer, None, returned=True)

    def _end(self, layer: TorchBatchNorm, output: object, returned: bool) -> None:
        # only where the rules saw the beginning: a lazy layer comes into being in between
        watched = self._watched.get(id(layer))
        if watched is None or watched.call is None:
            return
        call, watched.call = watched.call, None
        call.output = output if isinstance(output, torch.Tensor) else None
        self._tell(watched.afters if returned else watched.breaks, call)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._history is not None:
            try:
                self._history.stepped(optimizer)
            except Exception as error:
                self._disable(self._history, error)

    def _tell(self, listeners: list[_Listener], call: Call) -> None:
        # as torch.no_grad() does, at a fraction of its price: this runs in every pass
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for owner, hear in listeners:
                try:
                    hear(call)
                except Exception as error:
                    self._disable(owner, error)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _disable(self, owner: Rule | History, error: Exception) -> None:
        """Go on without a rule that failed; without the history, without those that weigh it."""
        lost = [r for r in self._rules if r is owner or (owner is self._history and _weighs(r))]
        for rule in lost:
            self._disabled[rule.code] = f"{type(error).__name__}: {error}"
        if owner is self._history:
            self._history = None
        for watched in list(self._watched.values()):
            watched.breaks = [each for each in watched.breaks if each[0] is not owner]
            watched.befores = [each for each in watched.befores if each[0] is not owner]
            watched.afters = [each for each in watched.afters if each[0] is not owner]
        self._entering = [rule for rule in self._entering if rule is not owner]

    def _watch(self, layer: TorchBatchNorm) -> _Watched | None:
        """Begin with a layer at its first call, unless it is a passing or an unborn one."""
        lazy = any(is_lazy(t) for t in (layer.weight, layer.running_mean) if t is not None)
        # nn.DataParallel makes new replicas at every step
        if lazy or getattr(layer, "_is_replica", False):
            return None
        if self._only is not None and id(layer) not in self._own:
            return None
        key = id(layer)
        root = root_module() if self._only is None else self._only
        root = layer if root is None else original(root)
        path = self._path(layer, root)
        rules = [
            rule
            for rule in self._rules
            if rule.code not in self._disabled and not self._selection.ignores(rule.code, path)
        ]
        owners: list[Rule | History] = [*rules]
        if self._history is not None:
            owners.append(self._history)
        # weak: watching must not keep a model alive
        watched = self._watched[key] = _Watched(
            ref(layer, lambda _: self._watched.pop(key, None)),
            ref(root),
            self._layers,
            path,
            [(each, each.before) for each in owners if type(each).before is not Rule.before],
            [(each, each.after) for each in owners if type(each).after is not Rule.after],
            [(r, r.broken_off) for r in rules if type(r).broken_off is not Rule.broken_off],
        )
        self._layers += 1
        return watched

    def _path(self, layer: TorchBatchNorm, root: nn.Module) -> str:
        """`ResNet.layer1.0.bn2`; of a second model of the class, `ResNet#2.layer1.0.bn2`."""
        if root not in self._models:
            name = type(root).__name__
            self._names[name] += 1
            count = self._names[name]
            self._models[root] = name if count == 1 else f"{name}#{count}"
        modules = root.named_modules(prefix=self._models[root])
        return next((name for name, m in modules if m is layer), type(layer).__name__)

    def _uncalled(self) -> list[str]:
        """Layers of models that were called, which were not."""
        found: dict[int, str] = {}
        for root, name in list(self._models.items()):
            for path, module in root.named_modules(prefix=name):
                if not isinstance(module, TorchBatchNorm) or id(module) in self._watched:
                    continue
                batches = module.num_batches_tracked
                # a part of the model that is compiled by itself is called unseen
                if batches is None or is_lazy(batches) or batches == 0:
                    found.setdefault(id(module), path)
        return list(found.values())


@dataclass
class _Watched:
    """A layer's number and path, who listens to it, and the call of it that is under way."""

    layer: ref[TorchBatchNorm]
    root: ref[nn.Module]
    number: int
    path: str
    befores: list[_Listener]
    afters: list[_Listener]
    breaks: list[_Listener]
    call: Call | None = None


_Listener = tuple["Rule | History", Callable[[Call], None]]


def watch(
    model: nn.Module,
    *,
    rules: Iterable[type[Rule]] = RULES,
    selection: Selection | None = None,
) -> Probe:
    """Watch a model train; the probe's `report()` says what was found.

    ```python
    with watch(model) as probe:
        train(model)
    print(probe.report().findings)
    ```

    - `rules`: those that look; by default all that look at a training run.
    - `selection`: what of that to report; see `Selection`.
    """
    return Probe(rules, selection, original(model))


def _is_seen(module: nn.Module) -> bool:
    return isinstance(module, (TorchBatchNorm, DistributedDataParallel)) or is_compiled(module)


def _layers_of(model: nn.Module) -> list[TorchBatchNorm]:
    return [module for module in model.modules() if isinstance(module, TorchBatchNorm)]


def _listens(rule: Rule) -> bool:
    """Whether a rule hears of every call."""
    return type(rule).findings is not Rule.findings


def _weighs(rule: Rule) -> bool:
    """Whether a rule looks at what is remembered of a run."""
    return type(rule).weigh is not Rule.weigh


def _confronts(rule: Rule) -> bool:
    """Whether a rule looks at several ranks, each of which remembers its own run."""
    return type(rule).confront is not Rule.confront


def _is_traced() -> bool:
    """Whether what runs becomes a graph or has no values: the rules would be seen in it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
        # what is captured into a CUDA graph is replayed, and may not wait for the device
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _is_ours(pattern: object) -> bool:
    return getattr(pattern, "pattern", pattern) == _COMPILE_WARNING
