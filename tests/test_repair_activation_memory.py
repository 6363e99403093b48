import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.repair import activation_memory

SIZE = 8 * 4 * 10 * 10 * 4  # bytes of every activation here
THEIRS = 2 * 4 * 4  # mean and 1/σ of four channels in float32
OURS = 3 * 4 * 8  # count, mean and m2


def conv():
    return nn.Conv2d(4, 4, 3, padding=1, bias=False)


def chain(norms):
    return nn.Sequential(*(layer for norm in norms for layer in (conv(), *norm)))


def x():
    return torch.randn(8, 4, 10, 10)


class Block(nn.Module):
    """relu(norm(conv(x)) + x), spelt in the ways that people spell it."""

    def __init__(self, spelling):
        super().__init__()
        self.conv, self.spelling = conv(), spelling
        ours = spelling == "ours"
        self.norm = BatchNorm2d(4, act="relu") if ours else nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        if self.spelling == "ours":
            return self.norm(y, residual=x)
        y = self.norm(y)
        if self.spelling == "+=":
            y += x
            return F.relu(y, inplace=True)
        if self.spelling == "+":
            return torch.relu(x + y)
        return y.add(x).relu_()


def test_a_chain_keeps_two_tensors_a_layer_and_one_rematerialized():
    memory = activation_memory(chain([[BatchNorm2d(4, act="relu")]] * 3), x())
    # each norm's input and each convolution's but the first, which is the batch itself
    assert memory.kept == 5 * SIZE + 3 * OURS
    assert memory.rematerialized == memory.converted == 3 * SIZE + 3 * OURS


@pytest.mark.parametrize("inplace", [False, True])
def test_what_torch_s_layers_would_save_if_they_were_ours(inplace):
    memory = activation_memory(chain([[nn.BatchNorm2d(4), nn.ReLU(inplace)]] * 3), x())
    # the last ReLU keeps its output
    assert memory.kept == memory.rematerialized == 6 * SIZE + 3 * THEIRS
    assert memory.converted == 3 * SIZE + 3 * THEIRS


def test_an_activation_that_cannot_be_fused_saves_nothing():
    memory = activation_memory(chain([[nn.BatchNorm2d(4), nn.Softplus()], [nn.Identity()]]), x())
    # Softplus keeps its input, the norm's output, which is rebuilt; the convolution Softplus's
    assert memory.kept - memory.converted == SIZE


@pytest.mark.parametrize("spelling", ["ours", "+=", "+", "add"])
def test_a_chain_of_residual_blocks_is_rebuilt_from_its_start(spelling):
    memory = activation_memory(nn.Sequential(*(Block(spelling) for _ in range(3))), x())
    small = 3 * (OURS if spelling == "ours" else THEIRS)
    assert memory.converted == 3 * SIZE + small  # the convolutions' outputs
    assert memory.kept == (5 if spelling == "ours" else 6) * SIZE + small


def test_a_scaled_residual_cannot_be_fused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(torch.add(self.norm(self.conv(x)), x, alpha=0.5))

    memory = activation_memory(Scaled(), x())
    assert memory.converted == memory.kept


def test_a_residual_that_nobody_else_keeps_is_counted():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last, self.norm = conv(), conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.last(F.relu(self.norm(self.conv(x)) + x.detach() * 2))

    memory = activation_memory(Branch(), x())
    assert memory.converted == memory.kept  # a residual in place of the output


def test_a_compiled_model_is_refused():
    with pytest.raises(TypeError, match="cannot see into a compiled model"):
        activation_memory(torch.compile(nn.BatchNorm2d(4)), x())


def test_the_model_s_mode_and_laziness_are_left_as_they_were():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[1].train()
    memory = activation_memory(model, x())
    assert [m.training for m in model] == [False, True, False]
    assert memory.converted == memory.kept - SIZE
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        activation_memory(model, torch.randn(2, 5, 3, 3))
    assert [m.training for m in model] == [False, True, False]
