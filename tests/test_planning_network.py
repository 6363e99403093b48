import math

import pytest

from batchnorm.planning import INFINIBAND, LOOPBACK, NVLINK, Network, measure_network
from batchnorm.planning.measuring import _sizes
from batchnorm.planning.network import fitted
from batchnorm.planning.traffic import Traffic, backward, forward

WORK = [forward(c, k) for k in (2, 4, 8) for c in (1, 64, 2048)]


def test_the_time_is_the_sum_of_three_products():
    network = Network("mine", "gloo", collective=1e-4, message=1e-5, byte=1e-9)
    assert network.seconds(Traffic(2, 6, 5000.0)) == pytest.approx(2e-4 + 6e-5 + 5e-6)
    assert network.bandwidth == pytest.approx(1e9)
    assert Network("ideal", "gloo", 0.0, 0.0, 0.0).bandwidth == math.inf


@pytest.mark.parametrize(
    "numbers", [(1e-4, 2e-5, 3e-9), (0.0, 2e-5, 3e-9), (1e-4, 0.0, 3e-9), (1e-4, 2e-5, 0.0)]
)
def test_the_fit_finds_the_numbers_that_times_were_made_of(numbers):
    true = Network("", "gloo", *numbers)
    fit = fitted("found", "gloo", [(work, true.seconds(work)) for work in WORK])
    found = (fit.collective, fit.message, fit.byte)
    assert found == pytest.approx(numbers, rel=1e-6, abs=1e-15)
    assert (fit.name, fit.backend) == ("found", "gloo")


def test_the_fit_is_no_worse_than_its_neighbours_and_never_negative():
    # 8 ranks quicker than 4: no line through that has a positive slope everywhere
    took = {2: 3e-4, 4: 9e-4, 8: 5e-4}
    measured = [
        (forward(c, k), seconds * (1 + c / 1e4)) for k, seconds in took.items() for c in (1, 2048)
    ]
    fit = fitted("", "gloo", measured)
    numbers = [fit.collective, fit.message, fit.byte]
    assert min(numbers) >= 0

    def error(network):
        return sum((network.seconds(work) / seconds - 1) ** 2 for work, seconds in measured)

    for i in range(3):
        for step in (-1e-3, 1e-3):
            other = list(numbers)
            other[i] = max(0.0, other[i] + step * max(other[i], 1e-9))
            assert error(fit) <= error(Network("", "gloo", *other)) + 1e-12


def test_times_twice_as_long_make_a_network_twice_as_slow():
    true = Network("", "nccl", 7e-6, 2e-6, 1e-10)
    work = [*WORK, *(backward(c, k, "nccl") for k in (2, 8) for c in (4, 512))]
    measured = [(each, true.seconds(each)) for each in work]
    once = fitted("", "nccl", measured)
    twice = fitted("", "nccl", [(each, 2 * seconds) for each, seconds in measured])
    for name in ("collective", "message", "byte"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name), rel=1e-6)


def test_one_group_size_tells_no_collective_from_a_message():
    with pytest.raises(ValueError, match="collectives of one group size do not tell α from λ"):
        fitted("", "gloo", [(forward(c, 2), 1e-4) for c in (1, 64)])


@pytest.mark.parametrize("number", [-1e-6, math.nan, math.inf])
def test_what_is_no_time_is_refused(number):
    with pytest.raises(ValueError, match="seconds a message are a number from 0 up, got"):
        Network("", "gloo", 1e-6, number, 0.0)


@pytest.mark.parametrize(
    ("world", "sizes"), [(4, [2, 4]), (6, [2, 6]), (9, [3, 9]), (15, [3, 5, 15]), (7, [7])]
)
def test_two_sizes_of_groups_are_measured_where_there_are_two(world, sizes):
    assert _sizes(world) == sizes


def test_without_processes_there_is_no_network_to_measure():
    with pytest.raises(ValueError, match="no process group to measure; start several processes"):
        measure_network()


def test_the_known_networks_say_where_they_come_from():
    assert "measured here" in NVLINK.name
    assert "measured here" in INFINIBAND.name
    assert "benchmarks/sync.md" in LOOPBACK.name
    assert {LOOPBACK.backend, NVLINK.backend, INFINIBAND.backend} == {"gloo", "nccl"}
    assert NVLINK.message < INFINIBAND.message
