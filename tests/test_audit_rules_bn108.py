from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d
from batchnorm.audit import Probe, Report, Severity, run_script

LIBRARIES = ("torch.nn", "batchnorm")


PRELUDE = """
import copy
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from LIBRARY import BatchNorm1d
from batchnorm import Running

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = BatchNorm1d(3, **options)
    def forward(self, x):
        return self.norm(self.linear(x))

def train(model, passes=2):
    model.train()
    for _ in range(passes):
        model(torch.randn(8, 4)).sum().backward()

model = Net()
"""


@pytest.fixture(params=LIBRARIES)
def watched(request, tmp_path, monkeypatch):
    """Runs a script whose layers are torch's, or ours; gives its report and its text."""
    monkeypatch.chdir(tmp_path)

    def run(body: str) -> tuple[Report, str]:
        text = PRELUDE.replace("LIBRARY", request.param) + textwrap.dedent(body)
        Path("train.py").write_text(text)
        status, report = run_script(Path("train.py"), [])
        assert status == 0
        assert report.disabled == {}
        return report, text

    return run


def line_of(marker: str, text: str) -> int:
    (line,) = [i for i, line in enumerate(text.splitlines(), 1) if line.endswith(f"# {marker}")]
    return line


def moved(report: Report) -> list[tuple[str | None, tuple[str, ...], dict[str, float]]]:
    return [(f.place, f.modules, f.numbers) for f in report.findings if f.code == "BN108"]


# Positives

VALIDATION = """
def validate(model, batches):
    with torch.{mode}():
        for x in batches:
            model(x)  # here

train(model)
validate(model, torch.randn(3, 8, 4))
train(model)
"""


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_validation_without_eval_is_found_at_the_line_that_calls_the_model(watched, mode):
    report, text = watched(VALIDATION.format(mode=mode))
    place = f"train.py:{line_of('here', text)}"
    assert moved(report) == [(place, ("Net.norm",), {"layers": 1, "passes": 3})]
    (finding,) = report.findings
    assert finding.severity is Severity.WARNING
    assert "1 layer moved its running statistics in 3 forward passes" in finding.message
    assert not report.is_clean


def test_a_teacher_left_in_training_mode_is_found(watched):
    report, text = watched("""
        class Teacher(Net):
            pass

        teacher = Teacher().requires_grad_(False)
        teacher.load_state_dict(model.state_dict())
        for _ in range(5):
            x = torch.randn(8, 4)
            with torch.no_grad():
                target = teacher(x)  # here
            (model(x) - target).square().sum().backward()
        """)
    place = f"train.py:{line_of('here', text)}"
    assert moved(report) == [(place, ("Teacher.norm",), {"layers": 1, "passes": 5})]


def test_a_dummy_pass_to_find_a_shape_is_found(watched):
    report, text = watched("""
        with torch.no_grad():
            features = model(torch.zeros(2, 4)).shape[1]  # here
        """)
    place = f"train.py:{line_of('here', text)}"
    assert moved(report) == [(place, ("Net.norm",), {"layers": 1, "passes": 1})]
    assert "in 1 forward pass with" in report.findings[0].message


def test_every_place_is_a_finding_of_its_own_with_all_its_layers(watched):
    report, text = watched("""
        deep = nn.Sequential(Net(), nn.Linear(3, 4), Net())
        with torch.no_grad():
            deep(torch.randn(8, 4))  # first
            for _ in range(2):
                deep[0](torch.randn(8, 4))  # second
        """)
    first, second = (f"train.py:{line_of(marker, text)}" for marker in ("first", "second"))
    assert sorted(moved(report)) == [
        (first, ("Sequential.0.norm", "Sequential.2.norm"), {"layers": 2, "passes": 1}),
        (second, ("Sequential.0.norm",), {"layers": 1, "passes": 2}),
    ]


def test_an_ensemble_of_one_class_counts_each_of_its_layers(watched):
    report, text = watched("""
        ensemble = [Net(), Net(), Net()]
        with torch.no_grad():
            for _ in range(2):
                for member in ensemble:
                    member(torch.randn(8, 4))  # here
        """)
    ((place, _, numbers),) = moved(report)
    assert place == f"train.py:{line_of('here', text)}"
    assert numbers == {"layers": 3, "passes": 2}


def test_the_plain_average_is_found_to_move_too(watched):
    report, _ = watched("""
        model = Net(momentum=None)
        with torch.no_grad():
            model(torch.randn(8, 4))
        """)
    assert [numbers for *_, numbers in moved(report)] == [{"layers": 1, "passes": 1}]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d], ids=LIBRARIES)
def test_a_call_by_keyword_is_found(norm):
    layer = norm(3)
    with Probe() as probe, torch.no_grad():
        layer(input=torch.randn(4, 3))
    assert [f.modules for f in probe.report().findings] == [(norm.__name__,)]


# Negatives: each makes the pass that is marked "here" above, but rightly

RIGHT = {
    "in eval mode": """
        train(model)
        model.eval()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(8, 4))
        train(model)
        """,
    "training, gradients on": "train(model)",
    "gradients on again inside no_grad": """
        with torch.no_grad():
            with torch.enable_grad():
                train(model)
        """,
    "nothing to train, gradients on": """
        model.requires_grad_(False)
        model(torch.randn(8, 4))
        """,
    "the layer alone in eval mode": """
        model.norm.eval()
        with torch.no_grad():
            model(torch.randn(8, 4))
        """,
    "update_bn": """
        train(model)
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        update_bn(torch.randn(3, 8, 4), averaged)
        averaged.eval()
        with torch.no_grad():
            averaged(torch.randn(8, 4))
        """,
    "a reentrant checkpoint in training": """
        for _ in range(3):
            x = torch.randn(8, 4, requires_grad=True)
            checkpoint(model, x, use_reentrant=True).sum().backward()
        """,
    "a checkpoint in training": """
        for _ in range(3):
            checkpoint(model, torch.randn(8, 4), use_reentrant=False).sum().backward()
        """,
    "track_running_stats=False": """
        model = Net(track_running_stats=False)
        with torch.no_grad():
            model(torch.randn(8, 4))
        """,
    "momentum=0": """
        model = Net(momentum=0.0)
        with torch.no_grad():
            model(torch.randn(8, 4))
        """,
}


@pytest.mark.parametrize("body", RIGHT.values(), ids=RIGHT)
def test_a_pass_that_is_right_is_not_reported(watched, body):
    report, _ = watched(body)
    assert report.calls > 0
    assert moved(report) == []


BY_HAND = """
    train(model)
    model.norm.momentum = None
    RESET
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 4))
    """


def test_statistics_that_are_estimated_again_by_hand_are_not_reported(watched):
    report, _ = watched(BY_HAND.replace("RESET", "model.norm.reset_running_stats()"))
    assert (report.calls, moved(report)) == (5, [])


def test_a_plain_average_that_goes_on_is_reported(watched):
    report, _ = watched(BY_HAND.replace("RESET", "pass"))
    assert len(moved(report)) == 1


OURS_ALONE = {
    "a frozen layer": """
        from batchnorm import BatchNorm1d
        model.norm = BatchNorm1d(3).freeze()
        """,
    "statistics=Running()": """
        from batchnorm import BatchNorm1d
        model.norm = BatchNorm1d(3, statistics=Running())
        """,
}


@pytest.mark.parametrize("body", OURS_ALONE.values(), ids=OURS_ALONE)
def test_a_layer_that_does_not_learn_statistics_is_not_reported(watched, body):
    call = "train(model)\nwith torch.no_grad():\n    model(torch.randn(8, 4))\n"
    report, _ = watched(textwrap.dedent(body) + call)
    assert (report.calls, moved(report)) == (3, [])


def test_a_pass_that_failed_does_not_put_the_next_one_under_suspicion(watched):
    report, _ = watched("""
        with torch.no_grad():
            try:
                model.norm(torch.randn(8, 5))  # five channels for three: nothing moves
            except (RuntimeError, ValueError):
                pass
        train(model)
        """)
    assert (report.calls, moved(report)) == (3, [])
