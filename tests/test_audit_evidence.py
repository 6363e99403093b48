from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.audit import Selection, audit, check, label_loss, state_of
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
    model.dropout.p = 0.0
    model.norm.running_mean.fill_(3.0)
    evidence = gather(model, batches)
    assert [layer.path for layer in evidence.layers] == ["norm", "head"]
    assert (evidence.batches, evidence.uncalled) == (4, [])
    norm, head = evidence.layers
    with torch.no_grad():
        for batch, own, seen in zip(batches, norm.batches, evidence.samples["norm"], strict=True):
            x = model.conv(batch).double().numpy()
            np.testing.assert_allclose(own.mean, x.mean((0, 2, 3)), atol=1e-6)
            np.testing.assert_allclose(own.var(), x.var((0, 2, 3)), atol=1e-6)
            # of the model's input, 4 × 4 means of each channel of 6 × 6
            corner = batch[:, 0, :2, :2].mean((1, 2))
            np.testing.assert_allclose(seen[:, 0], corner, atol=1e-6)
            assert seen.shape == (6, 3 * 4 * 4)
        # in training mode: the head is given means of normalized, rectified values
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
    want = [batch.float().double() for batch in batches]
    evidence = gather(model, batches)
    (norm,) = evidence.layers
    model.norm.running_mean.fill_(7.0)
    assert norm.running is not None
    assert norm.running[0].tolist() == [0.0] * 3
    assert all(map(torch.equal, evidence.samples["norm"], want))


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


def test_of_a_sharded_model_no_pass_is_made_that_other_ranks_may_not_make(seeded, monkeypatch):
    passes = []

    def forward(model, batch):
        passes.append(len(batch))
        return model(batch)

    monkeypatch.setattr("batchnorm.audit.gathering.is_sharded", lambda model: True)
    evidence = gather(Net(), images(), forward)
    assert (evidence.companions, evidence.leakage) == (None, None)
    assert passes == [len(batch) for batch in images()]


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


class Twice(nn.Module):
    """A layer that is called twice in a pass, the second time with something else."""

    def __init__(self, shift=0.0, scale=1.0, times=2):
        super().__init__()
        self.norm, self.shift, self.scale, self.times = nn.BatchNorm1d(8), shift, scale, times

    def forward(self, x):
        return sum(self.norm(x * self.scale**i + self.shift * i) for i in range(self.times))


class Unnormalized(Twice):
    """The same without anything that both calls would have to share."""

    def __init__(self):
        super().__init__(shift=3.0)
        self.norm = nn.BatchNorm1d(8, affine=False, track_running_stats=False)


class Causal(nn.Module):
    """Each output sees the inputs up to its own position, and in training the batch norm's."""

    def __init__(self, norm, kernel=3):
        super().__init__()
        self.conv, self.norm, self.kernel = nn.Conv1d(4, 4, kernel), norm, kernel

    def forward(self, x):
        return self.norm(self.conv(F.pad(x, (self.kernel - 1, 0))))


class Tokens(nn.Module):
    """A language model over tokens, (n, t) to (n, t, words)."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = (
            nn.Embedding(11, 4),
            Causal(BatchNorm1d(4)),
            nn.Linear(4, 11),
        )

    def forward(self, x):
        return self.head(self.body(self.words(x).mT).mT)


class OverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.LayerNorm(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x.mT).mT


def sequences(k=4):
    return list(torch.randn(k, 6, 4, 12))


class Contrast(nn.Module):
    """Answers each sample beside the others."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.norm(x)
        return x @ x.T


class Neighbours(nn.Module):
    """A graph convolution: each row becomes a mean of some of the others."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(torch.ones(len(x), len(x)) @ x / len(x) + 0.1 * x)


class Recurrent(nn.Module):
    """Causal, with dropout that is no module, and a batch norm that is frozen."""

    def __init__(self):
        super().__init__()
        self.body = Causal(nn.BatchNorm1d(4).eval())

    def forward(self, x):
        return F.dropout(self.body(x), 0.5, self.training)


def after_dropout():
    """Statistics that were learned with dropout on, as the layer is given its input."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.6), nn.BatchNorm1d(8))
    batches = normal(n=64)
    return trained(model, batches), batches


def ported():
    """Trained statistics without their count, as ported weights have them."""
    layer = nn.Sequential(nn.BatchNorm1d(8))
    layer[0].running_mean.fill_(5.0)
    return layer


def deployed_at(shift, scale=1.0, model=None):
    """A model trained on its data, and deployment's, which lie elsewhere."""
    batches = normal()
    model = trained(two_norms() if model is None else model, batches)
    return model, batches, {"deploy": [b * scale + shift for b in normal()]}


def padded(lengths, of=0.0):
    """Sequences of data with mean 2 and standard deviation 1, with `of` behind them."""
    x = torch.randn(12, 16, 4, 20) + 2
    inside = (torch.arange(20) < torch.tensor(lengths).repeat(16)[:16, None]).expand(12, 16, 20)
    x = x.where(inside[:, :, None], of)
    batches = list(x)
    masks = {id(batch): mask for batch, mask in zip(batches, inside, strict=True)}
    return nn.BatchNorm1d(4), batches, {"mask": lambda batch: masks[id(batch)]}


class KnowsPadding(nn.Module):
    """Hands its layer the mask, as BN125 advises."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x, mask=(x != 0).any(1))


def knowing():
    _, batches, options = padded([20, 5])
    return trained(KnowsPadding(), batches), batches, options | {"deploy": batches}


def strided(lengths):
    """The mask at half its resolution."""
    _, batches, options = padded(lengths)
    return nn.Sequential(nn.MaxPool1d(2), nn.BatchNorm1d(4)), batches, options


def with_loss(layers, shortcut=False, k=6):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList([nn.Linear(8, 8) for _ in range(layers)])
            self.norms = nn.ModuleList([BatchNorm1d(8) for _ in range(layers)])

        def forward(self, x):
            for linear, norm in zip(self.linears, self.norms, strict=True):
                y = norm(linear(x)).relu()
                x = x + 0.1 * y if shortcut else y
            return x

    batches = [(x, torch.randint(8, (16,))) for x in normal(k=k)]
    return Deep(), batches, {"loss": label_loss}


def constant(channels):
    x = torch.randn(8, 16, 8)
    x[:, :, :channels] = 3.0
    return nn.Sequential(BatchNorm1d(8)), list(x)


FOUND = [
    ("BN103", lambda: (ported(), normal())),
    ("BN110", lambda: (two_norms(), normal(n=2))),
    ("BN110", lambda: (nn.BatchNorm1d(8), normal(n=4, k=32))),
    (
        "BN110",
        lambda: (BatchNorm2d(8), [b.expand(-1, -1, 5, 5) for b in normal(n=3, positions=(1, 1))]),
    ),
    ("BN123", lambda: (Twice(shift=2.0), normal())),
    ("BN123", lambda: (Twice(scale=3.0), normal())),
    ("BN123", lambda: (Twice(shift=1.0, times=3), normal())),
    ("BN125", lambda: padded([20, 5])),
    ("BN125", lambda: padded([20, 8, 4], of=-3.0)),
    ("BN125", lambda: strided([20, 4])),
    ("BN126", lambda: deployed_at(2.0)),
    ("BN126", lambda: deployed_at(0.0, scale=3.0)),
    ("BN126", lambda: deployed_at(-1.0, model=nn.Sequential(nn.BatchNorm1d(8)))),
    ("BN128", lambda: constant(2)),
    ("BN128", lambda: constant(7)),
    ("BN128", lambda: (nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), constant(3)[1])),
    ("BN129", lambda: (Causal(nn.BatchNorm1d(4)), sequences())),
    (
        "BN129",
        lambda: (nn.Sequential(Causal(BatchNorm1d(4)), Causal(nn.BatchNorm1d(4))), sequences()),
    ),
    ("BN129", lambda: (Tokens(), [torch.randint(11, (6, 12)) for _ in range(4)])),
    ("BN130", lambda: with_loss(60)),
    ("BN130", lambda: with_loss(80)),
    ("BN130", lambda: with_loss(100, k=4)),
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
    ("BN103", after_dropout),
    ("BN104", lambda: (Contrast(), normal())),
    ("BN110", lambda: (Twice(shift=5.0), normal(n=16))),  # two calls apart are no noise
    ("BN123", lambda: (Unnormalized(), normal())),
    ("BN124", lambda: (Neighbours(), normal())),
    ("BN129", lambda: (Recurrent(), sequences())),
    ("BN110", lambda: (two_norms(), normal(n=16))),
    ("BN110", lambda: (two_norms(), normal(n=2, k=3))),  # too few to know
    ("BN110", lambda: (BatchNorm2d(8), normal(n=2, positions=(5, 5)))),
    ("BN123", lambda: (Twice(), normal())),
    ("BN123", lambda: (Twice(shift=0.2), normal())),
    ("BN123", lambda: (two_norms(), normal())),
    ("BN125", lambda: padded([20, 19])),
    ("BN125", lambda: padded([20, 5], of=2.0)[:2]),  # nobody gave the mask
    ("BN125", lambda: (two_norms(), normal(), {"mask": lambda batch: torch.ones(16, 5) > 0})),
    *((code, knowing) for code in ("BN125", "BN103", "BN126")),
    ("BN126", lambda: deployed_at(0.0)),
    ("BN126", lambda: deployed_at(0.3)),
    ("BN126", lambda: (stale(0.1), normal(), {"deploy": normal()})),  # BN103 says so
    ("BN128", lambda: constant(0)),
    ("BN128", lambda: constant(8)),
    ("BN128", lambda: (two_norms(), normal())),
    ("BN129", lambda: (Causal(nn.BatchNorm1d(4).eval()), sequences())),
    ("BN129", lambda: (nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), BatchNorm1d(4)), sequences())),
    ("BN129", lambda: (nn.Sequential(nn.Conv1d(4, 4, 1), BatchNorm1d(4)), sequences())),
    ("BN129", lambda: (OverChannels(), sequences())),
    ("BN130", lambda: with_loss(60, shortcut=True)),
    ("BN130", lambda: with_loss(4)),
    ("BN130", lambda: with_loss(60)[:2]),  # without a loss there are no gradients
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
    model, batches, *options = made
    report = audit(model, batches, **(options[0] if options else {}))
    assert report.disabled == {}
    return [finding.code for finding in report.findings]


@pytest.mark.parametrize(("code", "make"), FOUND)
def test_it_is_found(seeded, code, make):
    assert codes(make()).count(code) >= 1


@pytest.mark.parametrize(("code", "make"), SILENT)
def test_it_is_silent(seeded, code, make):
    assert codes(make()).count(code) == 0


# What they say


def test_with_labels_the_loss_in_both_modes_stands_beside_the_distance(seeded):
    model = nn.Sequential(stale(0.001), nn.Linear(8, 3))
    batches = [(b + 5, torch.randint(3, (16,))) for b in normal()]
    (finding,) = [f for f in audit(model, batches, loss=label_loss).findings if f.code == "BN103"]
    lost = {}
    for mode in (True, False):
        one = copy.deepcopy(model).train(mode)
        with torch.no_grad():
            lost[mode] = np.mean([F.cross_entropy(one(x), y).item() for x, y in batches])
    assert finding.numbers["training_loss"] == pytest.approx(lost[True], rel=1e-5)
    assert finding.numbers["inference_loss"] == pytest.approx(lost[False], rel=1e-5)
    assert (
        f"the loss is {lost[True]:.3g} in training mode, {lost[False]:.3g} in eval"
        in finding.message
    )


@pytest.mark.parametrize(
    ("output", "batch", "want"),
    [
        (torch.zeros(2, 4), (None, torch.tensor([1, 2])), np.log(4)),
        (torch.zeros(2, 4), {"x": None, "label": torch.tensor([1, 2])}, np.log(4)),
        ({"logits": torch.zeros(2, 4)}, [None, torch.tensor([0, 0])], np.log(4)),
        (torch.zeros(2), (None, torch.tensor([3.0, 4.0])), 12.5),
    ],
)
def test_a_loss_for_labels(output, batch, want):
    assert float(label_loss(output, batch)) == pytest.approx(want)


@pytest.mark.parametrize("batch", [torch.zeros(2), (torch.zeros(2),), {"x": torch.zeros(2)}])
def test_a_batch_without_labels_is_refused(batch):
    with pytest.raises(ValueError, match="a batch with labels is"):
        label_loss(torch.zeros(2, 4), batch)


def test_what_needs_batches_is_refused_without(seeded):
    with pytest.raises(ValueError, match="need batches"):
        audit(Net(), loss=label_loss)
    with pytest.raises(ValueError, match="deployment"):
        audit(Net(), images(), deploy=[])


def test_with_everything_the_model_is_left_as_it_was(seeded):
    model, batches, options = with_loss(4)
    options |= {"deploy": normal(), "mask": lambda batch: torch.ones(16, 1) > 0}
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    audit(model, batches, **options)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_gradients_are_those_of_the_loss_by_each_output(seeded):
    model, batches, options = with_loss(3)
    profiles = audit(model, batches, **options).profiles
    model(batches[0][0])
    kept = []
    for norm in model.norms:
        norm.register_forward_hook(lambda m, i, output: kept.append(output) or output.retain_grad())
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    norms = [profile.gradients[0].norm for profile in profiles]
    assert norms == pytest.approx([float(output.grad.norm()) for output in kept], rel=1e-4)


def test_the_padding_s_share_is_told(seeded):
    layer, batches, options = padded([20, 5])
    (finding,) = [f for f in audit(layer, batches, **options).findings if f.code == "BN125"]
    assert finding.message.startswith("38% of the values are padding")  # 15 of 40
    # 3/8 of the values are 0 where the data's mean is 2 and its standard deviation 1: the mean
    # of all is 1.25, the variance 5/8·(1 + 0.75²) + 3/8·1.25² = 1.5625
    assert finding.numbers["shift"] == pytest.approx(0.75 / 1.25, rel=0.05)
    assert finding.numbers["stretch"] == pytest.approx(np.log(1.25), rel=0.05)


# Beside a reference


def borrowed(weight=1.0):
    """Weights of one model, statistics of another."""
    one = trained(two_norms(), normal())
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight += weight
    return one, other


def own_statistics():
    one, other = borrowed()
    return one, trained(other, normal())


def eps_of(value, norm=nn.BatchNorm1d):
    return nn.Sequential(norm(8, eps=value)), nn.Sequential(nn.BatchNorm1d(8, eps=1e-5))


BESIDE = [
    ("BN105", 1, borrowed),
    ("BN105", 1, lambda: borrowed(-1e-3)),
    ("BN105", 1, lambda: borrowed(100.0)[::-1]),
    ("BN105", 0, lambda: borrowed(0.0)),
    ("BN105", 0, own_statistics),
    ("BN105", 0, lambda: (two_norms(), two_norms())),  # both are new
    ("BN118", 1, lambda: eps_of(1e-3)),
    ("BN118", 1, lambda: eps_of(1e-6, BatchNorm1d)),
    ("BN118", 1, lambda: eps_of(2e-5)),
    ("BN118", 0, lambda: eps_of(1e-5)),
    ("BN118", 0, lambda: eps_of(float(np.float32(1e-5)))),
    ("BN118", 0, lambda: (eps_of(1e-3)[0], nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)))),
]


@pytest.mark.parametrize(("code", "count", "make"), BESIDE)
def test_it_is_compared_with_a_reference(seeded, code, count, make):
    model, reference = make()
    report = audit(model, reference=reference)
    assert [finding.code for finding in report.findings].count(code) == count
    assert report.disabled == {}
    state = check([state_of(model, "it")], reference=state_of(reference, "the other"))
    assert [finding.code for finding in state.findings].count(code) == count


def test_a_swapped_momentum_is_a_guess_for_those_who_ask(seeded):
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=0.99))
    assert audit(model).findings == ()
    (finding,) = audit(model, selection=Selection(select=("BN117",))).findings
    assert finding.is_guess
    assert finding.fix.startswith("momentum=0.01")
    assert audit(model, selection=Selection(select=("BN11",))).findings == ()
    fine = nn.Sequential(nn.BatchNorm1d(8, momentum=0.3))
    assert audit(fine, selection=Selection(select=("BN117",))).findings == ()


def test_a_loader_s_own_random_numbers_are_put_back(seeded):
    data = torch.utils.data.TensorDataset(torch.randn(64, 8))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model, random = two_norms(), torch.get_rng_state()
    audit(model, loader)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_gradient_is_by_the_output_as_it_left_the_layer(seeded):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(8)

        def forward(self, x):
            return self.norm(x).mul_(100.0)

    def loss(output, batch):
        return output.sum()

    (profile,) = audit(InPlace(), normal(k=3), loss=loss).profiles
    assert [g.norm for g in profile.gradients] == pytest.approx([100 * (16 * 8) ** 0.5] * 3)


def test_batches_of_two_kinds_are_sorted_and_not_stale(seeded):
    """Their average is what the running statistics are; the kinds are what differs."""
    batches = [b + 4 * (i % 2) for i, b in enumerate(normal())]
    found = codes((trained(nn.Sequential(nn.BatchNorm1d(8)), batches), batches))
    assert "BN124" in found
    assert "BN103" not in found
