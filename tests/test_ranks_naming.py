"""What layers are called in the models that run them."""

import copy

import pytest
import torch
from torch import nn

from batchnorm.ranks import caller_of

pytestmark = pytest.mark.as_installed


class Told(nn.Module):
    """Notes its name when it is called."""

    caller = None

    def forward(self, x):
        self.caller = caller_of(self)
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), nn.Sequential(Told(), nn.ReLU()))
        self.last = Told()
        self.module = nn.ModuleDict({"again": self.last})

    def forward(self, x):
        return self.module["again"](self.body(x))


class Wrapper(nn.Module):
    """As DistributedDataParallel is built."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def told(model):
    model(torch.zeros(1))
    return [m.caller for m in model.modules() if isinstance(m, Told)]


def test_a_layer_is_called_by_its_path_in_the_outermost_model():
    names = ["Net.body.1.0", "Net.last"]
    net = Net()
    assert [caller.name for caller in told(net)] == names
    assert [caller.name for caller in told(Wrapper(Net()))] == names
    assert [caller.name for caller in told(nn.Sequential(Net()))] == [
        "Sequential.0.body.1.0",
        "Sequential.0.last",
    ]
    assert told(Told())[0].name == "Told"


def test_ranks_compare_paths_and_not_wrappers():
    plain, wrapped = told(Net()), told(Wrapper(Wrapper(Net())))
    assert [c.tag for c in plain] == [c.tag for c in wrapped]
    assert plain[0].tag != plain[1].tag
    assert all(0 < caller.tag < 2**20 for caller in (*plain, *told(Told())))


def test_a_name_is_looked_up_once_and_not_copied():
    net = Net()
    first = told(net)
    assert told(nn.Sequential(net)) == first
    assert told(nn.Sequential(copy.deepcopy(net)))[0].name == "Sequential.0.body.1.0"
