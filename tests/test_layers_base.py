"""What the layers do beyond torch.nn, and what they do not let happen."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
from batchnorm import Batch, BatchNorm1d, BatchNorm2d, Ghost, Renorm, Running
from batchnorm.statistics.running import Untracked


@pytest.mark.parametrize("act", ["relu", nn.LeakyReLU(0.2), "gelu"], ids=str)
def test_act_and_residual_are_fused(act):
    x, residual = torch.randn(2, 4, 3, 5, 5)
    plain, fused = nn.BatchNorm2d(3), BatchNorm2d(3, act=act)
    after = {"relu": nn.ReLU(), "gelu": nn.GELU()}.get(act, act)
    for _ in range(2):
        want = after(plain(x) + residual)
        torch.testing.assert_close(fused(x, residual=residual), want)
        plain.eval(), fused.eval()


def test_mask_keeps_padding_out_of_outputs_and_running_statistics():
    lengths = torch.tensor([7, 3, 1, 5])
    mask = torch.arange(7) < lengths[:, None]
    x = torch.randn(4, 3, 7) * 2 + 3
    padded = torch.where(mask.unsqueeze(1), x, 1e6)
    layer = BatchNorm1d(3, momentum=1.0)
    y = layer(padded, mask=mask)
    want = oracle.batch_norm(x, x, mask=mask)
    np.testing.assert_allclose(y.detach(), want.y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_mean, want.mean, rtol=1e-5)
    unbiased = want.var * want.count / (want.count - 1)
    np.testing.assert_allclose(layer.running_var, unbiased, rtol=1e-5)
    layer.eval()
    y = layer(padded, mask=mask)
    assert torch.all(y[~mask.unsqueeze(1).expand_as(y)] == 0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("statistics", [Batch(), Ghost(2), Renorm(2.0, 1.0)], ids=repr)
def test_a_batch_without_finite_statistics_is_not_counted(poison, statistics):
    layer = BatchNorm1d(3, statistics=statistics)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3)
    x[0, 1], x[1, 1] = poison, -poison
    layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 2
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_running_statistics_stay_float32_in_half_precision(cast):
    layer = BatchNorm1d(2)
    layer.running_mean.fill_(1 + 2**-20)  # bfloat16 would round it away
    getattr(layer, cast)()
    assert layer.weight.dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.running_mean[0].item() == 1 + 2**-20
    assert layer.double().running_mean.dtype == torch.float64
    built = BatchNorm1d(2, dtype=torch.bfloat16)
    assert (built.weight.dtype, built.running_var.dtype) == (torch.bfloat16, torch.float32)


def test_running_statistics_learn_in_bfloat16():
    """In torch.nn the running mean stays at 1.0 after 200 steps of data at 1.0078."""
    x = torch.full((4, 1), 1.0078125, dtype=torch.bfloat16)
    theirs, ours = nn.BatchNorm1d(1).bfloat16(), BatchNorm1d(1).bfloat16()
    for layer in (theirs, ours):
        layer.running_mean.fill_(1.0)
        for _ in range(200):
            layer(x)
    assert theirs.running_mean.item() == 1.0
    assert ours.running_mean.item() == pytest.approx(1.0078125, abs=1e-6)


@pytest.mark.parametrize("assign", [True, False])
def test_a_half_precision_checkpoint_does_not_narrow_the_statistics(assign):
    state = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in BatchNorm1d(2).state_dict().items()
    }
    layer = BatchNorm1d(2)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpoint_counts_a_batch_once(reentrant, momentum):
    x = torch.randn(8, 3, 4, 4)
    body = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3, momentum=momentum, act="relu"))
    plain = copy.deepcopy(body)
    for _ in range(3):
        plain(x.requires_grad_()).square().sum().backward()
        checkpoint(body, x, use_reentrant=reentrant).square().sum().backward()
    assert body[1].num_batches_tracked.item() == 3
    want = plain.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in body.state_dict().items())
    for a, b in zip(body.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_checkpoint_whose_input_needs_no_gradient_still_counts():
    body = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3))
    checkpoint(body, torch.randn(8, 3, 4, 4), use_reentrant=False).sum().backward()
    assert body[1].num_batches_tracked.item() == 1
    assert body[1].running_mean.abs().sum() > 0


def test_freeze_survives_train_deepcopy_and_pickling():
    layer = BatchNorm2d(3, act="relu", statistics=Ghost(2))
    layer(torch.randn(4, 3, 2, 2) * 3 + 1)
    layer.bias.requires_grad_(False)
    assert layer.freeze() is layer
    frozen = copy.deepcopy(layer).train()
    before = copy.deepcopy(frozen.state_dict())
    x = torch.randn(1, 3, 1, 1)  # one value: no statistics are computed
    y = frozen.train()(x)
    assert torch.equal(y, frozen.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert "statistics=Running()" in repr(frozen)
    frozen.freeze().unfreeze()  # freezing twice is freezing once
    assert frozen.statistics == Ghost(2)
    assert [p.requires_grad for p in frozen.parameters()] == [True, False]
    assert frozen.unfreeze().statistics == Ghost(2)


def test_switches_are_set_anew_and_taken_back_as_they_first_were():
    layer = BatchNorm1d(3, statistics=Ghost(2))
    layer.bias.requires_grad_(False)
    layer.freeze().freeze(statistics="batch", learns=True)
    assert layer.statistics == Untracked(Ghost(2))
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    assert layer.freeze(statistics="batch", updates=True).statistics == Ghost(2)
    assert layer.freeze(updates=True).statistics == Running(updates=True)
    assert "statistics=Running(updates=True)" in repr(layer)
    assert layer.unfreeze().statistics == Ghost(2)
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    plain = BatchNorm1d(3, statistics=Running())
    assert plain.freeze(statistics="batch", updates=True).statistics == Batch()
    untracked = BatchNorm1d(3, statistics=Untracked(Renorm()))
    assert untracked.freeze(statistics="batch", updates=True).statistics == Renorm()


def test_running_statistics_that_are_used_may_follow_the_batches():
    layer, plain = BatchNorm1d(3, statistics=Running(updates=True)), nn.BatchNorm1d(3)
    for scale in (1, 5):
        x = torch.randn(6, 3, 4) * scale + 1
        want = copy.deepcopy(plain).eval()(x)  # as it was before this batch
        torch.testing.assert_close(layer(x), want)
        plain(x)
        for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1], [3], [0], [2]])
    padded = torch.where(mask.unsqueeze(1), x, 1e6)
    masked = BatchNorm1d(3, statistics=Running(updates=True))
    masked(padded, mask=mask)
    normal = BatchNorm1d(3)
    normal(padded, mask=mask)
    assert torch.equal(masked.running_var, normal.running_var)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(1, 3))  # one value has no variance: nothing to follow
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(torch.randn(0, 3))  # as torch.nn counts it
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("policy", [Batch(), Ghost(2), Renorm(2.0, 1.0)], ids=repr)
def test_an_untracked_policy_computes_the_same_and_moves_nothing(policy):
    layer = BatchNorm1d(3, statistics=Untracked(policy))
    plain = BatchNorm1d(3, statistics=policy)
    x = torch.randn(6, 3) * 2 + 1
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with pytest.raises(ValueError, match="1 value per channel"):
        layer(x[:1])
    if policy.needs_running:
        with pytest.raises(ValueError, match="this layer has none"):
            BatchNorm1d(3, track_running_stats=False, statistics=Untracked(policy))


@pytest.mark.parametrize("policy", [Running(updates=True), Untracked(Ghost(2))], ids=repr)
@pytest.mark.as_installed
def test_the_frozen_policies_compile_whole_and_export(policy):
    torch._dynamo.reset()
    layer = BatchNorm1d(3, act="relu", statistics=policy)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        x = (torch.randn(6, 3) * 2 + 1).requires_grad_()
        y, want = compiled.train(training)(x), layer.train(training)(x)
        torch.testing.assert_close(y, want)
        gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (y, want)]
        torch.testing.assert_close(*gradients)
        for a, b in zip(compiled.buffers(), layer.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    program = torch.export.export(copy.deepcopy(layer.train()), (x.detach(),)).module()
    torch.testing.assert_close(program(x), layer(x))
    torch.testing.assert_close(program.running_var, layer.running_var)


def test_freezing_lets_go_of_gradients():
    """An optimizer steps along those that are left, and decays by a zero one."""
    layer = BatchNorm1d(3)
    layer(torch.randn(4, 3)).square().sum().backward()
    layer.freeze(learns=True)
    assert layer.weight.grad is not None
    layer.freeze()
    assert layer.weight.grad is layer.bias.grad is None


def test_a_frozen_layer_passes_gradients_to_its_input():
    layer = BatchNorm1d(3).freeze()
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), (1 + 1e-5) ** -0.5))


@pytest.mark.parametrize("policy", [Ghost(2), Renorm(3.0, 5.0), Batch()], ids=repr)
def test_policies_have_no_effect_at_inference(policy):
    layer, plain = BatchNorm1d(3, statistics=policy), nn.BatchNorm1d(3)
    x = torch.randn(6, 3) * 2 + 1
    layer(x), plain(x)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    if not policy.needs_running:
        untracked = BatchNorm1d(3, statistics=policy, track_running_stats=False).eval()
        torch.testing.assert_close(
            untracked(x), nn.BatchNorm1d(3, track_running_stats=False).eval()(x)
        )


def test_ghost_running_statistics_are_the_whole_batch_s():
    x = torch.randn(7, 3, 4) * torch.arange(1.0, 8.0).view(7, 1, 1)
    ghost, plain = BatchNorm1d(3, statistics=Ghost(3)), BatchNorm1d(3)
    ghost(x), plain(x)
    torch.testing.assert_close(ghost.running_mean, plain.running_mean)
    torch.testing.assert_close(ghost.running_var, plain.running_var)


def test_a_channel_far_from_zero_normalizes_and_tracks_in_float32():
    x = torch.randn(64, 2, 16, 16) * 0.3 + 3000
    layer = BatchNorm2d(2, momentum=1.0)
    y = layer(x)
    assert y.mean().abs().item() < 1e-5
    assert y.std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(
        layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0
    )


def test_gamma_zero_and_negative_are_legal():
    layer = BatchNorm1d(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, -2.0]))
    x = torch.randn(4, 2, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert torch.all(y[:, 0] == 0)
    assert torch.all(x.grad[:, 0] == 0)
    want = oracle.batch_norm(x.detach(), 2 * y.detach(), [0.0, -2.0])
    np.testing.assert_allclose(layer.weight.grad, want.d_weight, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_the_input_s_dtype():
    layer = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, act="relu"))
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer[1].weight.grad.dtype == torch.float32
    assert layer[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(y.float().mean((0, 2, 3)) > 0, torch.ones(4, dtype=torch.bool))


def test_meta_device_and_to_empty():
    layer = BatchNorm2d(3, device="meta", dtype=torch.bfloat16)
    assert layer.running_mean.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", [Batch(), Ghost(2), Ghost(3), Running()], ids=repr)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("behind", ["relu", "add", "dropout"])
def test_what_follows_may_work_in_place(training, statistics, layout, behind):
    """ReLU(inplace=True), `out += identity`: what most networks have behind a batch norm."""
    layer = BatchNorm2d(3, statistics=statistics).train(training)
    x = torch.randn(8, 3, 4, 5).to(memory_format=layout).requires_grad_()
    gradients = []
    for in_place in (True, False):
        copied = copy.deepcopy(layer)
        y = copied(x)
        torch.manual_seed(1)
        if behind == "relu":
            y = nn.ReLU(inplace=in_place)(y)
        elif behind == "dropout":
            y = nn.Dropout(inplace=in_place)(y)
        elif in_place:
            y += x
        else:
            y = y + x
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_an_eval_pass_may_be_differentiated_after_the_statistics_moved():
    layer = BatchNorm1d(3).eval()
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x)
    layer.train()(torch.randn(8, 3) * 9)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full((8, 3), (1 + 1e-5) ** -0.5))


def test_the_counter_is_counted_in_place():
    layer = BatchNorm1d(3)
    counter = layer.num_batches_tracked
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked is counter
    assert counter.item() == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_may_be_without_its_counter(momentum):
    results = []
    for norm in (nn.BatchNorm1d, BatchNorm1d):
        layer = norm(3, momentum=momentum)
        layer.num_batches_tracked = None
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        y = layer(x)
        results.append((y, layer.running_var, layer.eval()(x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_channels_are_those_of_the_tensors_not_of_num_features():
    """Pruning slices the tensors and leaves the attribute; torch.nn never looks at it."""
    for norm in (nn.BatchNorm1d, BatchNorm1d):
        layer = norm(4)
        layer.weight, layer.bias = (nn.Parameter(p[:3]) for p in (layer.weight, layer.bias))
        layer.running_mean, layer.running_var = layer.running_mean[:3], layer.running_var[:3]
        assert layer(torch.randn(5, 3)).shape == (5, 3)
        assert norm(1, affine=False, track_running_stats=False)(torch.randn(5, 3)).shape == (5, 3)


@pytest.mark.parametrize("policy", [Batch(), Ghost(2), Renorm(2.0, 1.0), Running()], ids=repr)
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_gamma_zero_is_legal_for_every_policy_and_twice_differentiable(policy, act):
    layer = BatchNorm1d(2, statistics=policy, act=act).double()
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.5)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.all(dx == 0)
    (second,) = torch.autograd.grad(dx.sum(), layer.weight)
    assert second.isfinite().all()
    assert torch.all(y == y[0])


def test_the_running_variance_is_not_debiased():
    """One step from 1 towards 0.9 is 0.99, not a first estimate scaled up to 99.9."""
    x = torch.tensor([[-1.0], [1.0], [0.0]]) * 0.9**0.5
    layer = BatchNorm1d(1)
    layer(x)
    assert layer.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 0.9)


def test_values_near_1e30_are_normalized_with_gradients():
    x = (torch.randn(16, 3) * 1e30).requires_grad_()
    dy = torch.randn(16, 3)
    y = BatchNorm1d(3)(x)
    want = oracle.batch_norm(x.detach(), dy)
    np.testing.assert_allclose(y.detach(), want.y, atol=1e-5)
    (dx,) = torch.autograd.grad(y, x, dy)
    np.testing.assert_allclose(dx, want.dx, rtol=1e-4, atol=1e-35)


def test_a_policy_set_later_is_checked_when_it_is_used():
    layer = BatchNorm1d(3, track_running_stats=False)
    layer.statistics = Running()
    with pytest.raises(ValueError, match="this layer has none"):
        layer(torch.randn(4, 3))


BAD = [
    (ValueError, r"BatchNorm2d\(3\) expects 3 channels in dimension 1, got .*\(2, 4, 5, 5\)",
     lambda: BatchNorm2d(3)(torch.randn(2, 4, 5, 5))),
    (ValueError, r"expected 4D input \(got 3D input\)",
     lambda: BatchNorm2d(3)(torch.randn(2, 3, 5))),
    (TypeError, r"floating point input, got torch.int64",
     lambda: BatchNorm2d(3)(torch.ones(2, 3, 5, 5, dtype=torch.int64))),
    (ValueError, r"mask must have shape .* = \(2, 5, 5\)",
     lambda: BatchNorm2d(3)(torch.randn(2, 3, 5, 5), mask=torch.ones(2, 5) > 0)),
    (ValueError, "act must be one of identity, relu", lambda: BatchNorm2d(3, act="softplus")),
    (ValueError, "at least 2 samples", lambda: BatchNorm2d(3, statistics=Ghost(1))),
    (TypeError, r"statistics must be a policy such as Batch\(\)",
     lambda: BatchNorm2d(3, statistics="ghost")),
    (ValueError, "construct it with track_running_stats=True",
     lambda: BatchNorm2d(3, track_running_stats=False, statistics=Running())),
    (ValueError, "this layer has none",
     lambda: BatchNorm2d(3, track_running_stats=False).freeze()),
    (TypeError, "whole number of samples, got 2.5", lambda: Ghost(2.5)),
    (TypeError, "mask must be a tensor, got list",
     lambda: BatchNorm1d(3)(torch.randn(2, 3), mask=[True, False])),
    (ValueError, "residual is on device meta and the input on cpu",
     lambda: BatchNorm1d(3)(torch.randn(2, 3), residual=torch.ones(2, 3, device="meta"))),
    (ValueError, r"Ghost\(size=2\), whose last slice is one sample.*drop_last=True",
     lambda: BatchNorm1d(3, statistics=Ghost(2))(torch.randn(5, 3))),
    (ValueError, r"got input size \(1, 3\) .*its variance is 0.*drop_last=True.*freeze\(\)",
     lambda: BatchNorm1d(3)(torch.randn(1, 3))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1] for b in BAD])
@pytest.mark.as_installed
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
