import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.audit.rules.bn110_noisy_statistics import LARGEST
from batchnorm.planning import LOOPBACK, Network, PlannedLayer, plan, plan_layers

MINE = Network("my network", "gloo", collective=100e-6, message=10e-6, byte=1e-9)
TWO = [PlannedLayer("stem", 64), PlannedLayer("head", 128, calls=2)]


def by_hand(k, collective, message, byte):
    """Seconds of a step of TWO: forward and backward of one call of 64 and two of 128 channels."""
    numbers = (2 * 64 + 1) + 2 * 64 + 2 * ((2 * 128 + 1) + 2 * 128)
    return 6 * (collective + (k - 1) * message) + (k - 1) * 8 * numbers * byte


def test_every_number_by_hand():
    answer = plan_layers(TWO, ranks=8, batch=2, network=MINE)
    assert [c.group for c in answer.choices] == [1, 2, 4, 8]
    assert [c.samples for c in answer.choices] == [2, 4, 8, 16]
    for choice in answer.choices:
        assert choice.noise == pytest.approx(math.sqrt(1.5 / choice.samples))
        k = choice.group
        assert choice.seconds == pytest.approx(by_hand(k, 100e-6, 10e-6, 1e-9) if k > 1 else 0)
        assert choice.traffic.bytes == (k - 1) * 8 * 1283
        assert choice.noisy == (2 if choice.samples < 6 else 0)
    assert answer.best == answer.choices[2]
    assert answer.partial == (pytest.approx(answer.best.seconds), answer.best.traffic)


def test_on_nccl_the_backward_pass_is_a_ring_s_all_reduce():
    network = Network("", "nccl", 10e-6, 1e-6, 1e-10)
    choice = plan_layers(TWO[:1], ranks=4, batch=1, network=network).choices[-1]
    sent = 3 * 129 * 8 + 2 * 3 / 4 * 128 * 8
    assert choice.traffic.bytes == pytest.approx(sent)
    assert choice.seconds == pytest.approx(20e-6 + (3 + 6) * 1e-6 + sent * 1e-10)


def test_the_allowed_noise_is_rule_bn110_s():
    answer = plan_layers(TWO, ranks=64, batch=1)
    assert answer.max_noise == LARGEST
    # noise of exactly the most that is allowed is allowed: six values
    assert plan_layers(TWO, ranks=6, batch=1).best.group == 6
    assert answer.best.group == 8


@pytest.mark.parametrize("ranks", [8, 64, 1024, 4096])
@pytest.mark.parametrize(("batch", "group"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 2), (6, 1)])
def test_the_group_depends_on_the_batch_and_not_on_the_ranks(ranks, batch, group):
    assert plan_layers(TWO, ranks=ranks, batch=batch).best.group == group


layers = st.lists(
    st.builds(
        lambda c, calls, worth: PlannedLayer("", c, calls, least=worth, most=worth),
        st.integers(1, 2048),
        st.integers(1, 3),
        st.floats(0.05, 1e4),
    ),
    min_size=1,
    max_size=4,
)
networks = st.builds(
    lambda backend, numbers: Network("", backend, *numbers),
    st.sampled_from(["gloo", "nccl"]),
    st.tuples(st.floats(1e-7, 1e-3), st.floats(0.0, 1e-3), st.floats(0.0, 1e-8)),
)


@given(layers, networks, st.integers(1, 720), st.integers(1, 64), st.floats(0.01, 2))
def test_larger_groups_cost_more_and_are_less_noisy(layers, network, ranks, batch, max_noise):
    answer = plan_layers(layers, ranks=ranks, batch=batch, network=network, max_noise=max_noise)
    assert [c.group for c in answer.choices] == [k for k in range(1, ranks + 1) if ranks % k == 0]
    for smaller, larger in pairwise(answer.choices):
        assert larger.seconds >= smaller.seconds  # equal where messages are free
        assert larger.traffic.bytes > smaller.traffic.bytes
        shrinks = math.sqrt(smaller.group / larger.group)
        assert larger.noise == pytest.approx(smaller.noise * shrinks)
        assert larger.noisy <= smaller.noisy
    allowed = [c for c in answer.choices if c.noise <= max_noise]
    assert answer.best == (allowed[0] if allowed else None)
    if answer.best is not None:
        seconds, traffic = answer.partial
        assert seconds <= answer.best.seconds * (1 + 1e-9)
        assert traffic.bytes <= answer.best.traffic.bytes
    else:
        assert answer.partial is None
    assert repr(answer)


@given(layers, st.integers(1, 64))
def test_a_larger_batch_never_needs_a_larger_group(layers, batch):
    best = [plan_layers(layers, ranks=64, batch=n).best for n in (batch, batch + 1)]
    if best[0] is not None:
        assert best[1].group <= best[0].group


def test_only_noisy_layers_need_it():
    layers = [PlannedLayer("calm", 64, least=50.0, most=50.0), PlannedLayer("loud", 16)]
    answer = plan_layers(layers, ranks=8, batch=4, network=MINE)
    assert answer.best.group == 2
    assert answer.choices[0].noisy == 1
    seconds, traffic = answer.partial
    alone = plan_layers(layers[1:], ranks=8, batch=4, network=MINE).best
    assert (seconds, traffic) == (alone.seconds, alone.traffic)
    assert "Only 1 layer of 2 need it; those alone cost" in repr(answer)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), nn.Flatten(), BatchNorm1d(32))


def test_a_plan_prints_groups_an_answer_and_the_network():
    text = repr(plan(net(), ranks=1024, batch=4, network=MINE, step=0.1))
    lines = text.splitlines()
    assert lines[0] == "Plan: 2 layers, 1,024 ranks of 4 samples"
    assert lines[1].split("  ")[1] == "group"
    assert " ".join(lines[2].split()) == "1 4 ≤ 0.61 2 layers 0 ms 0 bytes 0.0%"
    # 4 collectives of 100 µs and a message of 10 µs; 17 + 16 + 65 + 64 numbers of 8 bytes
    assert " ".join(lines[3].split()) == "2 ← 8 ≤ 0.43 0.441 ms 1.3 kB 0.4%"
    assert (
        "Synchronize over groups of 2, statistics=Sync.groups_of(2): a noise of ≤ 0.43 standard "
        "deviations in place of ≤ 0.61, for 0.441 ms and 1.3 kB a step on each rank."
    ) in lines
    assert lines[-1].startswith(
        "Times are of my network: 100 µs a collective, 10 µs a message, 1 GB/s. Measure yours: "
        "torchrun --nproc-per-node 4 -m batchnorm plan --measure."
    )


def test_an_example_adds_what_independent_positions_would_give():
    answer = plan(net(), ranks=8, batch=4, example=torch.randn(4, 3, 4, 4), network=MINE)
    # the last layer has one position: it is the noisiest either way
    assert answer.choices[0].least_noise == answer.choices[0].noise == math.sqrt(1.5 / 4)
    answer = plan(net()[:2], ranks=8, batch=4, example=torch.randn(4, 3, 4, 4), network=MINE)
    assert answer.choices[0].least_noise == pytest.approx(math.sqrt(1.5 / 16))
    assert "0.31 to 0.61" in repr(answer)
    assert "Were all positions of a sample independent, no synchronization would be" in repr(answer)


def test_batches_add_what_each_layer_is_worth():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 4, 4) for _ in range(16)]
    answer = plan(net(), ranks=8, batch=2, batches=batches, network=MINE)
    text = repr(answer)
    assert "a sample is worth, from the noise of batches" in text.splitlines()[0]
    assert answer.choices[0].noise == max(layer.noise(2) for layer in answer.layers)
    assert answer.choices[0].least_noise == answer.choices[0].noise
    rows = [line.split() for line in text.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["3", "1"]  # the noisiest first
    assert float(rows[0][4]) == pytest.approx(answer.choices[0].noise, rel=0.05)


def test_where_the_batch_is_enough_nothing_is_synchronized():
    text = repr(plan_layers(TWO, ranks=64, batch=32))
    assert "Do not synchronize: the statistics of 32 samples have a noise of ≤ 0.22" in text


def test_where_all_ranks_are_not_enough_it_says_what_else_there_is():
    answer = plan_layers(TWO, ranks=2, batch=1)
    assert answer.best is None
    assert "Not even all ranks bring the noise to 0.5: ≤ 0.87." in repr(answer)


def test_where_all_ranks_are_the_group_it_is_sync_alone():
    assert "statistics=Sync():" in repr(plan_layers(TWO, ranks=2, batch=4))


def test_of_very_many_sizes_the_first_the_best_and_the_last_are_printed():
    answer = plan_layers(TWO, ranks=5040, batch=1, max_noise=0.06)
    assert len(answer.choices) == 60
    rows = [line.split() for line in repr(answer).split("\n\n")[0].splitlines()[2:]]
    assert len(rows) == 12
    assert rows[0][0] == "1"
    assert [row[0] for row in rows if row[1] == "←"] == [str(answer.best.group)]
    assert rows[-1][0] == "5,040"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks": 0}, "ranks must be above 0, got 0"),
        ({"batch": -1}, "batch must be above 0, got -1"),
        ({"max_noise": math.nan}, "max_noise must be above 0, got nan"),
        ({"step": 0.0}, r"step must be above 0 seconds, got 0\.0"),
    ],
)
def test_numbers_that_are_not_positive_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        plan_layers(TWO, **{"ranks": 8, "batch": 4, **given})


def test_a_model_without_batch_norm_is_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(BatchNorm1d(3).freeze())):
        with pytest.raises(ValueError, match="there is nothing to synchronize"):
            plan(model, ranks=8, batch=4)


def test_the_default_network_is_the_one_that_was_measured():
    assert plan(net(), ranks=8, batch=4).network is LOOPBACK
