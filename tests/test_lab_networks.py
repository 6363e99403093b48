"""Networks take any norm, and what a norm is called is what it does."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, Renorm
from batchnorm.lab.networks import (
    Perceptron,
    PlainNetwork,
    RecurrentPolicy,
    ResidualNetwork,
    Sequence,
    Transformer,
    norm_of,
)


def test_norms_are_what_they_are_called():
    x = torch.randn(32, 8, 4, 4, dtype=torch.float64) * 3 + 2
    for kind, axes in (("batch", (0, 2, 3)), ("instance", (2, 3)), ("layer", (1, 2, 3))):
        y = norm_of(kind)(8).double()(x)
        assert y.mean(axes).abs().max() < 1e-9
        assert (y.var(axes, correction=0) - 1).abs().max() < 1e-4
    grouped = norm_of("group")(8).double()(x).reshape(32, 2, 4 * 16)
    assert grouped.mean(2).abs().max() < 1e-9
    slices = norm_of("ghost")(8).double()(x).reshape(2, 16, 8, 16)
    assert slices.mean((1, 3)).abs().max() < 1e-9
    assert norm_of("ghost")(8).statistics == Ghost(16)
    assert norm_of("renorm")(8).statistics == Renorm()
    assert norm_of("none") is None


def test_features_and_sequences_have_their_channels_last():
    x = torch.randn(5, 7, 8, dtype=torch.float64) * 3 + 2
    batch, layer = (norm_of(kind, of="sequences")(8).double() for kind in ("batch", "layer"))
    assert isinstance(batch, Sequence)
    assert batch(x).mean((0, 1)).abs().max() < 1e-9
    assert layer(x).mean(2).abs().max() < 1e-9
    assert torch.equal(batch(x)[0, 0], BatchNorm1d(8).double()(x.flatten(0, 1))[0]) or (
        (batch(x)[0, 0] - BatchNorm1d(8).double()(x.flatten(0, 1))[0]).abs().max() < 1e-12
    )
    assert isinstance(norm_of("batch", of="features")(8), BatchNorm1d)
    assert isinstance(norm_of("layer", of="features")(8), nn.LayerNorm)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="got 'weight'"):
        norm_of("weight")


def layers(network, kind):
    return [m for m in network.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("depth", [2, 5, 20])
def test_a_plain_network_is_as_deep_as_it_says(depth):
    network = PlainNetwork(norm_of("batch"), depth=depth)
    convolutions = layers(network, nn.Conv2d)
    assert len(convolutions) == len(layers(network, BatchNorm2d)) == depth
    assert all(conv.bias is None for conv in convolutions)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    small = 4 if depth == 2 else 2  # with two, the first could only halve what comes in
    assert network.features(torch.randn(2, 1, 8, 8)).shape == (2, 16, small, small)
    bare = PlainNetwork(None, depth=depth)
    assert all((conv.bias == 0).all() for conv in layers(bare, nn.Conv2d))


def test_gain_scales_he_s_weights():
    convs = []
    for gain in (1.0, 3.0):
        torch.manual_seed(0)
        convs.append(layers(PlainNetwork(None, depth=3, width=64, gain=gain), nn.Conv2d)[2].weight)
    assert torch.allclose(convs[1], 3 * convs[0])
    assert float(convs[0].detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    linear = layers(Perceptron(None, inputs=64, width=256, gain=0.5), nn.Linear)[1].weight
    assert float(linear.detach().std()) == pytest.approx(0.5 * (2 / 256) ** 0.5, rel=0.02)


def test_a_residual_network_adds_what_came_in():
    network = ResidualNetwork(None, blocks=3)
    assert network(torch.randn(2, 1, 14, 14)).shape == (2, 10)
    assert network.head.in_features == 32
    block = network.blocks[0]
    with torch.no_grad():
        for weight in block.conv2.parameters():
            weight.zero_()
    x = torch.rand(2, 8, 8, 8)
    assert torch.equal(block(x), x)  # positive, so that the ReLU passes it


def test_the_transformer_looks_back_only():
    network = Transformer(norm_of("layer", of="sequences"), symbols=11, length=6)
    x = torch.randint(11, (2, 6))
    other = x.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    ours, theirs = network(x), network(other)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert not torch.allclose(ours[:, 4:], theirs[:, 4:])
    assert network(x[:, :3]).shape == (2, 3, 11)


def test_the_policy_remembers():
    policy = RecurrentPolicy(norm_of("layer", of="features"))
    seen, empty = torch.randn(3, 2), torch.zeros(3, 32)
    action, memory = policy(seen, empty)
    assert action.shape == (3,)
    assert memory.abs().max() <= 1
    assert not torch.allclose(policy(seen, memory)[0], action)
