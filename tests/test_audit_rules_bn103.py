from __future__ import annotations

import math
from dataclasses import asdict, astuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, Moments, Running
from batchnorm.audit import Finding, Probe, Severity
from batchnorm.audit.distance import Distance, distance
from batchnorm.audit.layer_history import EVERY, KEPT, look
from batchnorm.audit.noise import FEWEST
from batchnorm.audit.rules.bn103_stale_statistics import StaleStatistics

BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d], ids=["torch", "ours"])
ENOUGH = EVERY * KEPT + EVERY  # passes after which every batch kept is a late one


def batches(passes: int, n: int = 16, c: int = 4, mean=5.0, std=3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(passes, n, c, generator=generator) * std + mean)


def watch(layer: nn.Module, *parts) -> list[Finding]:
    """Train on lists of batches; between them call what is a function; then evaluate."""
    with Probe([StaleStatistics]) as probe:
        for part in parts:
            if callable(part):
                part()
            else:
                layer.train()
                for x in part:
                    layer(x)
        layer.eval()
        with torch.inference_mode():
            layer(parts[0][0])
    report = probe.report()
    assert (report.layers, report.disabled) == (1, {})
    assert report.calls > 1
    return list(report.findings)


def expected(mean, var, looked_at, momentum, eps) -> Distance:
    """The distance from its definition, on raw values (n, c) in float64 NumPy."""
    xs = [np.asarray(x, dtype=np.float64) for x in looked_at]
    mean, var = (np.asarray(a, dtype=np.float64) for a in (mean, var))
    everything = np.concatenate(xs)
    within = np.mean([x.var(0, ddof=1) for x in xs], axis=0)  # what a running variance averages
    sigma = np.sqrt(np.maximum(within, var) + eps)
    shift = (mean - everything.mean(0)) / sigma
    stretch = np.log(np.sqrt((var + eps) / (within + eps)))
    share = 1 / len(xs) + (momentum or 0) / (2 - (momentum or 0))
    means = np.stack([x.mean(0) / sigma for x in xs])
    logs = np.stack([np.log(np.sqrt(x.var(0) + eps)) for x in xs])
    return Distance(
        math.sqrt((shift**2).mean()),
        math.sqrt(means.var(0, ddof=1).mean() * share),
        math.sqrt((stretch**2).mean()),
        math.sqrt(logs.var(0, ddof=1).mean() * share),
    )


def looked_at(seen: list[torch.Tensor]) -> list[torch.Tensor]:
    """The batches that the rule keeps of all that were trained on."""
    return [seen[number - 1] for number in looks(len(seen))][-KEPT:]


def looks(passes: int) -> list[int]:
    return [number for number in map(look, range(passes)) if number <= passes]


# The distance


@pytest.mark.parametrize(
    ("momentum", "share"), [(0.1, 0.5 + 0.1 / 1.9), (1.0, 1.5), (0.0, 0.5), (None, 0.5)]
)
def test_the_distance_of_one_channel_by_hand(momentum, share):
    # (1, 3) and (3, 5): pooled mean 3, each unbiased variance 2; means 2 and 4; the
    # running variance, 8, is the larger, so distances are in units of √8
    two = [Moments.of(torch.tensor([[a], [b]]).double(), 0) for a, b in ((1, 3), (3, 5))]
    mean, var = torch.tensor([5.0]).double(), torch.tensor([8.0]).double()
    d = distance(mean, var, two, momentum, 0.0)
    assert d.shift == pytest.approx(2 / math.sqrt(8))
    assert d.stretch == pytest.approx(math.log(2))
    # 2/√8 and 4/√8 have the variance 1/4; the logarithms are both 0
    assert d.shift_error == pytest.approx(math.sqrt(share) / 2)
    assert d.stretch_error == 0


def test_the_distance_has_no_sign_and_is_a_root_mean_square_over_channels():
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double()
    ones = torch.ones(2).double()
    d = distance(3 * torch.tensor([1.0, -1.0]).double(), ones / 4, [Moments.of(x, 0)] * 2, 0.1, 0.0)
    assert astuple(d) == pytest.approx((3 / math.sqrt(2), 0, math.log(8) / 2, 0))
    d = distance(torch.tensor([3.0, 4.0]).double(), ones, [Moments.of(x, 0)] * 2, 0.1, 0.0)
    assert astuple(d) == pytest.approx((2.5, 0, math.log(2) / 2, 0))


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_the_distance_agrees_with_numpy_on_raw_values(momentum):
    generator = torch.Generator().manual_seed(1)
    scale, offset = torch.tensor([[0.1, 1.0, 30.0], [5.0, -3.0, 0.0]]).double()
    many = [
        torch.randn(n, 3, generator=generator, dtype=torch.float64) * scale + offset
        for n in (2, 7, 4, 16, 3)
    ]
    mean, var = torch.tensor([5.1, -2.0, 9.0]).double(), torch.tensor([0.02, 4.0, 300.0]).double()
    d = distance(mean, var, [Moments.of(x, 0) for x in many], momentum, 1e-3)
    assert astuple(d) == pytest.approx(astuple(expected(mean, var, many, momentum, 1e-3)), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "harmful"),
    [
        ((0.51, 0.0, 0.0, 0.0), True),
        ((0.49, 0.0, 0.0, 0.0), False),
        ((0.9, 0.19, 0.0, 0.0), True),
        ((0.9, 0.21, 0.0, 0.0), False),
        ((0.0, 0.0, 0.41, 0.0), True),
        ((0.0, 0.0, 0.40, 0.0), False),
        ((0.0, 0.0, 0.8, 0.19), True),
        ((0.0, 0.0, 0.8, 0.2), False),
        ((math.nan, 0.0, math.nan, 0.0), True),
    ],
)
def test_a_distance_harms_where_it_is_large_beyond_twice_its_error(values, harmful):
    assert Distance(*values).is_harmful is harmful


# Positives


@BOTH
@pytest.mark.parametrize("passes", [40, 61])
def test_a_momentum_too_small_for_a_short_run_is_found_with_its_numbers(norm, passes):
    layer, seen = norm(4, momentum=0.001), batches(passes)
    (finding,) = watch(layer, seen)
    assert (finding.code, finding.severity) == ("BN103", Severity.WARNING)
    assert finding.modules == (norm.__name__,)
    d = expected(layer.running_mean, layer.running_var, looked_at(seen), 0.001, layer.eps)
    assert finding.numbers == pytest.approx(asdict(d), rel=1e-3)
    # 5·0.999^passes of the mean are missing, in units of 3
    assert finding.numbers["shift"] == pytest.approx(5 * 0.999**passes / 3, rel=0.1)
    assert f"off by {d.shift:.2g} ± {d.shift_error:.1g} standard deviations" in finding.message
    assert f"deviation by ×{math.exp(d.stretch):.2g} " in finding.message


@BOTH
def test_a_momentum_of_zero_is_found(norm):
    layer, seen = norm(4, momentum=0.0), batches(ENOUGH)
    (finding,) = watch(layer, seen)
    d = expected(np.zeros(4), np.ones(4), looked_at(seen), 0.0, layer.eps)
    assert finding.numbers == pytest.approx(asdict(d), rel=1e-5)


@BOTH
def test_statistics_that_lag_behind_a_change_of_scale_are_found(norm):
    layer = norm(4, momentum=0.005)
    seen = [batches(64, mean=0, std=1), batches(EVERY * KEPT, mean=0, std=10, seed=1)]
    (finding,) = watch(layer, *seen)
    late = looked_at(seen[0] + seen[1])
    d = expected(layer.running_mean, layer.running_var, late, 0.005, layer.eps)
    assert finding.numbers == pytest.approx(asdict(d), rel=1e-3)
    assert finding.numbers["shift"] < 0.5 < math.log(1.5) + 0.1 < finding.numbers["stretch"]


@BOTH
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_reset_before_evaluation_are_found(norm, momentum):
    layer, seen = norm(4, momentum=momentum), batches(ENOUGH)
    (finding,) = watch(layer, seen, layer.reset_running_stats)
    d = expected(np.zeros(4), np.ones(4), looked_at(seen), momentum, layer.eps)
    assert finding.numbers == pytest.approx(asdict(d), rel=1e-3)


@BOTH
def test_a_run_that_never_evaluates_is_judged_at_its_end(norm):
    layer = norm(4, momentum=0.001)
    with Probe([StaleStatistics]) as probe:
        for x in batches(ENOUGH):
            layer(x)
        (finding,) = probe.report().findings
        layer.momentum = 1.0
        layer(batches(1)[0])  # one step catches up
        assert probe.report().findings == ()
    assert finding.numbers["shift"] > 1


@BOTH
def test_what_counts_is_the_state_at_the_last_evaluation_not_what_becomes_of_it_later(norm):
    layer, seen = norm(4, momentum=0.001), batches(ENOUGH)
    with Probe([StaleStatistics]) as probe:
        for x in seen:
            layer(x)
        layer.eval()(seen[0])
        update_bn(seen, layer)
        assert len(probe.report().findings) == 1
        layer.train()(seen[0])
        layer.eval()(seen[0])  # now with good ones
        layer.reset_running_stats()
        assert probe.report().findings == ()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, momentum=0.002),
        BatchNorm2d(4, momentum=0.002),
        BatchNorm2d(4, momentum=0.002, statistics=Ghost(3)),
        BatchNorm2d(4, momentum=0.002, act="relu"),
    ],
    ids=["torch", "ours", "ghost", "act"],
)
def test_images_are_measured_over_batch_and_positions(layer, layout):
    layer.reset_running_stats()
    flat = batches(ENOUGH, n=8 * 6)
    images = [x.view(8, 3, 2, 4).permute(0, 3, 1, 2) for x in flat]
    (finding,) = watch(layer, [x.contiguous(memory_format=layout) for x in images])
    d = expected(layer.running_mean, layer.running_var, looked_at(flat), 0.002, layer.eps)
    assert finding.numbers == pytest.approx(asdict(d), rel=2e-3)


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("after", [nn.Identity(), nn.Linear(4, 4)], ids=["last", "inside"])
def test_a_checkpointed_layer_is_measured_as_any_other(norm, use_reentrant, after):
    layer = norm(4, momentum=0.001)
    model, seen = nn.Sequential(layer, after), batches(2 * ENOUGH, n=64)
    with Probe([StaleStatistics]) as probe:
        for x in seen:
            y = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
            y.sum().backward()
    (finding,) = probe.report().findings
    # torch's layers count a batch twice, so the rule may have seen other batches than these
    seen = [x.detach() for x in seen]
    d = expected(layer.running_mean, layer.running_var, seen, 0.001, layer.eps)
    assert finding.numbers["shift"] == pytest.approx(d.shift, rel=0.05)
    assert finding.numbers["stretch"] == pytest.approx(d.stretch, rel=0.05)


@BOTH
def test_statistics_that_are_no_numbers_are_found(norm):
    layer, seen = norm(4), batches(ENOUGH)

    def poison():
        layer.running_mean[1] = math.nan

    (finding,) = watch(layer, seen, poison, seen)
    assert "the running statistics are not finite" in finding.message
    assert math.isnan(finding.numbers["shift"])


# Negatives


@BOTH
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_ordinary_training_is_not_reported(norm, momentum):
    seen = batches(80)
    assert watch(norm(4, momentum=momentum), seen[:40], norm(4).eval, seen[40:]) == []


@BOTH
def test_a_network_that_learns_is_not_reported(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), norm(16))
    model.append(nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    with Probe([StaleStatistics]) as probe:
        for x in batches(120, n=32, mean=0, std=1):
            loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()(batches(1, mean=0, std=1)[0])
    assert losses[-1] < losses[0] / 5
    assert probe.report().findings == ()


@pytest.mark.parametrize(
    "layer",
    [BatchNorm1d(4).freeze(), BatchNorm1d(4, statistics=Running()), nn.BatchNorm1d(4).eval()],
    ids=["frozen", "Running()", "torch in eval"],
)
def test_a_layer_that_trains_with_its_running_statistics_is_not_reported(layer):
    with Probe([StaleStatistics]) as probe:
        for x in batches(ENOUGH):
            layer(x)
        layer.eval()(batches(1)[0])
    report = probe.report()
    assert (report.calls, report.findings, report.disabled) == (ENOUGH + 1, (), {})


@BOTH
def test_fewer_batches_than_show_a_spread_are_not_judged(norm):
    enough = look(FEWEST - 1)
    assert watch(norm(4, momentum=0.001), batches(enough - 1)) == []
    assert len(watch(norm(4, momentum=0.001), batches(enough))) == 1


@BOTH
def test_a_transient_that_has_caught_up_by_the_last_evaluation_is_not_reported(norm):
    layer = norm(4, momentum=0.01)
    with Probe([StaleStatistics]) as probe:

        def evaluate():
            layer.eval()(batches(1)[0])
            layer.train()
            return len(probe.report().findings)

        for x in batches(ENOUGH):
            layer(x)
        assert evaluate() == 1  # the mean is still 0.99³⁶ · 5 off
        for x in batches(500, seed=1):
            layer(x)
        assert evaluate() == 0


@BOTH
def test_its_own_advice_helps(norm):
    layer, seen = norm(4, momentum=0.001), batches(ENOUGH)
    (finding,) = watch(layer, seen)
    assert "batchnorm.recalibrate(model, loader)" in finding.fix
    layer.reset_running_stats()
    assert watch(layer, seen, lambda: update_bn(seen, layer)) == []


@BOTH
def test_a_mean_far_larger_than_the_spread_is_not_reported(norm):
    assert watch(norm(4), batches(200, mean=3000, std=0.3)) == []


def test_a_layer_in_half_precision_is_not_reported():
    layer = BatchNorm1d(4).bfloat16()
    assert watch(layer, [x.bfloat16() for x in batches(80)]) == []


@BOTH
def test_channels_that_are_constant_are_not_reported(norm):
    # pixels that are always black or white: their output is β, in eval nearly so
    varies, constant = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    seen = [x * varies + constant for x in batches(60)]
    assert watch(norm(4), seen) == []


# False alarms


@pytest.mark.parametrize("between", [0.0, 0.5], ids=["alike", "batches that differ"])
def test_honest_runs_raise_next_to_no_false_alarms(between):
    """200 layers of small batches from one distribution, each its own."""
    generator = torch.Generator().manual_seed(0)
    runs, passes = 200, 40
    with Probe([StaleStatistics]) as probe:
        for run in range(runs):
            n, c = (4, 8, 16)[run % 3], (1, 4, 16)[run // 3 % 3]
            norm = nn.BatchNorm1d if run % 10 else BatchNorm1d
            layer = norm(c)
            offset = torch.randn(c, generator=generator)
            own = torch.randn(passes, 1, c, generator=generator) * between
            noise = torch.randn(passes, n, c, generator=generator)
            for x in noise + own + offset:
                layer(x)
            layer.eval()(noise[0])
    report = probe.report()
    assert (report.layers, report.calls, report.disabled) == (runs, runs * (passes + 1), {})
    assert len(report.findings) <= 2


@BOTH
def test_data_that_is_no_number_is_not_blamed_on_the_statistics(norm):
    seen = batches(ENOUGH)
    seen[looks(ENOUGH)[-1] - 1][0, 0] = math.nan  # a batch that is looked at
    layer = norm(4, momentum=0.0)  # torch's own kernel would take the NaN up with any other
    layer.running_mean.fill_(5)
    layer.running_var.fill_(9)
    with Probe([StaleStatistics]) as probe, torch.enable_grad():
        for x in seen:
            layer(x)
            layer.running_mean.fill_(5)
            layer.running_var.fill_(9)
    assert probe.report().findings == ()


@BOTH
def test_statistics_that_are_loaded_are_not_compared_with_batches_of_other_weights(norm):
    """The best checkpoint, loaded before the test: its statistics belong to its own weights."""
    layer = norm(4)
    early = {key: value.clone() for key, value in layer.state_dict().items()}
    early["running_mean"] += 100
    assert watch(layer, batches(ENOUGH), lambda: layer.load_state_dict(early)) == []


@BOTH
def test_two_kinds_of_batches_in_turn_are_both_looked_at(norm):
    """Real and generated images: the mixture's running mean is right for the mixture."""
    real, generated = batches(2 * ENOUGH, mean=0, std=1), batches(2 * ENOUGH, mean=1, std=1, seed=1)
    turns = [x for both in zip(real, generated, strict=True) for x in both]
    assert watch(norm(4, momentum=0.01), turns * 2) == []
