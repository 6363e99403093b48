"""Tensors that are legal and rare: right, or a clear error."""

import copy

import numpy as np
import pytest
import torch

import oracle
from batchnorm import BatchNorm1d, Moments
from batchnorm.functional import batch_norm, moments, normalize, track


def misaligned(shape):
    """Values that begin at an odd address."""
    size = int(np.prod(shape)) * 4
    raw = torch.zeros(size + 1, dtype=torch.uint8)
    values = torch.frombuffer(raw.numpy().data, dtype=torch.float32, offset=1, count=size // 4)
    return values.view(shape).copy_(torch.randn(shape))


def overlapping(shape):
    """Windows that each share all but one value with the next."""
    n, c, length = shape
    return torch.randn(c, n + length).unfold(1, length, 1)[:, :n].transpose(0, 1)


ODD = {
    "one value in memory": lambda: torch.randn(1, 1, 1).expand(6, 3, 5),
    "one sample, seen often": lambda: torch.randn(1, 3, 50).expand(6, 3, 50),
    "one row for all channels": lambda: torch.randn(6, 1, 200).expand(6, 3, 200),
    "overlapping windows": lambda: overlapping((6, 3, 200)),
    "flipped": lambda: torch.randn(6, 3, 200).flip(0, 2),
    "misaligned": lambda: misaligned((6, 3, 200)),
    "misaligned, few positions": lambda: misaligned((6, 3, 7)),
    "behind an offset": lambda: torch.randn(8, 5, 200)[2:, 1:4],
    "every second channel": lambda: torch.randn(6, 6, 200)[:, ::2],
    "every second sample": lambda: torch.randn(12, 3, 200)[::2],
    "every second position": lambda: torch.randn(6, 3, 400)[..., ::2],
    "some columns": lambda: torch.randn(60, 8)[:, 2:5],
    "transposed matrix": lambda: torch.randn(3, 60).t(),
    "channels before samples": lambda: torch.randn(3, 6, 200).transpose(0, 1),
    "one channel": lambda: torch.randn(6, 1, 20, 30),
    "one channel, every second position": lambda: torch.randn(6, 1, 400)[..., ::2],
    "one channel, one value": lambda: torch.randn(6, 1, 1).expand(6, 1, 50),
    "one channel of a wider image": lambda: torch.randn(6, 20, 30, 3)[..., 1:2].permute(0, 3, 1, 2),
    "one channel, channels last": lambda: torch.randn(6, 20, 30, 1).permute(0, 3, 1, 2),
    "20,000 channels": lambda: torch.randn(3, 20_000),
    "20,000 channels, short rows": lambda: torch.randn(2, 20_000, 3),
    "70,000 samples": lambda: torch.randn(70_000, 2),
    "70,000 samples, channels last": lambda: torch.randn(70_000, 2, 2).permute(0, 2, 1),
    "one sample": lambda: torch.randn(1, 3, 5000),
    "one position": lambda: torch.randn(6, 3, 1, 1),
}


def numbers(x):
    return x.detach().double().numpy()


@pytest.mark.parametrize("odd_gradient", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_and_gradients_are_computed_right(name, odd_gradient):
    x = ODD[name]()
    dy = ODD[name]() if odd_gradient else torch.randn(x.shape)
    weight, bias = torch.randn(2, x.shape[1])
    want = oracle.batch_norm(numbers(x), numbers(dy), numbers(weight), numbers(bias), act="relu")
    x.requires_grad_()
    y, batch = batch_norm(x, weight, bias, act="relu")
    # the gradient as it is: autograd would lay a leaf's out anew
    (dx,) = torch.autograd.grad(y, x, dy)
    scale = 1 / np.sqrt(want.var.min() + 1e-5)
    np.testing.assert_allclose(numbers(y), want.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numbers(batch.mean), want.mean, rtol=1e-6, atol=1e-7)
    # where a value stands at the ReLU's kink, rounding decides
    at_kink = np.isclose(want.y, 0, atol=1e-5) & (want.y != 0)
    near = np.abs(numbers(dx) - want.dx) <= 1e-4 * np.abs(want.dx) + 2e-5 * scale
    assert (near | at_kink).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0), (4, 0, 5), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_elements_stay_without(shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(2, shape[1]).requires_grad_().unbind()
    y, batch = batch_norm(x, weight, bias, act="relu")
    assert y.shape == shape
    assert batch.count.tolist() == [0] * shape[1]
    dx, d_weight, d_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == shape
    assert torch.equal(d_weight, torch.zeros(shape[1]))
    assert torch.equal(d_bias, torch.zeros(shape[1]))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "x bias", "weight residual"])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_mix_of_tensors_that_learn(wanted, frozen):
    tensors = {
        "x": torch.randn(6, 3, 200),
        "weight": torch.randn(3),
        "bias": torch.randn(3),
        "residual": torch.randn(6, 3, 200),
    }
    dy, mean, var = torch.randn(6, 3, 200), torch.randn(3), torch.rand(3) + 0.5

    def gradients(names):
        given = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        x, residual = given["x"], given["residual"]
        if frozen:
            affine = given["weight"], given["bias"]
            y = normalize(x, mean, var, *affine, residual=residual, act="relu")
        else:
            y, _ = batch_norm(x, given["weight"], given["bias"], residual=residual, act="relu")
        return dict(zip(names, torch.autograd.grad(y, [given[n] for n in names], dy), strict=True))

    every = gradients(list(tensors))
    for name, gradient in gradients(wanted.split()).items():
        assert torch.equal(gradient, every[name])


def test_another_default_device_is_not_the_inputs():
    layer, x = BatchNorm1d(3, act="relu"), torch.randn(8, 3, requires_grad=True)
    twin = copy.deepcopy(layer)
    with torch.device("meta"):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, twin(x))
    assert torch.equal(dx, torch.autograd.grad(twin(x).sum(), x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_tensors_on_two_devices_are_named(training):
    layer = BatchNorm1d(3).train(training)
    with pytest.raises(ValueError, match="is on device cpu and the input on meta"):
        layer(torch.randn(4, 3, device="meta"))
    plain = BatchNorm1d(3, affine=False).train(training)
    with pytest.raises(ValueError, match=r"on device cpu and the (input|batch) on meta"):
        plain(torch.randn(4, 3, device="meta"))
    with pytest.raises(ValueError, match="is on device meta and the input on cpu"):
        layer.to("meta")(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("groups", "wrong"),
    [
        (1, lambda own: Moments(own.count[:2], own.mean[:2], own.m2[:2])),
        (2, lambda own: own),
        (1, lambda own: Moments(own.count, own.mean[None], own.m2)),
        (1, lambda own: Moments(own.count, own.mean.to("meta"), own.m2)),
    ],
)
@pytest.mark.as_installed
def test_moments_that_do_not_fit_are_refused(groups, wrong):
    x = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match=r"batch\.(count|mean) must have shape"):
        batch_norm(x, batch=wrong(moments(x)), groups=groups)


def test_running_statistics_on_two_devices_are_refused():
    mean, var = torch.zeros(3), torch.ones(3, device="meta")
    batch = moments(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"running mean is on device cpu.*variance on meta"):
        track(mean, var, None, batch, 0.1)
