"""BN112 and BN114, of what several ranks told; real ranks are in the tests of torchrun."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from batchnorm.audit import Selection, Severity
from batchnorm.audit.finding import ranks_named
from batchnorm.audit.judge import views_for
from batchnorm.audit.rank_view import Calls, LayerView, RankView, RankViews, told
from batchnorm.audit.rules.bn112_ranks_differ import RanksDiffer, disagreements
from batchnorm.audit.rules.bn114_ranks_out_of_step import RanksOutOfStep


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([2, 0], "ranks 0 and 2"),
        ([0, 1], "ranks 0 and 1"),
        ([0, 1, 2], "ranks 0–2"),
        ([7, 0, 1, 2, 3, 9, 10], "ranks 0–3, 7, 9 and 10"),
    ],
)
def test_ranks_are_named_shortly(ranks, words):
    assert ranks_named(ranks) == words


# BN112

STATISTICS = {}


def statistics(mean: float = 0.0, var: float = 1.0) -> str:
    """The digest of four channels' statistics, which are remembered."""
    digest, pair = told((torch.full((4,), mean), torch.full((4,), var)))
    STATISTICS[digest] = pair
    return digest


def rank(number: int, *layers: LayerView, **options) -> RankView:
    return RankView(number, layers, **options)


def layer(name: str = "Net.bn1", **options) -> LayerView:
    return LayerView(name, name, 0.0, **{"weights": "γ", **options})


def differing(*views: RankView) -> list:
    return list(RanksDiffer().confront(RankViews(len(views), views, STATISTICS)))


def test_ranks_that_evaluated_with_other_statistics_are_told_by_how_much():
    same, here, there = statistics(0.0, 4.0), statistics(0.5, 4.0), statistics(-1.5, 9.0)
    views = [
        rank(
            i,
            layer("Net.bn1", held=same, used=same, evaluations=2),
            layer("Net.bn2", held=same, used=used, evaluations=2),
        )
        for i, used in enumerate([same, here, same, there])
    ]
    (finding,) = differing(*views)
    assert (finding.code, finding.severity) == ("BN112", Severity.WARNING)
    assert finding.modules == ("Net.bn2",)
    # (0.5 + 1.5) / 3, by the larger of both deviations; 3 / 2
    assert finding.numbers["shift"] == pytest.approx(2 / 3)
    assert finding.numbers["stretch"] == pytest.approx(1.5)
    assert (finding.numbers["rank"], finding.numbers["other_rank"]) == (1, 3)
    assert finding.message == (
        "ranks 1 and 3 evaluated with running statistics that differ by 0.67 standard deviations "
        "in the mean and ×1.5 in the standard deviation (Net.bn2, in 1 layer)"
    )
    assert "batchnorm.reduce_statistics(model)" in finding.fix


@pytest.mark.parametrize(
    ("shift", "severity"), [(0.09, Severity.INFO), (0.11, Severity.WARNING), (5e-4, None)]
)
def test_a_small_difference_is_a_fact_and_rounding_is_nothing(shift, severity):
    views = [
        rank(i, layer(used=statistics(i * shift), held=statistics(), evaluations=1))
        for i in range(2)
    ]
    assert [finding.severity for finding in differing(*views)] == [severity] * (
        severity is not None
    )


def test_the_layer_that_is_farthest_apart_comes_first():
    views = [
        rank(
            i,
            *(
                layer(f"Net.bn{k}", used=statistics(i * shift), evaluations=1)
                for k, shift in enumerate([0.2, 0.7, 0.0, 0.3])
            ),
        )
        for i in range(2)
    ]
    (finding,) = differing(*views)
    assert finding.modules == ("Net.bn1", "Net.bn3", "Net.bn0")
    assert "(Net.bn1, in 3 layers)" in finding.message


def test_what_was_used_counts_and_not_what_the_last_step_made_of_it():
    used = statistics(0.0)
    views = [
        rank(i, layer(held=statistics(i * 1.0), used=used, evaluations=3, is_broadcast=broadcast))
        for broadcast in (False, True)
        for i in range(2)
    ]
    assert differing(*views[:2]) == differing(*views[2:]) == []


def test_evaluations_are_compared_with_their_like():
    one, other = statistics(0.0), statistics(1.0)
    first = rank(0, layer(held=one, used=other, evaluations=5))
    assert differing(first, rank(1, layer(held=one, used=one, evaluations=4))) == []
    third = rank(2, layer(held=one, used=other, evaluations=4))
    (finding,) = differing(first, rank(1, layer(held=one, used=one, evaluations=4)), third)
    assert (finding.numbers["rank"], finding.numbers["other_rank"]) == (1, 2)


@pytest.mark.parametrize(
    ("shift", "severity"), [(0.4, Severity.INFO), (0.6, Severity.WARNING), (0.0, None)]
)
def test_what_nobody_evaluated_is_a_fact_of_what_is_saved(shift, severity):
    views = [rank(i, layer(held=statistics(i * shift))) for i in range(2)]
    found = differing(*views)
    assert [finding.severity for finding in found] == [severity] * (severity is not None)
    assert all("end with running statistics" in f.message for f in found)
    assert all("; a checkpoint has those of the rank that saves it" in f.message for f in found)
    # one rank alone evaluates and saves
    alone = replace(views[0], layers=(layer(held=statistics(), used=statistics(), evaluations=9),))
    assert [f.severity for f in differing(alone, views[1])] == [f.severity for f in found]


def test_a_passing_state_is_nothing():
    held = [layer(held=statistics(i * 1.0)) for i in range(2)]
    assert differing(rank(0, held[0]), rank(1, held[1]))
    # the next forward pass brings rank 0's to all
    broadcast = [replace(one, is_broadcast=True) for one in held]
    assert differing(rank(0, broadcast[0]), rank(1, broadcast[1])) == []
    # one was a step ahead when the run failed
    for status in (1, None):
        assert differing(rank(0, held[0], status=status), rank(1, held[1])) == []
    # models of their own, with weights of their own
    assert differing(rank(0, held[0]), rank(1, replace(held[1], weights="other γ"))) == []
    assert differing(rank(0, held[0], is_connected=False), rank(1, held[1])) == []
    # parts of a model
    assert differing(rank(0, held[0]), rank(1, replace(held[1], name="Net.bn9"))) == []


def test_a_model_that_one_rank_called_otherwise_is_the_same_model():
    one, other = statistics(0.0), statistics(1.0)
    wrapped = LayerView("DistributedDataParallel.module.bn", "Net.bn", 0.0, "γ", one)
    second = LayerView("Net#2.bn", "Net.bn", 0.0, "γ", other)
    aside = LayerView("Net.bn", "Net.bn", 0.0, "another γ", statistics(7.0))
    (finding,) = differing(rank(0, wrapped), rank(1, aside, second))
    assert finding.modules == ("DistributedDataParallel.module.bn",)
    assert finding.numbers["shift"] == pytest.approx(1.0)


def test_models_that_were_never_told_apart_are_matched_in_their_order():
    views = [
        rank(i, layer("Net.bn", held=statistics(1.0)), layer("Net#2.bn", held=statistics(2.0)))
        for i in range(2)
    ]
    views = [
        replace(view, layers=tuple(replace(each, name="Net.bn") for each in view.layers))
        for view in views
    ]
    assert differing(*views) == []


def test_a_difference_that_is_not_at_hand_is_told_without_a_number():
    views = [rank(i, layer(used=f"unknown {i}", evaluations=1)) for i in range(20)]
    (finding,) = differing(*views)
    assert finding.severity is Severity.INFO
    assert finding.message == (
        "ranks 0 and 1 evaluated with running statistics that differ in 1 layer"
    )
    assert math.isnan(finding.numbers["shift"])
    # one that is not finite is BN101's and BN103's to tell
    broken = statistics(math.nan)
    (finding,) = differing(
        rank(0, layer(used=broken, evaluations=1)), rank(1, layer(used=statistics(), evaluations=1))
    )
    assert finding.severity is Severity.INFO


def test_together_ranks_compare_what_they_hold():
    views = [
        rank(i, layer(held=statistics(i * 0.2)), is_together=True, status=None) for i in (0, 1)
    ]
    (finding,) = differing(*views)
    assert finding.severity is Severity.WARNING
    assert finding.message.startswith("ranks 0 and 1 hold running statistics that differ by 0.2 ")
    assert [each.when for each in disagreements(views)] == ["as they are"]


def test_layers_that_are_to_be_left_out_are():
    views = [
        rank(i, layer("Net.head.bn", used=statistics(i * 1.0), evaluations=1)) for i in range(2)
    ]
    ranks = RankViews(2, views, STATISTICS)
    ignoring = Selection(modules={"head.*": ("BN112",)})
    assert list(RanksDiffer().confront(views_for("BN112", ranks, ignoring))) == []
    assert list(RanksDiffer().confront(views_for("BN113", ranks, ignoring)))


# BN114

ALL = (0, 1, 2)
STEP = ["Net.bn1", "Net.bn2", "Net.bn3"]


def calls(*names: str, ranks: tuple[int, ...] = ALL, group: str = "0", kept: int = 1024) -> Calls:
    return Calls(group, ranks, {n: names.count(n) for n in dict.fromkeys(names)}, names[-kept:])


def asking(number: int, *names: str, status: int | None = 0, modes=None, **options) -> RankView:
    """A rank whose layers asked the others in this order."""
    own = calls(*names, **options)
    asks = own.ranks
    layers = tuple(
        LayerView(n, n, 0.0, asks=asks, is_training=(modes or {}).get(n, True)) for n in STEP
    )
    return RankView(number, layers, (own,) if names else (), status=status)


def out_of_step(*views: RankView) -> list:
    found = list(RanksOutOfStep().confront(RankViews(len(views), views)))
    assert {(f.code, f.severity) for f in found} <= {("BN114", Severity.ERROR)}
    return found


def test_ranks_in_step_are_fine():
    for status in (0, 1, None):
        views = [asking(i, *STEP * 9, status=status) for i in range(3)]
        assert out_of_step(*views) == []


def test_a_layer_that_one_rank_leaves_out():
    for kept in (1024, 5):
        views = [
            asking(0, *STEP * 9, "Net.bn1", "Net.bn2", status=1, kept=kept),
            asking(1, *STEP * 9, "Net.bn1", "Net.bn3", status=None, kept=kept),
            asking(2, *STEP * 9, "Net.bn1", "Net.bn2", status=None, kept=kept),
        ]
        (finding,) = out_of_step(*views)
        assert finding.modules == ("Net.bn2",)
        assert finding.message == (
            "Net.bn2 was called 10 times in training mode on ranks 0 and 2, 9 times on rank 1, "
            "which went on to Net.bn3"
        )
        assert "take a branch on all ranks or on none" in finding.fix
        numbers = finding.numbers
        assert (numbers["calls"], numbers["other_calls"]) == (10, 9)
        assert (numbers["rank"], numbers["other_rank"]) == (0, 1)


def test_which_layer_was_due_is_told_by_what_followed_before_and_not_by_a_majority():
    views = [
        asking(0, *STEP * 9, "Net.bn1", "Net.bn2"),
        asking(1, *STEP * 9, "Net.bn1", "Net.bn3"),
        asking(2, *STEP * 9, "Net.bn1", "Net.bn3"),
    ]
    (finding,) = out_of_step(*views)
    assert finding.modules == ("Net.bn2",)
    assert "9 times on ranks 1 and 2, which went on to Net.bn3" in finding.message


def test_a_layer_in_eval_mode_on_one_rank():
    modes = {"Net.bn2": False}
    views = [
        asking(0, *STEP * 9, "Net.bn1", "Net.bn2", status=1),
        asking(1, *STEP * 9, "Net.bn1", "Net.bn3", status=1, modes=modes),
    ]
    (finding,) = out_of_step(*views)
    assert finding.message.endswith("9 times on rank 1, where it is in eval mode")
    assert finding.fix == "train() or eval() on all ranks alike"


def test_layers_that_are_called_in_another_order():
    first, second = ["Net.bn1", "Net.bn2"], ["Net.bn2", "Net.bn1"]
    (finding,) = out_of_step(asking(0, *first), asking(1, *second))
    assert finding.message == (
        "training-mode call 1 of layers that synchronize is of Net.bn1 on rank 0, of Net.bn2 on "
        "rank 1"
    )


def test_a_rank_that_ended_with_fewer_calls():
    ahead = asking(0, *STEP * 28, "Net.bn1", status=1)
    behind = [asking(i, *STEP * 28) for i in (1, 2)]
    (finding,) = out_of_step(ahead, *behind)
    assert finding.message == (
        "Net.bn1 was called 29 times in training mode on rank 0, 28 times on ranks 1 and 2, which "
        "have ended"
    )
    assert "DistributedSampler" in finding.fix


def test_what_is_not_certain_is_not_told():
    ahead = asking(0, *STEP * 28, "Net.bn1", status=None)
    # a rank's own error is the cause
    assert out_of_step(ahead, asking(1, *STEP * 28, status=1)) == []
    # it may have been about to come: it evaluates alone, or reads its data
    assert out_of_step(ahead, asking(1, *STEP * 28, status=None)) == []
    evaluating = asking(1, *STEP * 28, status=None, modes=dict.fromkeys(STEP, False))
    assert out_of_step(ahead, evaluating) == []
    # nobody waited
    assert out_of_step(replace(ahead, status=0), asking(1, *STEP * 28)) == []
    # of what is forgotten on one of them nothing is known
    long, short = asking(0, *STEP * 99, status=1, kept=3), asking(1, *STEP * 9, status=1)
    assert out_of_step(long, short) == []


def test_a_rank_that_trains_on_in_eval_mode():
    ahead = asking(0, *STEP * 28, "Net.bn1", status=1)
    behind = asking(1, *STEP * 28, status=None, modes=dict.fromkeys(STEP, False))
    layers = tuple(replace(each, learned_in_eval=1) for each in behind.layers)
    (finding,) = out_of_step(ahead, replace(behind, layers=layers))
    assert finding.message == (
        "Net.bn1 was called 29 times in training mode on rank 0, 28 times on rank 1, where it is "
        "in eval mode and learns"
    )


def test_groups_are_apart():
    left, right = {"ranks": (0, 1), "group": "1"}, {"ranks": (2, 3), "group": "2"}
    views = [asking(i, *STEP, **left) for i in (0, 1)] + [
        asking(2, *STEP * 2, status=1, **right),
        asking(3, *STEP, **right),
    ]
    (finding,) = out_of_step(*views)
    assert (finding.numbers["rank"], finding.numbers["other_rank"]) == (2, 3)
    assert out_of_step(*views[:2], replace(views[3], rank=2), views[3]) == []


def test_a_rank_that_never_asked_has_no_calls():
    (finding,) = out_of_step(asking(0, "Net.bn1", status=1), asking(1))
    assert "was called once in training mode on rank 0, 0 times on rank 1" in finding.message


def test_a_rank_that_gave_no_report_is_not_compared():
    views = (asking(0, *STEP, status=1), asking(2, *STEP, status=1))
    assert list(RanksOutOfStep().confront(RankViews(3, views))) == []


def test_flags_that_differ_when_all_look_together():
    views = [
        replace(asking(i, *(STEP if i == 0 else []), modes=modes), is_together=True, status=None)
        for i, modes in enumerate([{}, {"Net.bn2": False, "Net.bn3": False}])
    ]
    (finding,) = out_of_step(*views)
    assert finding.modules == ("Net.bn2", "Net.bn3")
    assert finding.message.startswith(
        "Net.bn2 and 1 more in training mode on rank 0, in eval mode on rank 1: "
    )
    # a model that is evaluated as a whole there trains with the others' when all train
    whole = replace(views[1], is_evaluating=True)
    assert out_of_step(views[0], whole) == []
    # layers that ask nobody wait for nobody
    alone = [replace(v, layers=tuple(replace(e, asks=()) for e in v.layers)) for v in views]
    assert out_of_step(*(replace(view, calls=()) for view in alone)) == []


def test_calls_that_differ_in_one_pass_of_all():
    views = [
        replace(asking(i, *names), is_together=True, status=None)
        for i, names in enumerate([STEP, STEP[:2]])
    ]
    (finding,) = out_of_step(*views)
    assert finding.message == (
        "Net.bn3 was called once in training mode on rank 0, 0 times on rank 1 in one pass"
    )


def test_layers_that_are_to_be_left_out_of_the_order_are():
    ranks = RankViews(2, [asking(0, *STEP, status=1), asking(1, "Net.bn1", "Net.bn3", status=1)])
    assert list(RanksOutOfStep().confront(ranks))
    ignoring = Selection(modules={"bn2": ("BN114",)})
    assert list(RanksOutOfStep().confront(views_for("BN114", ranks, ignoring))) == []
