import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, LazyBatchNorm2d, Renorm
from batchnorm.repair.recalibration import passes, recalibrate, recalibration
from recalibrated import (
    STATISTICS,
    UPSTREAMS,
    Breaks,
    broken,
    entering,
    far_off,
    images,
    interrupted,
    plain,
    pooled,
    residual,
    state,
    values,
)
from strategies import tensors

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@given(tensors(), st.lists(st.integers(0, 6), max_size=4), st.sampled_from(UPSTREAMS))
def test_statistics_are_those_of_all_elements(x, cuts, upstream):
    layer = KINDS[x.ndim](x.shape[1], dtype=torch.float64)
    parts = x.tensor_split(sorted(min(c, len(x)) for c in cuts))
    if any(part[:, 0].numel() == 1 for part in parts):
        upstream = "running"  # one value has no variance to normalize with
    result = recalibrate(layer, parts, upstream=upstream)
    mean, var = pooled([x])
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-9)
    assert (result.batches, result.samples) == (len(parts), len(x))


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_means_a_million_deviations_from_zero(upstream, monkeypatch):
    monkeypatch.setitem(passes._AT_ONCE, "cpu", 200)  # several parts to a batch
    layer = BatchNorm2d(2, dtype=torch.float64)
    batches = [(torch.randn(n, 2, 7, 7).double() * 0.3 + 3e5).float() for n in (9, 2, 5)]
    recalibrate(layer, batches, upstream=upstream)
    mean, var = pooled(batches)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-10)


def test_the_pooled_variance_is_not_the_average_of_the_batches():
    batches = [torch.randn(500, 1) + mean for mean in (-3, 3)]
    ours, torchs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    recalibrate(ours, batches)
    update_bn(batches, torchs)
    _, var = pooled(batches)
    assert ours.running_var.item() == pytest.approx(var.item(), rel=1e-6)
    assert ours.running_var.item() == pytest.approx(10, rel=0.05)
    assert torchs.running_var.item() == pytest.approx(1, rel=0.1)


def test_batches_weigh_by_their_elements():
    layer = nn.BatchNorm1d(1)
    recalibrate(layer, [torch.zeros(6, 1), torch.full((2, 1), 4.0)])
    assert layer.running_mean.item() == 1.0
    assert layer.running_var.item() == pytest.approx(24 / 7)


@pytest.mark.parametrize("make", [plain, residual])
def test_upstream_running_shows_each_layer_what_inference_does(make):
    model, batches = make(), images(2, 5, 1)
    recalibrate(model, batches, upstream="running")
    assert far_off(model, batches) < 1e-6
    recalibrate(model, batches[:2])
    assert far_off(model, batches[:2]) > 0.05  # which the batches' own statistics do not


def test_upstream_batch_normalizes_with_each_batch():
    model, batches = plain(), images(4, 7)
    twin = copy.deepcopy(model)
    for layer in (twin.norm1, twin.norm2, twin.norm3):
        layer.reset_running_stats()
        layer.running_mean = layer.running_var = None
    inputs = entering(twin, batches)
    recalibrate(model, batches)
    for path, seen in inputs.items():
        mean, var = pooled(seen)
        layer = model.get_submodule(path)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-4)


def test_it_agrees_with_update_bn_where_that_is_right():
    batches = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    ours, torchs = plain().eval(), plain()
    torchs.load_state_dict(ours.state_dict())
    torchs.drop.p = 0.0
    recalibrate(ours, batches)
    update_bn(batches, torchs)
    for a, b in zip(ours.buffers(), torchs.buffers(), strict=True):
        if a.is_floating_point() and a is not ours.norm3.running_var:
            # equal batches: the means agree, and the variances but for the means' spread
            torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(ours.norm1.running_mean, torchs.norm1.running_mean)
    torch.testing.assert_close(ours.norm3.running_mean, torchs.norm3.running_mean)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    ("norm", "momentum"),
    [
        (nn.BatchNorm2d, None),
        (BatchNorm2d, 0.0),
        (nn.SyncBatchNorm, None),
        (lambda *a, **k: BatchNorm2d(*a, **k, statistics=Ghost(2)), 0.0),
        (lambda *a, **k: BatchNorm2d(*a, **k, statistics=Renorm(3.0, 5.0)), 0.1),
    ],
)
def test_every_kind_of_layer_gets_the_same(norm, momentum, upstream):
    batches = images(4, 5)
    want, got = plain(), plain(norm, momentum=momentum)
    got.load_state_dict(want.state_dict())
    for model in (want, got):
        recalibrate(model, batches, upstream=upstream)
    for path in ("norm1", "norm2", "norm3"):
        layer = got.get_submodule(path)
        assert layer.momentum == momentum
        for name in STATISTICS:
            a, b = getattr(layer, name), getattr(want.get_submodule(path), name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_layer_called_several_times_pools_its_calls():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.last = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, pair):
            return self.last(torch.stack([self.norm(self.embed(x)) for x in pair]).sum(0))

    pairs = [torch.randn(2, n, 2) + torch.tensor([[[0.0]], [[5.0]]]) for n in (4, 6)]
    for upstream in UPSTREAMS:
        model = Siamese()
        recalibrate(model, pairs, upstream=upstream, forward=lambda model, x: model(x))
        with torch.no_grad():
            mean, var = pooled([model.embed(pair).flatten(0, 1) for pair in pairs])
        np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-5)


def test_between_the_calls_of_a_layer_it_normalizes_with_the_batch():
    layer = nn.BatchNorm1d(1, affine=False)
    batches = [torch.randn(50, 1) * 3 + 5, torch.randn(50, 1) * 2 - 5]
    for upstream in UPSTREAMS:
        recalibrate(nn.Sequential(layer, nn.Identity(), layer), batches, upstream=upstream)
        normalized = [(x - x.mean()) / x.var(unbiased=False).sqrt() for x in batches]
        mean, var = pooled([*batches, *normalized])
        assert layer.running_mean.item() == pytest.approx(mean.item(), rel=1e-4)
        assert layer.running_var.item() == pytest.approx(var.item(), rel=1e-4)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_masked_elements_do_not_count(upstream):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.embed, self.after = BatchNorm1d(3), nn.Conv1d(3, 2, 1), BatchNorm1d(2)

        def forward(self, x, mask):
            return self.after(input=self.embed(self.norm(x, mask=mask)), mask=mask)

    model = Padded()
    masks = [torch.rand(n, 5) < 0.6 for n in (4, 3)]
    batches = [
        {"x": torch.where(mask[:, None], torch.randn(len(mask), 3, 5) + i, torch.nan), "mask": mask}
        for i, mask in enumerate(masks)
    ]
    recalibrate(model, batches, upstream=upstream)
    rows = [batch["x"].movedim(1, 2)[batch["mask"]] for batch in batches]
    mean, var = pooled(rows)
    np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-5)
    after = []
    with torch.no_grad():
        for seen in rows:
            own = pooled([seen])[0], seen.double().var(0, correction=0).numpy()
            mean, var = own if upstream == "batch" else pooled(rows)
            normalized = (seen.double().numpy() - mean) / np.sqrt(var + 1e-5)
            weight, bias = model.embed.weight[:, :, 0].double(), model.embed.bias.double()
            after.append(torch.from_numpy(normalized) @ weight.T + bias)
    mean, var = pooled(after)
    np.testing.assert_allclose(model.after.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.after.running_var, var, rtol=1e-5)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_nothing_but_the_statistics_changes(upstream):
    model = plain(momentum=None)
    model.train()
    model.norm2.momentum = 0.0
    model.norm3.eval()
    calls = []
    model.norm1.register_forward_hook(lambda *_: calls.append(1))
    model.norm1.num_batches_tracked.fill_(17)
    before, others, batches = state(model), values(model, STATISTICS), images(4, 3)
    random = torch.get_rng_state()
    recalibrate(model, batches, upstream=upstream)
    assert state(model) == before
    assert values(model, STATISTICS) == others
    assert model.norm1.num_batches_tracked.item() == 17
    assert torch.equal(torch.get_rng_state(), random)
    assert calls


def test_the_random_state_is_left_alone():
    model, loader = plain(), DataLoader(TensorDataset(*images(16)), batch_size=4, shuffle=True)
    random = torch.get_rng_state()
    recalibrate(model, loader)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_dropout_is_off(upstream):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    batches = images(4, 3)
    recalibrate(model, batches, upstream=upstream)
    np.testing.assert_allclose(model[1].running_var, pooled(batches)[1], rtol=1e-5)


def test_no_graph_is_recorded():
    model, seen = plain(), []
    model.register_forward_hook(lambda _, __, y: seen.append(y.requires_grad))
    recalibrate(model, images(4))
    assert seen == [False]


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("loader", KeyboardInterrupt()),
        ("model", LookupError("on purpose")),
        ("second pass", KeyboardInterrupt()),
    ],
)
def test_on_failure_the_model_is_what_it_was(place, error, upstream):
    model = plain(momentum=None)
    model.norm1.eval()
    batches = images(4, 3)
    if place == "loader":
        batches = broken(batches, error)
    else:
        after = 1 if place == "model" or upstream == "batch" else 3
        model.drop = Breaks(error, after)
        model.norm1.train()
    before, numbers = state(model), values(model)
    with pytest.raises(type(error)):
        recalibrate(model, batches, upstream=upstream)
    assert state(model) == before
    assert values(model) == numbers


def test_an_interrupt_between_two_layers_leaves_neither_changed(monkeypatch):
    model = plain()
    numbers = values(model)
    monkeypatch.setattr(recalibration, "_put", interrupted(recalibration._put, 1))
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(4, 3))
    assert values(model) == numbers


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_layer_and_batch_that_are_not_finite_are_named(bad, upstream):
    model, batches = plain(), images(4, 3, 5)
    batches[2][1, 0, 0, 0] = bad
    numbers = values(model)
    with pytest.raises(ValueError, match=r"BatchNorm2d 'norm1', batch 2 \(from 0\).*finite"):
        recalibrate(model, batches, upstream=upstream)
    assert values(model) == numbers
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"'norm2', batch 0"):
        recalibrate(model, batches[:2], upstream=upstream)


def test_shifts_are_measured_in_standard_deviations():
    layer = nn.BatchNorm1d(2, eps=1e-3)
    layer.running_mean.copy_(torch.tensor([1.0, -1.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.randn(40, 2) * torch.tensor([1.0, 3.0]) + 5
    (shift,) = recalibrate(layer, [x]).layers
    mean, var = pooled([x])
    sigma = np.sqrt(np.array([4.0, 0.25]) + 1e-3)
    moved = np.abs(mean - [1, -1]) / sigma
    ratio = np.sqrt(var + 1e-3) / sigma
    assert shift.path == ""
    assert shift.mean == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-5)
    assert shift.mean_most == pytest.approx(moved.max(), rel=1e-5)
    assert shift.std == pytest.approx(np.sqrt(ratio.prod()), rel=1e-5)
    assert shift.std_most == pytest.approx(ratio[np.abs(np.log(ratio)).argmax()], rel=1e-5)


def test_it_reads_as_a_table():
    layer = nn.BatchNorm1d(1, eps=1e-12)
    text = repr(recalibrate(nn.Sequential(layer), [torch.tensor([[3.0], [5.0]])]))
    assert text.splitlines() == [
        "Recalibration: 1 layer, 2 samples in 1 batch",
        "  layer  mean moved  at most  std    at most",
        "  0      4 σ         4 σ      ×1.41  ×1.41",
    ]


def test_the_model_itself_is_called_so():
    x = torch.tensor([[3.0], [5.0]])
    text = repr(recalibrate(nn.BatchNorm1d(1, eps=1e-12), [x]))
    assert text.splitlines()[2] == "  the model  4 σ         4 σ      ×1.41  ×1.41"


def test_a_model_built_in_inference_mode():
    with torch.inference_mode():
        model = plain()
    twin, batches = plain(), images(4, 3)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        recalibrate(net, batches)
    assert values(model) == values(twin)


def test_undo_puts_the_former_statistics_back():
    model = plain()
    model.train()(torch.randn(4, 3, 6, 6))
    before = values(model)
    buffers = dict(model.named_buffers())
    result = recalibrate(model, images(4, 3))
    assert values(model) != before
    assert all(buffers[k] is b for k, b in model.named_buffers())  # DDP and EMA hold these
    result.undo()
    assert values(model) == before


def test_broken_statistics_are_repaired():
    model = plain()
    model.norm2.running_var.fill_(torch.nan)
    shifts = {shift.path: shift for shift in recalibrate(model, images(4, 3)).layers}
    assert all(b.isfinite().all() for b in model.buffers())
    assert np.isnan(shifts["norm2"].std)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_no_batches_and_no_calls_are_refused(upstream):
    model = plain()
    numbers = values(model)
    spent = iter(images(4))
    list(spent)
    for empty in ([], spent):
        with pytest.raises(ValueError, match="at least one batch, got none"):
            recalibrate(model, empty, upstream=upstream)
    with pytest.raises(ValueError, match=r"none of the layers \['norm3', .* was called with the 2"):
        recalibrate(model, images(4, 3), forward=lambda model, x: x, upstream=upstream)
    assert values(model) == numbers


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_one_value_in_all_has_no_variance(upstream):
    mask = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="1 value per channel in all batches together"):
        recalibrate(
            BatchNorm1d(2),
            [torch.randn(1, 2, 2)],
            forward=lambda model, x: model(x, mask=mask),
            upstream=upstream,
        )


def test_nothing_to_recalibrate_is_said():
    with pytest.raises(ValueError, match="Linear has no batch norm layer with running statistics"):
        recalibrate(nn.Linear(2, 2), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match=r"where='norm9' means none of .*'norm1'"):
        recalibrate(plain(), images(4), where="norm9")
    model = plain()
    for layer in (model.norm1, model.norm2, model.norm3):
        layer.eval()
    with pytest.raises(ValueError, match=r"every batch norm layer meant is frozen .*model.eval"):
        recalibrate(model, images(4))


def test_tensors_without_values_are_refused():
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet, its module is lazy"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3), LazyBatchNorm2d()), images(4))
    with pytest.raises(ValueError, match=r"weight is on the meta device and has no values"):
        recalibrate(nn.BatchNorm2d(3, device="meta"), images(4))


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_buffers_too_narrow_for_the_data_are_refused(upstream):
    model = nn.BatchNorm1d(1, dtype=torch.float16)
    x = torch.tensor([[-250.0], [250.0]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^'the model': .* variance up to 1.25e\+05 exceed what"):
        recalibrate(model, [x], upstream=upstream)
    ours = BatchNorm1d(1).half()  # keeps float32
    recalibrate(ours, [x])
    assert ours.running_var.item() == 125_000


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_batch_too_wide_for_half_precision_does_not_reach_the_next_layer(upstream):
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).half()
    narrow, wide = (torch.tensor([[-a], [a]]).half() for a in (1.0, 400.0))
    numbers = values(model)
    with pytest.raises(ValueError, match=r"'0'.* exceed what torch.float16 buffers hold"):
        recalibrate(model, [wide, *[narrow] * 9], upstream=upstream)  # all together would fit
    assert values(model) == numbers
    recalibrate(model, [narrow, narrow / 100], upstream=upstream)
    mean, var = pooled([narrow, narrow / 100])
    assert model[0].running_mean.item() == mean.item() == 0
    assert model[0].running_var.item() == pytest.approx(var.item(), rel=1e-3)


def test_channels_elsewhere_are_refused():
    class Last(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input.movedim(-1, 1)).movedim(1, -1)

    with pytest.raises(ValueError, match=r"Last '0', batch 0 .* 3 channels .* got \(2, 5, 3\)"):
        recalibrate(nn.Sequential(Last(3)), [torch.randn(2, 5, 3)])


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"samples must be at least 1.* got 0"):
        recalibrate(nn.BatchNorm2d(3), images(4), samples=0)
    for single in (torch.randn(4, 3, 6, 6), {"x": torch.randn(4, 3)}):
        with pytest.raises(TypeError, match=r"got (Tensor|dict); put a single batch into a list"):
            recalibrate(nn.BatchNorm2d(3), single)


@pytest.mark.as_installed
def test_wrong_types():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        recalibrate(lambda x: x, images(4))
    with pytest.raises(
        ValueError, match=r"upstream must be one of \['batch', 'running'\], got 'b'"
    ):
        recalibrate(plain(), images(4), upstream="b")
    with pytest.raises(TypeError, match="got int; put a single batch"):
        recalibrate(plain(), 3)


@pytest.mark.as_installed
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_compiled_models_run_as_they_were_written(upstream):
    torch._dynamo.reset()
    want, batches = plain().eval(), images(4, 3)
    inner = copy.deepcopy(want)
    whole = torch.compile(copy.deepcopy(want), backend="eager")
    part = nn.Sequential(torch.compile(inner, backend="eager"), nn.ReLU()).eval()
    recalibrate(want, batches, upstream=upstream)
    for model in (whole, part):
        with torch.no_grad():
            model(batches[0])  # compiled before there are hooks
        assert len(recalibrate(model, batches, upstream=upstream).layers) == 3
        assert [v.tolist() for v in model.state_dict().values()] == list(values(want).values())
