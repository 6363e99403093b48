import io
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.repair.recalibration import recalibrate
from recalibrated import UPSTREAMS, images, pooled


@dataclass
class Pair:
    x: torch.Tensor
    label: torch.Tensor


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, label=None):
        return self.norm(x)


@pytest.mark.parametrize(
    "form",
    [
        lambda xs: xs,
        lambda xs: (x for x in xs),
        lambda xs: [(x, torch.zeros(len(x))) for x in xs],
        lambda xs: [[x, "labels"] for x in xs],
        lambda xs: [{"x": x, "label": None} for x in xs],
        lambda xs: [Pair(x, torch.zeros(len(x))) for x in xs],
        lambda xs: DataLoader(TensorDataset(torch.cat(xs)), batch_size=4),
    ],
)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_any_iterable_of_any_batches(form, upstream):
    batches = images(4, 3, 4)
    model = Labelled()
    result = recalibrate(model, form(batches), upstream=upstream)
    np.testing.assert_allclose(model.norm.running_var, pooled(batches)[1], rtol=1e-5)
    assert (result.batches, result.samples) == (3, 11)
    limited = recalibrate(model, form(batches), upstream=upstream, samples=6)
    np.testing.assert_allclose(
        model.norm.running_var, pooled([torch.cat(batches)[:6]])[1], rtol=1e-5
    )
    assert (limited.batches, limited.samples) == (2, 6)


def test_a_limit_takes_no_batch_too_many():
    batches = iter(images(4, 4, 4))
    recalibrate(nn.BatchNorm2d(3), batches, samples=8)
    assert len(list(batches)) == 1


def test_other_tensors_of_a_batch_are_cut_with_its_samples():
    lengths, seen = [], []
    batch = {"x": torch.randn(5, 3, 2, 2), "y": torch.zeros(5), "scale": torch.ones(3), "n": 7}

    def forward(model, batch):
        lengths.append([len(batch[k]) for k in ("x", "y", "scale")])
        seen.append(batch["n"])
        model(batch["x"])

    recalibrate(nn.BatchNorm2d(3), [batch], samples=2, forward=forward)
    assert lengths == [[2, 2, 3]]
    assert seen == [7]


def test_batches_without_tensors_are_not_counted():
    layer, x = nn.BatchNorm1d(2), torch.randn(5, 2)
    result = recalibrate(layer, ["file"], forward=lambda model, name: model(x))
    assert (result.batches, result.samples) == (1, 0)
    assert repr(result).startswith("Recalibration: 1 layer, 1 batch\n")
    with pytest.raises(TypeError, match=r"samples=3 needs batches that hold tensors.*got str"):
        recalibrate(layer, ["file"], forward=lambda model, name: model(x), samples=3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_progress_is_shown_on_terminals_or_when_asked_for(upstream, monkeypatch):
    layers = {"first": nn.BatchNorm1d(2), "[red]": nn.BatchNorm1d(2)}
    model, batches = nn.Sequential(nn.ModuleDict(layers)), [torch.randn(4, 2)]

    def forward(model, x):
        for layer in model[0].values():
            x = layer(x)

    shown = {}
    for stream in (io.StringIO, Terminal):
        for progress in (None, True, False):
            to = stream()
            monkeypatch.setattr(sys, "stderr", to)
            recalibrate(model, batches, forward=forward, upstream=upstream, progress=progress)
            wanted = "0.[red], 2 of 2" if upstream == "running" else "Recalibrating"
            shown[stream, progress] = wanted in to.getvalue()
            assert shown[stream, progress] or not to.getvalue()
    assert shown == {
        (io.StringIO, None): False,
        (io.StringIO, True): True,
        (io.StringIO, False): False,
        (Terminal, None): True,
        (Terminal, True): True,
        (Terminal, False): False,
    }
