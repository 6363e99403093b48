"""The rules that look at what lies still: for each, what it finds and what it must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchnorm import BatchNorm1d, BatchNorm2d, Running
from batchnorm.audit import RULES, Finding, LayerState, Severity, State, check, state_of
from batchnorm.repair.freezing import freeze
from batchnorm.statistics import Batch, Untracked

NAN, INF = float("nan"), float("inf")


def filled(layer: nn.Module, **values) -> nn.Module:
    """The layer with some of its tensors filled: one number for all channels, or a list."""
    with torch.no_grad():
        for name, value in values.items():
            tensor = getattr(layer, name)
            tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype).expand(tensor.shape))
    return layer


def trained(layer: nn.Module, features: int = 3, batches: int = 30) -> nn.Module:
    """The layer after a few steps of learning where its outputs should lie."""
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    wanted = torch.linspace(-1, 2, features)
    for _ in range(batches):
        optimizer.zero_grad()
        x = torch.randn(16, features) * 2 + 3
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    return layer


def without_updates() -> nn.Module:
    layer = nn.BatchNorm1d(3)
    freeze(layer, statistics="batch")
    return layer


def changed(layer: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def checkpoint(**tensors: Tensor) -> State:
    """A state dict's view of one layer: neither ε nor the layer itself."""
    return State("checkpoint", (LayerState("norm", **tensors),))


class WithActivation(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input).relu()


class Renamed(nn.BatchNorm1d):
    pass


class Clipped(BatchNorm1d):
    pass


def c(**tensors) -> State:
    return checkpoint(**{name: torch.as_tensor(value) for name, value in tensors.items()})


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def unmoved_statistics(**values) -> nn.Module:
    return filled(nn.BatchNorm1d(3), running_mean=0.0, running_var=1.0, **values)


E, W, I = Severity.ERROR, Severity.WARNING, Severity.INFO  # noqa: E741 - the words they begin with
ONES = [1.0, 1.0, 1.0]

FOUND = [
    # a value that overflowed, in a real step: float16's largest number squared is infinite
    ("BN101", E, lambda: trained(filled(nn.BatchNorm1d(3), running_var=[1.0, INF, 1.0]))),
    ("BN101", E, lambda: filled(BatchNorm2d(3), running_mean=[0.0, 0.0, NAN])),
    ("BN101", E, lambda: filled(nn.BatchNorm1d(3, eps=1e-5), running_var=[1.0, -1e-4, 1.0])),
    ("BN101", E, lambda: filled(nn.BatchNorm1d(3, eps=0.0), running_var=[1.0, 0.0, 1.0])),
    ("BN101", E, lambda: c(running_mean=[0.0, -INF], running_var=[1.0, 1.0])),
    ("BN101", E, lambda: c(running_mean=[0.0], running_var=[-0.5])),
    ("BN101", I, lambda: c(running_mean=[0.0], running_var=[-5e-4])),
    ("BN102", I, lambda: frozen(nn.BatchNorm2d(3))),
    ("BN102", I, lambda: nn.Sequential(frozen(nn.Sequential(BatchNorm1d(3))), nn.BatchNorm1d(3))),
    ("BN102", I, lambda: frozen(nn.BatchNorm1d(3, momentum=None))),
    ("BN102", I, lambda: frozen(BatchNorm2d(3, statistics=Running(updates=True)))),
    ("BN106", E, lambda: c(running_mean=ONES, weight=ONES)),
    ("BN106", E, lambda: c(running_var=ONES, weight=ONES)),
    ("BN106", E, lambda: c(batches=7, weight=ONES)),
    ("BN106", W, lambda: filled(trained(nn.BatchNorm1d(3)), running_mean=0.0, running_var=1.0)),
    ("BN106", W, lambda: c(running_mean=[0.0, 0.0], running_var=[1.0, 1.0], bias=[0.0, 0.3])),
    ("BN113", I, lambda: WithActivation(3)),
    ("BN113", I, lambda: nn.Sequential(Renamed(3), nn.BatchNorm1d(3))),
    ("BN113", I, lambda: nn.ModuleList([WithActivation(3), WithActivation(3)])),
    ("BN115", W, lambda: nn.SyncBatchNorm(3)),
    ("BN115", W, lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))),
    ("BN115", W, lambda: nn.SyncBatchNorm(3, affine=False).eval()),
    ("BN116", W, lambda: changed(nn.BatchNorm1d(3), track_running_stats=False)),
    ("BN116", W, lambda: changed(BatchNorm2d(3), track_running_stats=False)),
    (
        "BN116",
        W,
        lambda: changed(nn.BatchNorm1d(3, track_running_stats=False), track_running_stats=True),
    ),
    ("BN117", W, lambda: trained(nn.BatchNorm1d(3, momentum=0.0))),
    ("BN117", W, lambda: BatchNorm2d(3, momentum=0.0)),
    ("BN117", I, lambda: changed(trained(nn.BatchNorm1d(3)), momentum=0.0)),
    ("BN118", W, lambda: nn.BatchNorm2d(3, 0.1)),
    ("BN118", W, lambda: BatchNorm1d(3, 0.99)),
    ("BN118", W, lambda: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, eps=1.0))),
    ("BN121", W, lambda: nn.BatchNorm1d(3).bfloat16()),
    ("BN121", W, lambda: nn.Sequential(nn.Linear(3, 3), trained(nn.BatchNorm1d(3))).half()),
    ("BN121", W, lambda: c(running_mean=torch.zeros(3).half(), running_var=torch.ones(3))),
    ("BN121", I, lambda: BatchNorm1d(3).bfloat16()),
    ("BN128", I, lambda: filled(nn.BatchNorm1d(3), weight=[0.0, 1.0, 0.5])),
    ("BN128", I, lambda: filled(BatchNorm2d(3), weight=[1.0, -1e-7, 1.0])),
    ("BN128", I, lambda: c(running_mean=[0.0, 0.0], running_var=ONES[:2], weight=[1.0, 1e-9])),
]

SILENT = [
    ("BN101", lambda: trained(nn.BatchNorm1d(3))),
    # as published weights have them: Cadene/pretrained-models.pytorch#99, MobileNet-Caffe#87
    ("BN101", lambda: filled(nn.BatchNorm1d(3), running_var=[1.0, 1.9e-14, 1.0])),
    ("BN101", lambda: filled(nn.BatchNorm1d(3, eps=1e-3), running_var=[1.0, -9e-4, 1.0])),
    ("BN101", lambda: c(running_mean=[3e38], running_var=[0.0])),
    ("BN101", lambda: nn.BatchNorm1d(3, track_running_stats=False)),
    ("BN101", lambda: nn.LazyBatchNorm1d()),
    ("BN102", lambda: nn.BatchNorm2d(3)),
    ("BN102", lambda: frozen(nn.BatchNorm2d(3)).eval()),
    ("BN102", lambda: BatchNorm2d(3).freeze()),
    ("BN102", lambda: frozen(BatchNorm2d(3, statistics=Running()))),
    ("BN102", lambda: frozen(BatchNorm2d(3, statistics=Untracked(Batch())))),
    ("BN102", lambda: nn.BatchNorm2d(3, affine=False)),
    ("BN102", lambda: frozen(nn.BatchNorm2d(3, track_running_stats=False))),
    ("BN106", lambda: nn.BatchNorm1d(3)),
    ("BN106", lambda: nn.BatchNorm1d(3, track_running_stats=False)),
    ("BN106", lambda: trained(nn.BatchNorm1d(3))),
    ("BN106", lambda: unmoved_statistics(weight=0.0)),  # a residual branch's last, as initialized
    # as DCGAN initializes it
    ("BN106", lambda: unmoved_statistics(weight=[1.02, 0.99, 1.01])),
    ("BN106", lambda: c(running_mean=[0.1], running_var=[1.0], weight=[2.0])),
    ("BN106", lambda: trained(nn.BatchNorm1d(3, track_running_stats=False))),
    ("BN113", lambda: nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm2d())),
    ("BN113", lambda: nn.SyncBatchNorm(3)),
    ("BN113", lambda: nn.Sequential(BatchNorm1d(3, act="relu"), Clipped(3))),
    ("BN115", lambda: nn.BatchNorm1d(3)),
    ("BN115", lambda: nn.SyncBatchNorm(3, device="meta")),
    ("BN115", lambda: BatchNorm2d(3)),
    ("BN116", lambda: nn.BatchNorm1d(3)),
    ("BN116", lambda: nn.BatchNorm1d(3, track_running_stats=False)),
    ("BN116", lambda: BatchNorm2d(3).freeze()),
    ("BN116", without_updates),
    ("BN117", lambda: nn.BatchNorm1d(3, momentum=None)),
    ("BN117", lambda: trained(nn.BatchNorm1d(3, momentum=0.001))),
    ("BN117", lambda: nn.BatchNorm1d(3, momentum=0.0, track_running_stats=False)),
    ("BN118", lambda: nn.BatchNorm2d(3)),
    ("BN118", lambda: nn.BatchNorm2d(3, 1e-3, 0.01)),
    ("BN118", lambda: c(running_mean=[0.0], running_var=[1.0])),
    ("BN121", lambda: nn.BatchNorm1d(3)),
    ("BN121", lambda: nn.BatchNorm1d(3).double()),
    ("BN121", lambda: nn.Linear(3, 3).half()),
    ("BN128", lambda: nn.BatchNorm1d(3)),
    ("BN128", lambda: filled(nn.BatchNorm1d(3), weight=0.0)),
    ("BN128", lambda: nn.BatchNorm1d(3, affine=False)),
    ("BN128", lambda: trained(nn.BatchNorm1d(3))),
]


def found(code: str, subject: nn.Module | State) -> list[Finding]:
    state = subject if isinstance(subject, State) else state_of(subject, "model")
    report = check([state])
    assert report.disabled == {}
    return [finding for finding in report.findings if finding.code == code]


@pytest.mark.parametrize(("code", "severity", "make"), FOUND)
def test_it_is_found_and_called_as_bad_as_it_is(seeded, code, severity, make):
    (finding,) = found(code, make())
    assert finding.severity is severity
    assert finding.modules
    assert finding.name == next(rule.name for rule in RULES if rule.code == code)
    for text in (finding.message, finding.fix):
        assert text
        assert "\n" not in text


@pytest.mark.parametrize(("code", "make"), SILENT)
def test_it_is_silent_where_nothing_is_wrong(seeded, code, make):
    assert found(code, make()) == []


def test_every_rule_of_a_state_has_three_cases_of_each_kind():
    codes = [rule.code for rule in RULES if "examine" in vars(rule)]
    for cases in (FOUND, SILENT):
        counts = [sum(case[0] == code for case in cases) for code in codes]
        assert min(counts) >= 3
