"""The rules that weigh a training run: for each, what it finds and what it must not."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, DomainBatchNorm, Ghost, Renorm
from batchnorm.audit import Finding, Period, Probe, Severity, watch
from batchnorm.audit.rules import bn111_two_forwards
from batchnorm.audit.rules.bn111_two_forwards import is_affected
from processes import run_ranks

STEPS = 60
FEW = 24  # where the rate is too small for a later step to differ


def net(norm=nn.BatchNorm1d, c=8, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, c), norm(c, **options), nn.ReLU(), nn.Linear(c, c), norm(c), nn.Linear(c, 2)
    )


def task(n=32, shift=0.0, scale=1.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6)
    return x * scale + shift, (x[:, 0] > 0).long()


def fit(
    model: nn.Module,
    steps: int = STEPS,
    batch: Callable[[int], tuple[Tensor, Tensor]] = lambda step: task(),
    micro: int = 1,
    after_step: Callable[[], None] = lambda: None,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
    lr: float = 0.05,
    **options,
) -> nn.Module:
    """Train as people do; `micro` batches for each step of the optimizer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, **options)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = batch(step)
            F.cross_entropy(call(model, x), y).backward()
        optimizer.step()
        after_step()
    return model


def frozen_backbone() -> None:
    model = net()
    model[:3].requires_grad_(False)
    fit(model)


def frozen_for_a_while() -> None:
    """A discriminator as GANs train it: frozen while the generator learns."""
    generator, discriminator = net(), net()
    discriminator[0] = nn.Linear(2, 8)
    learn = torch.optim.Adam(generator.parameters())
    tell = torch.optim.Adam(discriminator.parameters())
    for _ in range(STEPS):
        discriminator.requires_grad_(True)
        fake = generator(torch.randn(16, 6))
        tell.zero_grad()
        answers = discriminator(torch.cat([torch.randn(16, 2), fake.detach()]))
        F.cross_entropy(answers, torch.arange(32) // 16).backward()
        tell.step()
        discriminator.requires_grad_(False)
        learn.zero_grad()
        F.cross_entropy(discriminator(fake), torch.zeros(16).long()).backward()
        learn.step()


def averaged(decay=0.999, data=6.0, **options) -> AveragedModel:
    """An average of weights whose statistics stay as they were when it was made."""
    model = net()
    average = AveragedModel(model, **options)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return task(shift=data)

    fit(model, batch=batch, after_step=lambda: average.update_parameters(model))
    return average


def nearly_the_last(average: Tensor, latest: Tensor, n: Tensor) -> Tensor:
    return 0.5 * average + 0.5 * latest


def evaluated(average: nn.Module, data=6.0, passes=30) -> None:
    average.eval()
    with torch.no_grad():
        for _ in range(passes):
            average(task(shift=data)[0])


def refreshed_average() -> None:
    average = averaged()
    update_bn([task(shift=6.0)[0] for _ in range(20)], average)
    evaluated(average)


def checkpointed(norm, use_reentrant=False, part=slice(0, 3), **options) -> None:
    model = net(norm, **options)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        y = checkpoint(model[part], x.requires_grad_(), use_reentrant=use_reentrant)
        return model[part.stop :](y)

    fit(model, call=call)


def real_and_fake(discriminator: nn.Module, gap: float, domains: bool = False) -> None:
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.01)
    ones, zeros = torch.ones(32).long(), torch.zeros(32).long()
    for _ in range(STEPS):
        optimizer.zero_grad()
        real, fake = torch.randn(32, 6), torch.randn(32, 6) + gap
        loss = F.cross_entropy(discriminator(real), ones)
        loss = loss + F.cross_entropy(discriminator(fake), zeros)
        loss.backward()
        optimizer.step()


def real_and_fake_with_a_generator() -> None:
    """As the tutorials have it: the discriminator's gradients from its last pass are dropped."""
    generator, discriminator = nn.Linear(4, 6), net()
    learn = torch.optim.SGD(generator.parameters(), lr=0.01)
    tell = torch.optim.SGD(discriminator.parameters(), lr=0.01)
    for step in range(STEPS):
        fake = generator(torch.randn(16, 4))
        tell.zero_grad(set_to_none=step % 2 == 0)
        (discriminator(torch.randn(16, 6)).mean() - discriminator(fake.detach()).mean()).backward()
        tell.step()
        learn.zero_grad()
        discriminator(fake).mean().backward()
        learn.step()


def on_one_line(gap: float) -> None:
    """Real and generated batches, from one line; the generated ones drift."""
    discriminator = net()
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.01)
    for step in range(STEPS):
        real, fake = torch.randn(32, 6), torch.randn(32, 6) + gap * (1 + step / STEPS)
        optimizer.zero_grad()
        (discriminator(real).mean() - discriminator(fake).mean()).backward()
        optimizer.step()


def two_phases(norm=nn.BatchNorm1d) -> None:
    """The same data trained on from two lines, one after the other, at two learning rates."""
    model = net(norm)
    fit(model, lr=0.01, call=lambda model, x: model(x))
    fit(model, lr=0.3, call=lambda model, x: model(x))


def short_last_batch() -> None:
    """258 samples in batches of 64: every fifth batch has two."""
    fit(net(), batch=lambda step: task(n=64 if step % 5 < 4 else 2), steps=100)


def five_calls() -> None:
    """A critic that learns four times of five, and is frozen in the fifth."""
    critic = net()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)
    for step in range(100):
        critic.requires_grad_(step % 5 < 4)
        x = torch.randn(16, 6, requires_grad=True)
        critic(x).mean().backward()
        optimizer.step()


def compiled_part() -> None:
    """A block that is compiled by itself, whose layers no hook sees."""
    model = nn.Sequential(net(), nn.BatchNorm1d(2))
    model[0].compile(backend="eager")
    spared["model"] = model
    with warnings.catch_warnings():
        # dynamo looks at .grad of what it is given, and hides its warning but from "error"
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        fit(model, steps=8)
    torch._dynamo.reset()


def siamese(gap: float) -> None:
    """One layer, two calls in a pass of one model."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            one = self.body(x[:, 0])
            other = self.body(x[:, 1])
            return one + other

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 2, 6)
        x[:, 1] += gap
        return x, (x[:, 0, 0] > 0).long()

    fit(Siamese(), batch=batch)


def by_class(step: int) -> tuple[Tensor, Tensor]:
    """Four classes, each with its own mean, in long stretches of one."""
    labels = torch.full((32,), step * 4 // STEPS)
    return torch.randn(32, 6) + 2 * labels[:, None], labels % 2


def by_source(step: int) -> tuple[Tensor, Tensor]:
    """Images from two scanners, a batch from one of them."""
    x = torch.randn(16, 1, 8, 8) + (step // 5 % 2)
    return x, (x.mean((1, 2, 3)) > 0.5).long()


def shuffled(step: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(4, (32,))
    return torch.randn(32, 6) + 2 * labels[:, None], labels % 2


def images(n=8, size=6) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 1, size, size)
        return x, (x.mean((1, 2, 3)) > 0).long()

    return batch


def convolutional(norm=nn.BatchNorm2d, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm(4, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).append(nn.Linear(4, 2))


def deep(layers: int, shortcut: bool) -> nn.Module:
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList([nn.Linear(6, 6) for _ in range(layers)])
            self.norms = nn.ModuleList([nn.BatchNorm1d(6) for _ in range(layers)])
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            for linear, norm in zip(self.linears, self.norms, strict=True):
                y = norm(linear(x)).relu()
                x = x + 0.1 * y if shortcut else y
            return self.head(x)

    return Deep()


class Spare(nn.Module):
    def __init__(self, spare: nn.Module):
        super().__init__()
        self.body, self.spare = net(), spare

    def forward(self, x):
        return self.body(x)


def dead_inputs(step: int) -> tuple[Tensor, Tensor]:
    x, y = task()
    x[:, 3:] = 0.5  # sensors that always say the same
    return x, y


def straight(step: int) -> tuple[Tensor, Tensor]:
    return task()


def first_norm(c=6) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(c), nn.Linear(c, 2))


W, I = Severity.WARNING, Severity.INFO  # noqa: E741 - the words they begin with

FOUND = [
    ("BN102", W, frozen_backbone),
    ("BN102", W, lambda: fit(nn.Sequential(net().requires_grad_(False), nn.Linear(2, 2)))),
    ("BN102", W, lambda: fit(nn.Sequential(BatchNorm1d(6).requires_grad_(False), nn.Linear(6, 2)))),
    ("BN105", W, lambda: evaluated(averaged())),
    ("BN105", W, lambda: evaluated(averaged(avg_fn=lambda a, p, n: 0.99 * a + 0.01 * p))),
    ("BN105", W, lambda: evaluated(averaged(data=-4.0), data=-4.0)),
    ("BN105", W, lambda: evaluated(averaged(), passes=5)),  # a small test set
    ("BN107", W, lambda: checkpointed(nn.BatchNorm1d)),
    ("BN107", W, lambda: checkpointed(nn.BatchNorm1d, part=slice(0, 5))),
    ("BN107", W, lambda: checkpointed(nn.BatchNorm1d, momentum=None)),
    ("BN107", W, lambda: checkpointed(nn.BatchNorm1d, part=slice(0, 2))),  # it ends in the norm
    ("BN110", W, lambda: fit(net(), batch=lambda step: task(n=2))),
    ("BN110", W, lambda: fit(net(BatchNorm1d), batch=lambda step: task(n=3))),
    ("BN110", W, lambda: fit(convolutional(), batch=images(n=2, size=3))),
    ("BN122", I, lambda: fit(net(), micro=2)),
    ("BN122", I, lambda: fit(net(BatchNorm1d), micro=4)),
    ("BN122", I, lambda: fit(convolutional(), batch=images(), micro=3)),
    ("BN123", W, lambda: real_and_fake(net(), gap=4.0)),
    ("BN123", W, lambda: real_and_fake(net(BatchNorm1d), gap=-3.0)),
    ("BN123", W, lambda: siamese(gap=3.0)),
    ("BN123", W, lambda: on_one_line(gap=4.0)),
    ("BN124", W, lambda: fit(net(), batch=by_class)),
    ("BN124", W, lambda: fit(convolutional(), batch=by_source)),
    ("BN124", W, lambda: fit(net(), batch=lambda step: task(shift=step % 7 / 2))),
    ("BN127", I, lambda: fit(net(), weight_decay=1e-2)),
    ("BN127", I, lambda: fit(net(BatchNorm1d), weight_decay=5e-4)),
    ("BN127", I, lambda: fit(convolutional(), batch=images(), weight_decay=1e-4)),
    ("BN128", I, lambda: fit(first_norm(), batch=dead_inputs)),
    ("BN128", I, lambda: fit(nn.Sequential(BatchNorm1d(6), nn.Linear(6, 2)), batch=dead_inputs)),
    ("BN128", I, lambda: fit(nn.Sequential(first_norm(), first_norm(2)), batch=dead_inputs)),
    ("BN130", W, lambda: fit(deep(60, shortcut=False), FEW, lr=1e-9)),
    (
        "BN130",
        W,
        lambda: fit(deep(80, shortcut=False), FEW, batch=lambda step: task(n=64), lr=1e-9),
    ),
    ("BN130", W, lambda: fit(deep(100, shortcut=False), FEW, lr=1e-12)),
    ("BN131", I, lambda: fit(spared.setdefault("model", Spare(nn.BatchNorm1d(3))))),
    ("BN131", I, lambda: fit(spared.setdefault("model", Spare(net())))),
    ("BN131", I, lambda: fit(spared.setdefault("model", Spare(BatchNorm2d(3))))),
]
SILENT = [
    ("BN102", lambda: fit(net())),
    ("BN102", frozen_for_a_while),
    ("BN102", five_calls),
    ("BN103", short_last_batch),
    ("BN110", short_last_batch),
    ("BN123", two_phases),
    ("BN123", lambda: two_phases(BatchNorm1d)),
    ("BN102", lambda: fit(nn.Sequential(BatchNorm1d(6).requires_grad_(False).freeze(), net()))),
    ("BN102", lambda: fit(net(affine=False))),
    ("BN105", refreshed_average),
    ("BN105", lambda: evaluated(averaged(use_buffers=True, avg_fn=nearly_the_last))),
    ("BN105", lambda: evaluated(averaged(avg_fn=nearly_the_last))),
    ("BN107", lambda: checkpointed(BatchNorm1d)),
    ("BN107", lambda: checkpointed(BatchNorm1d, use_reentrant=True)),
    ("BN107", lambda: fit(net())),
    ("BN110", lambda: fit(net())),
    ("BN110", lambda: fit(net(), batch=lambda step: task(n=16))),
    ("BN110", lambda: fit(convolutional(), batch=images(n=4, size=8))),
    ("BN122", lambda: fit(net())),
    ("BN122", lambda: siamese(gap=0.0)),
    ("BN122", frozen_for_a_while),
    ("BN122", lambda: real_and_fake_with_a_generator()),
    ("BN123", lambda: real_and_fake(net(), gap=0.0)),
    ("BN123", lambda: siamese(gap=0.0)),
    ("BN124", lambda: fit(net())),
    ("BN124", lambda: on_one_line(gap=4.0)),
    ("BN124", real_and_fake_with_a_generator),
    ("BN124", lambda: fit(net(), batch=shuffled)),
    ("BN124", lambda: fit(convolutional(), batch=images())),
    ("BN127", lambda: fit(net())),
    ("BN127", lambda: fit(net(affine=False), weight_decay=0.0)),
    ("BN127", lambda: fit(net(), weight_decay=0.0)),
    ("BN128", lambda: fit(net())),
    ("BN128", lambda: fit(convolutional(), batch=images())),
    ("BN128", lambda: fit(first_norm())),
    ("BN130", lambda: fit(net())),
    ("BN130", lambda: fit(deep(60, shortcut=True), FEW, lr=1e-9)),
    ("BN130", lambda: fit(deep(5, shortcut=False))),
    ("BN131", compiled_part),
    ("BN131", lambda: fit(spared.setdefault("model", net()))),
    ("BN131", lambda: fit(Spare(nn.BatchNorm1d(3)))),  # gone by the end: nothing is known of it
]
spared: dict[str, nn.Module] = {}
"""Models that live on after the run, as a script's do."""


def found(code: str, run: Callable[[], object]) -> list[Finding]:
    spared.clear()
    with Probe() as probe:
        run()
    report = probe.report()
    assert report.disabled == {}
    return [finding for finding in report.findings if finding.code == code]


@pytest.mark.parametrize(("code", "severity", "run"), FOUND)
def test_it_is_found_and_called_as_bad_as_it_is(code, severity, run):
    findings = found(code, run)
    assert findings
    for finding in findings:
        assert finding.severity is severity
        assert finding.modules
        assert all(math.isfinite(number) for number in finding.numbers.values())
        for text in (finding.message, finding.fix):
            assert text
            assert "\n" not in text


@pytest.mark.parametrize(("code", "run"), SILENT)
def test_it_is_silent_where_nothing_is_wrong(code, run):
    assert found(code, run) == []


# Distributed


# forwards before a backward, broadcast, affected; found where all three are there
CASES = [(2, True, True), (3, True, True), (4, True, True)]
CASES += [(1, True, True), (2, False, True), (2, True, False)]


def calls_many_times(rank: int, world: int) -> None:
    for (forwards, broadcast, affected), norm in itertools.product(
        CASES, [nn.BatchNorm1d, BatchNorm1d]
    ):
        torch.manual_seed(0)
        model = DistributedDataParallel(net(norm), broadcast_buffers=broadcast)
        with Probe() as probe, pytest.MonkeyPatch.context() as patch:
            # what PyTorch does to a version counter differs between its releases
            patch.setattr(bn111_two_forwards, "is_affected", lambda affected=affected: affected)
            for _ in range(3):
                sum(model(task()[0]).sum() for _ in range(forwards)).backward()
            for _ in range(3):
                model.eval()(task()[0])  # validation, with gradients that nobody asks for
            report = probe.report()
        assert report.disabled == {}
        found = [finding for finding in report.findings if finding.code == "BN111"]
        assert len(found) == (affected and broadcast and forwards > 1), found
        for finding in found:
            lines, first = inspect.getsourcelines(calls_many_times)
            line = first + next(i for i, text in enumerate(lines) if "sum(model(task" in text)
            assert finding.place is not None
            assert finding.place.endswith(f"test_audit_rules_run.py:{line}")
            assert finding.numbers == {"forwards": float(forwards)}
    is_affected_where_it_breaks()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.scale


def is_affected_where_it_breaks() -> None:
    """A broadcast that raises the version of a buffer that was saved is what breaks."""
    model = DistributedDataParallel(Scaled())
    z = model(torch.randn(2, 3)) + model(torch.randn(2, 3))
    broken = False
    try:
        z.sum().backward()
    except RuntimeError as error:
        broken = "modified by an inplace operation" in str(error)
    assert is_affected() is broken


def test_two_distributed_forwards_before_a_backward():
    run_ranks(2, calls_many_times)


# Compiled


@pytest.mark.as_installed
def test_a_compiled_model_is_seen_by_what_moves_its_statistics():
    torch._dynamo.reset()
    model = net(momentum=0.001)
    compiled = torch.compile(model, backend="eager")
    try:
        with Probe() as probe:
            fit(compiled, batch=lambda step: task(shift=5.0))
            compiled.eval()(task()[0])
        report = probe.report()
    finally:
        torch._dynamo.reset()
    assert report.disabled == {}
    stale = [finding for finding in report.findings if finding.code == "BN103"]
    assert [finding.modules for finding in stale] == [("Sequential.1",)]
    assert report.timeline[0] == Period("Sequential", "train", STEPS)


# What they say


def test_noise_is_that_of_the_values(seeded):
    layer = nn.BatchNorm1d(64)
    with Probe() as probe:
        for _ in range(100):
            layer(torch.randn(6, 64))
    (profile,) = probe.report().profiles
    assert profile.noise is not None
    # for n = 6 values mean and log-deviation are not yet normal; √(1.5/6) = 0.5 is 0.53
    means, logs = (torch.randn(20000, 6).T[None] for _ in range(2))
    exact = math.hypot(float(means.mean(1).std()), float(logs.std(1, correction=0).log().std()))
    assert profile.noise.value == pytest.approx(exact, rel=0.1)


def test_gradient_norms_are_those_of_the_outputs():
    model = net()
    with Probe() as probe:
        x, y = task()
        kept = {}
        for number in (1, 4):
            model[number].register_forward_hook(
                lambda module, given, output, number=number: kept.update({number: output})
            )
        z = model(x)
        for output in kept.values():
            output.retain_grad()
        F.cross_entropy(z, y).backward()
    profiles = probe.report().profiles
    for number, profile in zip((1, 4), profiles, strict=True):
        (norm,) = profile.gradients
        assert norm.step == 1
        assert norm.norm == pytest.approx(float(kept[number].grad.norm()), rel=1e-5)


def test_updates_are_counted_as_they_came():
    model = net()
    with Probe() as probe:
        fit(model, steps=5, micro=3)
        (finding,) = [f for f in probe.report().findings if f.code == "BN122"]
    assert finding.numbers == {"passes": 3.0, "steps": 5.0}
    assert "5 of 5 optimizer steps added up the gradients of 3 backward passes" in finding.message


def test_the_two_places_are_named():
    (finding, *_) = found("BN123", lambda: real_and_fake(net(), gap=4.0))
    line = real_and_fake.__code__.co_firstlineno
    for of_call in (line + 6, line + 7):
        assert f"test_audit_rules_run.py:{of_call} " in finding.message


def test_its_own_advice_helps_against_two_distributions():
    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = DomainBatchNorm(BatchNorm1d(6), ["a", "b"]), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.norm(x, domain="b" if x.mean() > 2 else "a"))

    assert found("BN123", lambda: real_and_fake(Discriminator(), gap=4.0)) == []


@pytest.mark.parametrize("statistics", [Ghost(4), Renorm()])
def test_small_slices_that_were_chosen_are_no_noise(statistics):
    model = net(BatchNorm1d, statistics=statistics)
    assert found("BN110", lambda: fit(model)) == []


# The timeline


def test_the_timeline_is_what_the_run_did():
    model = net()
    with watch(model) as probe:
        fit(model, steps=7)
        with torch.no_grad():
            model(task()[0])
        model.eval()(task()[0])
        model(task()[0])
        fit(model.train(), steps=2)
    periods = [(p.model, p.mode, p.passes) for p in probe.report().timeline]
    assert periods == [
        ("Sequential", "train", 7),
        ("Sequential", "train without gradients", 1),
        ("Sequential", "eval", 2),
        ("Sequential", "train", 2),
    ]


def test_a_timeline_of_very_many_periods_keeps_its_ends():
    model = net()
    with watch(model) as probe:
        for turn in range(500):
            model.train(turn % 2 == 0)(task(n=4)[0])
    timeline = probe.report().timeline
    assert len(timeline) <= 202
    assert sum(period.passes for period in timeline) == 500
    assert [p.mode for p in timeline[:2]] == ["train", "eval"]
    assert timeline[-1].mode == "eval"


# watch


def test_watch_sees_one_model_alone_and_leaves_it_as_it_would_have_been():
    one, other = net(), net()
    twin = copy.deepcopy(one)
    torch.manual_seed(3)
    with watch(one) as probe:
        fit(one)
        fit(other)
    torch.manual_seed(3)
    fit(twin)
    report = probe.report()
    assert (report.layers, report.calls) == (2, 2 * STEPS)
    assert [p.path for p in report.profiles] == ["Sequential.1", "Sequential.4"]
    for key, value in twin.state_dict().items():
        assert torch.equal(one.state_dict()[key], value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
