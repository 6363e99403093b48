"""Claim 13: its quick run on real processes, its shards, and how errors become effects."""

import pytest
import torch

from batchnorm.lab.claims.c13_ranks_disagree import (
    MIXED,
    SPLIT,
    RanksDisagree,
    above,
    at_best_rate,
    shards,
    wrong,
)
from batchnorm.lab.data import Examples
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.lab.results import Results
from batchnorm.lab.sharded import Job, train_together
from laboratory import quick


def test_synchronized_ranks_agree_and_do_as_well_as_one_process():
    results = quick(RanksDisagree)
    assert len(results) == 2
    for row in results:
        for measure in ("validation", "test", "merged", "disagree"):
            assert len(row[measure]) == row["rates"]
            assert all(0 <= value <= 100 for value in row[measure])
    (sync,) = results.where(arm="sync").rows
    (one,) = results.where(arm="one").rows
    assert sync["disagree"] == [0.0]
    assert sync["merged"] == sync["test"], "merging moved statistics that were the same"
    assert one["test"][0] < 50, "the network does not learn"
    # sums in another order grow apart, but not far in so few steps
    assert sync["test"] == pytest.approx(one["test"], abs=5)
    assert above(results, "sync", "one") == pytest.approx([sync["test"][0] - one["test"][0]])
    RanksDisagree().figure(results)


def test_split_shards_have_half_of_the_classes_each():
    examples = Examples(torch.randn(90, 1, 8, 8), torch.arange(90) % 9)
    even, odd = shards(examples, SPLIT, seed=0)
    assert set(even.y.tolist()) == {0, 2, 4, 6, 8}
    assert set(odd.y.tolist()) == {1, 3, 5, 7}
    assert len(even) == len(odd) == 40
    mixed = shards(examples, MIXED, seed=0)
    assert [len(part) for part in mixed] == [45, 45]
    assert all(len(part.y.unique()) == 9 for part in mixed)
    rows = torch.cat([part.x for part in mixed]).flatten(1)
    assert len(rows.unique(dim=0)) == 90, "the shards overlap"


def test_one_process_trains_at_every_rate_from_the_same_start():
    torch.manual_seed(0)
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    network = PlainNetwork(norm_of("batch"), depth=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    halves = [(x[:20], y[:20]), (x[20:], y[20:])]
    job = Job(network, "one", halves, x, (0.1, 1e-9, 0.1), 3, 4, 0)
    answers = train_together(job)["apart"]
    assert answers[0] == answers[2] != answers[1]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_answers_that_differ_are_counted():
    assert wrong(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 25


def test_each_arm_is_judged_at_its_own_best_rate():
    def row(arm, seed, validation, test):
        return {
            "arm": arm,
            "shards": SPLIT,
            "seed": seed,
            "validation": validation,
            "test": test,
            "merged": [9, 9],
        }

    results = Results(
        [
            row("own", 0, [10, 30], [11, 1]),
            row("own", 1, [40, 10], [12, 1]),
            row("sync", 0, [2, 3], [2, 8]),
            row("sync", 1, [4, 2], [8, 3]),
        ]
    )
    # the means are 25 and 20, and 3 and 2.5: the second rate is each one's
    assert at_best_rate(results, "own", SPLIT, "test") == [1, 1]
    assert above(results, "own") == [-7, -2]
    assert above(results, "own", measure="merged") == [1, 6]
