from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.audit import audit
from batchnorm.audit.gathering import gather


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNorm2d(4, act="relu")
        self.dropout, self.head = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, image, shift=0.0):
        x = self.dropout(self.norm(self.conv(image + shift)))
        return self.head(x.mean((2, 3)))


@dataclass
class Batch:
    image: torch.Tensor
    shift: torch.Tensor


def images(n=6, k=4):
    return [torch.randn(n, 3, 6, 6) for _ in range(k)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(seeded, training, fails):
    model = Net().train(training)
    model.norm.eval()
    hooks = []
    model.head.register_forward_hook(lambda *_: hooks.append(1))
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    batches, bad = images(), torch.randn(6, 5, 6, 6)
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="channels"):
            gather(model, [*batches, bad])
    else:
        gather(model, batches)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert (model.conv.weight.grad == 1).all()
    assert model.conv.bias.grad is None
    assert not model.norm._forward_pre_hooks
    called = len(hooks)
    model.eval()(batches[0])
    assert len(hooks) == called + 1


def test_it_holds_the_moments_of_what_each_layer_is_given(seeded):
    model, batches = Net().eval(), images()
    model.norm.running_mean.fill_(3.0)
    evidence = gather(model, batches)
    assert [layer.path for layer in evidence.layers] == ["norm", "head"]
    assert (evidence.batches, evidence.uncalled) == (4, [])
    norm, head = evidence.layers
    with torch.no_grad():
        for batch, own, means in zip(batches, norm.batches, evidence.samples, strict=True):
            x = model.conv(batch).double().numpy()
            np.testing.assert_allclose(own.mean, x.mean((0, 2, 3)), atol=1e-6)
            np.testing.assert_allclose(own.var(), x.var((0, 2, 3)), atol=1e-6)
            np.testing.assert_allclose(means, x.mean((2, 3)), atol=1e-6)
        # in training mode, dropout off: the head is given means of normalized, rectified values
        x = model.conv(batches[0])
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        z = torch.relu((x - mean) / (var + 1e-5).sqrt())
    np.testing.assert_allclose(head.batches[0].mean, z.mean((0, 2, 3)), atol=1e-5)
    assert norm.running is not None
    assert norm.running[0].tolist() == [3.0] * 4


def test_what_it_holds_is_its_own(seeded):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x):
            y = self.norm(x)
            x.zero_()
            return y

    model, batches = InPlace(), list(torch.randn(4, 8, 3, dtype=torch.float64))
    want = [batch.clone() for batch in batches]
    evidence = gather(model, batches)
    (norm,) = evidence.layers
    model.norm.running_mean.fill_(7.0)
    assert norm.running is not None
    assert norm.running[0].tolist() == [0.0] * 3
    assert all(map(torch.equal, evidence.samples, want))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        lambda x: {"image": x, "shift": torch.ones(len(x), 1, 1, 1)},
        lambda x: OrderedDict(image=x),
        lambda x: Batch(x, torch.ones(len(x), 1, 1, 1)),
    ],
)
def test_batches_come_as_people_have_them(seeded, wrap):
    evidence = gather(Net(), (wrap(x) for x in images()))
    assert len(evidence.layers[0].batches) == 4
    assert evidence.companions is not None
    assert evidence.companions < 1e-5


def test_a_forward_of_one_s_own(seeded):
    batches = [{"x": x, "label": 3} for x in images()]
    evidence = gather(Net(), batches, lambda model, batch: model(batch["x"], shift=1.0))
    assert evidence.batches == 4
    evidence = gather(Net(), images(k=50), limit=5)
    assert evidence.batches == 5


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="there are no batches"):
        gather(Net(), [])


def test_audit_says_what_it_looked_at(seeded):
    report = audit(Net())
    assert (report.subject, report.layers, report.calls) == ("Net", 2, 0)
    assert not {"BN103", "BN104", "BN124", "BN131"} & set(report.rules)
    report = audit(Net(), images(), name="a network")
    assert (report.subject, report.calls, report.disabled) == ("a network", 4, {})
    assert {"BN101", "BN103", "BN104", "BN124", "BN131"} <= set(report.rules)
    assert [finding.code for finding in report.findings] == ["BN127"]  # the convolution's bias


# The rules that look at batches


def normal(n=16, c=8, k=12, between=0.0, positions=()):
    shift = torch.randn(k, 1, c, *(1,) * len(positions)) * between
    return list(torch.randn(k, n, c, *positions) + shift)


def trained(layer, batches):
    for _ in range(10):
        for batch in batches:
            layer(batch)
    return layer


def stale(momentum):
    return trained(nn.Sequential(nn.BatchNorm1d(8, momentum=momentum)), [b + 5 for b in normal()])


def two_norms(**options):
    return nn.Sequential(BatchNorm1d(8, **options), nn.Linear(8, 8), BatchNorm1d(8, **options))


class Forgets(nn.Module):
    def __init__(self, spare):
        super().__init__()
        self.norm, self.spare = nn.BatchNorm1d(8), spare

    def forward(self, x):
        return self.norm(x)


def sorted_classes(by_class, n=16, c=8, k=12):
    centers = torch.randn(4, c) * 3
    labels = torch.arange(n * k) * 4 // (n * k)
    x = centers[labels] + torch.randn(n * k, c)
    return list((x if by_class else x[torch.randperm(n * k)]).split(n))


FOUND = [
    ("BN103", lambda: (stale(0.001), [b + 5 for b in normal()])),
    ("BN103", lambda: (stale(0.1), normal())),
    ("BN103", lambda: (stale(0.1), [b * 4 + 5 for b in normal()])),
    ("BN104", lambda: (two_norms(track_running_stats=False), normal())),
    ("BN104", lambda: (nn.BatchNorm1d(8, track_running_stats=False).eval(), normal())),
    (
        "BN104",
        lambda: (
            nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)),
            normal(positions=(3, 3)),
        ),
    ),
    ("BN124", lambda: (nn.BatchNorm1d(8), sorted_classes(True))),
    ("BN124", lambda: (BatchNorm2d(8), normal(positions=(4, 4), between=0.2))),
    ("BN124", lambda: (two_norms(), normal(between=0.7))),
    ("BN131", lambda: (Forgets(nn.BatchNorm1d(8)), normal())),
    ("BN131", lambda: (Forgets(two_norms()), normal())),
    ("BN131", lambda: (Forgets(nn.LazyBatchNorm1d()), normal())),
]
SILENT = [
    ("BN103", lambda: (trained(two_norms(), batches := normal()), batches)),
    ("BN103", lambda: (two_norms(), [b + 5 for b in normal()])),  # never trained
    ("BN103", lambda: (stale(0.1)[0].eval(), [b + 5 for b in normal()])),
    ("BN103", lambda: (nn.Sequential(stale(0.001).eval(), nn.ReLU()).train(), normal(k=3))),
    ("BN103", lambda: (nn.Sequential(trained(BatchNorm1d(8), normal()).freeze()), normal())),
    ("BN104", lambda: (two_norms(), normal())),
    ("BN104", lambda: (nn.InstanceNorm2d(8), normal(positions=(3, 3)))),
    ("BN104", lambda: (Net(), images())),
    ("BN124", lambda: (nn.BatchNorm1d(8), sorted_classes(False))),
    ("BN124", lambda: (BatchNorm2d(8), normal(positions=(4, 4)))),
    ("BN124", lambda: (two_norms(), normal(k=1))),
    ("BN124", lambda: (nn.BatchNorm1d(8), [torch.ones(4, 8)] * 5)),
    ("BN131", lambda: (two_norms(), normal())),
    ("BN131", lambda: (Forgets(nn.GroupNorm(2, 8)), normal())),
    ("BN131", lambda: (Net(), images())),
]


def codes(made):
    model, batches = made
    report = audit(model, batches)
    assert report.disabled == {}
    return [finding.code for finding in report.findings]


@pytest.mark.parametrize(("code", "make"), FOUND)
def test_it_is_found(seeded, code, make):
    assert codes(make()).count(code) >= 1


@pytest.mark.parametrize(("code", "make"), SILENT)
def test_it_is_silent(seeded, code, make):
    assert codes(make()).count(code) == 0
