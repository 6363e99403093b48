from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, Running
from batchnorm.audit import Probe, Report, Severity, run_script

LIBRARIES = ("torch.nn", "batchnorm")
BOTH_1D = pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d], ids=LIBRARIES)
BOTH_2D = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d], ids=LIBRARIES)
REFUSED = "Expected more than 1 value per channel"


def found(layer: nn.Module, *inputs: torch.Tensor, refused: bool) -> Report:
    """What is said of a layer that sees these inputs, and refuses every one or none."""
    with Probe() as probe:
        for x in inputs:
            with pytest.raises(ValueError, match=REFUSED) if refused else nullcontext():
                layer(x)
    report = probe.report()
    assert (report.calls, report.disabled) == (len(inputs), {})
    return report


def shapes(report: Report) -> list[tuple[int, ...]]:
    return [
        ast.literal_eval(f.message.removeprefix("an input of shape ").partition(" leaves")[0])
        for f in report.findings
        if f.code == "BN109"
    ]


@BOTH_1D
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_sample_of_one_position_is_an_error(norm, shape):
    report = found(norm(3), torch.randn(shape), refused=True)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("BN109", Severity.ERROR)
    assert finding.modules == (norm.__name__,)
    assert finding.numbers == {"values_per_channel": 1}
    assert shapes(report) == [shape]


@BOTH_2D
def test_one_image_of_one_pixel_is_an_error(norm):
    assert shapes(found(norm(3), torch.randn(1, 3, 1, 1), refused=True)) == [(1, 3, 1, 1)]


@BOTH_1D
def test_it_is_an_error_too_where_no_statistics_are_kept(norm):
    layer = norm(3, track_running_stats=False).eval()
    assert shapes(found(layer, torch.randn(1, 3), refused=True)) == [(1, 3)]


@pytest.mark.parametrize(("size", "n"), [(4, 5), (4, 9), (2, 3), (2, 1), (8, 1)])
def test_a_last_ghost_slice_of_one_is_an_error(size, n):
    layer = BatchNorm1d(3, statistics=Ghost(size))
    assert shapes(found(layer, torch.randn(n, 3), refused=True)) == [(n, 3)]


@BOTH_1D
def test_a_layer_and_shape_is_reported_once(norm):
    model = nn.Sequential(norm(3), nn.Identity())
    report = found(model, *torch.randn(3, 1, 3), torch.randn(1, 3, 1), refused=True)
    assert sorted(shapes(report)) == [(1, 3), (1, 3, 1)]
    assert {f.modules for f in report.findings} == {("Sequential.0",)}


# Negatives: the same layers and nearly the same inputs


@BOTH_1D
def test_one_sample_in_eval_mode_is_fine(norm):
    assert (
        shapes(found(norm(3).eval(), torch.randn(1, 3), torch.randn(1, 3, 1), refused=False)) == []
    )


@BOTH_1D
def test_one_sample_with_positions_is_fine(norm):
    assert shapes(found(norm(3), torch.randn(1, 3, 2), refused=False)) == []


@BOTH_2D
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (1, 3, 4, 4), (2, 3, 1, 1)])
def test_two_values_are_fine(norm, shape):
    assert shapes(found(norm(3), torch.randn(shape), refused=False)) == []


def test_an_empty_batch_is_not_one_value():
    assert shapes(found(BatchNorm1d(3), torch.randn(0, 3), refused=False)) == []


@pytest.mark.parametrize(
    "layer",
    [BatchNorm1d(3, statistics=Running()), BatchNorm1d(3).freeze()],
    ids=["Running()", "frozen"],
)
def test_a_layer_that_uses_its_running_statistics_takes_one_sample(layer):
    assert shapes(found(layer, torch.randn(1, 3), refused=False)) == []


@pytest.mark.parametrize(
    ("size", "shape"), [(4, (4, 3)), (4, (6, 3)), (4, (3, 3)), (4, (5, 3, 2)), (2, (4, 3))]
)
def test_ghost_slices_of_two_values_and_more_are_fine(size, shape):
    layer = BatchNorm1d(3, statistics=Ghost(size))
    assert shapes(found(layer, torch.randn(shape), refused=False)) == []


def test_ghost_slices_do_not_count_in_eval_mode():
    x = torch.randn(5, 3)
    assert shapes(found(BatchNorm1d(3, statistics=Ghost(4)).eval(), x, refused=False)) == []
    # the whole batch is normalized here, as there is nothing else to normalize with
    layer = BatchNorm1d(3, statistics=Ghost(4), track_running_stats=False).eval()
    assert shapes(found(layer, x, refused=False)) == []


# The place, and the run that it ends

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader
from {library} import BatchNorm1d

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = BatchNorm1d(3)
    def forward(self, x):
        return self.norm(x)

model, data = Net(), torch.randn(9, 3)
for x in DataLoader(data, batch_size=4, drop_last=bool(sys.argv[1:])):
    model(x)  # here
"""


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_report_arrives_though_the_error_ends_the_script(
    library, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = SCRIPT.format(library=library)
    Path("train.py").write_text(text)
    status, report = run_script(Path("train.py"), [])
    assert status == 1
    assert f"ValueError: {REFUSED}" in capsys.readouterr().err
    (line,) = [i for i, line in enumerate(text.splitlines(), 1) if line.endswith("# here")]
    (finding,) = report.findings
    assert (finding.code, finding.modules) == ("BN109", ("Net.norm",))
    assert finding.place == f"train.py:{line}"
    assert shapes(report) == [(1, 3)]

    # and its own advice helps
    assert "drop_last=True" in finding.fix
    status, report = run_script(Path("train.py"), ["--drop-last"])
    assert (status, report.findings, report.calls) == (0, (), 2)
