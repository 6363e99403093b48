import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, Renorm, Running
from batchnorm.repair.adaptation import Cap, adapt
from batchnorm.repair.freezing import freeze
from strategies import tensors

FREE = {"cap": None}
DIMS = {2: (0,), 3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def source(layer, seed=0):
    """A layer in eval mode with statistics, γ and β of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (layer.running_mean, layer.weight, layer.bias):
        tensor.data.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 4, generator=generator)
    return layer.eval()


def statistics(x):
    """The batch's mean and biased variance by NumPy, (c,) each."""
    rows = np.moveaxis(np.asarray(x, dtype=np.float64), 1, 0).reshape(x.shape[1], -1)
    return rows.mean(1), rows.var(1)


def mixed(layer, mean, var, n, prior):
    """Schneider et al. 2020, eq. 1."""
    share = 1.0 if prior == 0 else n / (prior + n)
    held = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    return [(1 - share) * s + share * t for s, t in zip(held, (mean, var), strict=True)]


def expected(layer, x, mean, var, n, prior, **options):
    frozen = mixed(layer, mean, var, n, prior)
    weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
    options = {"eps": layer.eps, **options}
    zeros = np.zeros(x.shape)
    return oracle.batch_norm(x, zeros, weight, bias, frozen=frozen, **options).y


def assert_gives(output, want, rtol=1e-9):
    output = output.detach().double().numpy()
    np.testing.assert_allclose(output, want, rtol=rtol, atol=rtol * np.abs(want).max())


def close(layers, others):
    for a, b in zip(layers, others, strict=True):
        assert a.mean == pytest.approx(b.mean, rel=1e-9)
        assert a.std == pytest.approx(b.std, rel=1e-9)
        assert a.remembered == b.remembered


@given(tensors(max_ratio=10), st.sampled_from([0, 0.5, 4, 16]))
def test_a_batch_is_normalized_by_the_papers_mixture(x, prior):
    layer = source(KINDS[x.ndim](x.shape[1]).double())
    with adapt(layer, prior=prior, memory=None, **FREE):
        y = layer(x)
    assert_gives(y, expected(layer, x, *statistics(x), len(x), prior), 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        BatchNorm2d,
        lambda c: BatchNorm2d(c, statistics=Ghost(2)),
        lambda c: BatchNorm2d(c, statistics=Renorm(2.0, 1.0)),
        lambda c: BatchNorm2d(c, statistics=Running()),
    ],
)
def test_layers_of_every_kind_mix_alike(make):
    layer, x = source(make(3).double()), torch.randn(5, 3, 4, 4, dtype=torch.float64) * 3 + 2
    with adapt(layer, prior=4, memory=None, **FREE):
        assert_gives(layer(x), expected(layer, x, *statistics(x), 5, 4))


def test_without_a_prior_it_is_the_batch_and_with_all_of_it_the_source_to_the_bit():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4, act="relu"), nn.Conv2d(4, 4, 3))
    model.append(source(nn.BatchNorm2d(4))).eval()
    x = torch.randn(6, 1, 8, 8) * 3 + 1
    plain, trained = model(x), copy.deepcopy(model).train()(x)
    with adapt(model, prior=0, memory=None, **FREE):
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    with adapt(model, prior=math.inf, memory=None) as adaptation:
        assert torch.equal(model(x), plain)
        assert [layer.samples for layer in adaptation.layers] == [6, 6]
        assert [layer.mean for layer in adaptation.layers] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d])
def test_narrow_dtypes_and_means_that_dwarf_the_spread(dtype, kind):
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    x = 3001 + 0.3 * x if dtype == torch.float32 else x + 2
    layer = source(kind(3))
    if dtype == torch.float32:
        layer.running_mean.fill_(3000.0)
        layer.running_var.fill_(0.09)
    layer, x = layer.to(dtype), x.to(dtype)
    want = expected(layer, x.double(), *statistics(x.double()), 8, 4)
    with adapt(layer, prior=4, memory=None, **FREE):
        y = layer(x)
    assert y.dtype == dtype
    rtol = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    assert_gives(y, want, rtol)


def test_a_stream_is_pooled_element_by_element():
    layer = source(nn.BatchNorm2d(3).double())
    batches = [torch.randn(n, 3, p, p).double() * n + n for n, p in ((4, 3), (1, 7), (9, 2))]
    with adapt(layer, prior=5, memory=math.inf, **FREE) as adaptation:
        outputs = [layer(x) for x in batches]
    rows = np.concatenate([np.moveaxis(x.numpy(), 1, 0).reshape(3, -1) for x in batches], axis=1)
    want = expected(layer, batches[-1], rows.mean(1), rows.var(1), 14, 5)
    assert_gives(outputs[-1], want)
    # not a mean of variances: the batches' means lie 1 to 9 apart
    assert np.abs(np.mean([statistics(x)[1] for x in batches], 0) / rows.var(1) - 1).min() > 0.1
    (drift,) = adaptation.layers
    mean, var = mixed(layer, rows.mean(1), rows.var(1), 14, 5)
    sigma = np.sqrt(layer.running_var.numpy() + layer.eps)
    off = (mean - layer.running_mean.numpy()) / sigma
    assert drift.samples == drift.remembered == 14
    assert drift.mean == pytest.approx(np.sqrt(np.mean(off**2)))
    assert drift.std == pytest.approx(np.exp(np.mean(np.log(np.sqrt(var + layer.eps) / sigma))))


@pytest.mark.parametrize("positions", [(), (5,), (3, 3)])
def test_samples_one_by_one_end_where_their_batch_does(positions):
    x = torch.randn(7, 3, *positions, dtype=torch.float64) * 2 + 1
    layer = source(KINDS[x.ndim](3).double())
    with adapt(layer, prior=4, **FREE) as batch:
        want = layer(x)
        whole = batch.layers
    with adapt(layer, prior=4, **FREE) as stream:
        outputs = [layer(sample) for sample in x.split(1)]
        close(stream.layers, whole)
    torch.testing.assert_close(outputs[-1], want[-1:])
    assert (outputs[0] - want[:1]).abs().max() > 0.01  # which knew less


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_older_samples_make_room(sizes, memory):
    generator = torch.Generator().manual_seed(sum(sizes))
    layer = source(nn.BatchNorm1d(2).double())
    data, weights = np.zeros((0, 2, 4)), np.zeros(0)
    with adapt(layer, prior=3, memory=memory, **FREE):
        for number, n in enumerate(sizes):
            x = torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) + number
            y = layer(x)
            left = min(weights.sum(), max(memory - n, 0))
            weights *= left / weights.sum() if weights.sum() else 1
            data, weights = np.concatenate([data, x]), np.concatenate([weights, np.ones(n)])
    if weights.sum() > 0 and sizes[-1]:
        each = weights[:, None, None] / weights.sum() / 4
        mean = (each * data).sum((0, 2))
        var = (each * (data - mean[:, None]) ** 2).sum((0, 2))
        want = expected(layer, x, mean, var, weights.sum(), 3)
        assert_gives(y, want)


def test_the_cap_holds_the_mean_and_the_deviation_and_says_how_often():
    layer = nn.BatchNorm1d(4, affine=False).eval().double()
    x = torch.randn(50, 4, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    x = x * torch.tensor([1.0, 9.0, 0.01, 1.0]) + torch.tensor([0.2, 0.0, 0.0, -7.0])
    with adapt(layer, prior=0, memory=None, cap=Cap(mean=0.5, std=2)) as adaptation:
        y = layer(x)
        (drift,) = adaptation.layers
    want = (x - torch.tensor([0.2, 0.0, 0.0, -0.5])) / torch.tensor([1.0, 2.0, 0.5, 1.0])
    torch.testing.assert_close(y, want.double(), rtol=1e-4, atol=1e-4)
    assert drift.capped == 3 / 4
    assert drift.mean == pytest.approx(math.sqrt((0.2**2 + 0.5**2) / 4), rel=1e-4)
    with adapt(layer, prior=0, memory=None, **FREE) as adaptation:
        assert layer(x).var(0, unbiased=False)[1] == pytest.approx(1.0, rel=1e-4)
        assert adaptation.layers[0].capped == 0


def test_a_broken_frame_enters_as_far_out_as_the_cap_lets_it():
    layer = nn.BatchNorm1d(2, affine=False, eps=0.0).eval().double()
    frame, x = torch.tensor([[3000.0], [5000.0]]).expand(2, 2).double(), torch.randn(6, 2).double()
    with adapt(layer, prior=8, memory=math.inf, cap=Cap(mean=1, std=2)):
        layer(frame)
        y = layer(x)
    rows = x.numpy()
    # as two samples of mean 1 and variance 4, whatever they were
    mean = (2 * 1 + 6 * rows.mean(0)) / 8
    m2 = 2 * 4 + ((rows - rows.mean(0)) ** 2).sum(0) + 2 * (1 - mean) ** 2
    m2 += 6 * (rows.mean(0) - mean) ** 2
    assert_gives(y, (rows - mean / 2) / np.sqrt((1 + m2 / 8) / 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_does_not_enter(value):
    layer, x = source(nn.BatchNorm1d(3)), torch.randn(6, 3)
    broken = torch.randn(4, 3)
    broken[1, 2] = value
    with adapt(layer) as adaptation:
        layer(x)
        want = layer(x)
    with adapt(layer) as adaptation:
        layer(x)
        given_back = layer(broken)
        assert torch.equal(layer(x), want)
        (drift,) = adaptation.layers
    assert (drift.samples, drift.skipped) == (12, 1)
    assert given_back[:, :2].isfinite().all()  # by what the stream was before
    with adapt(layer) as adaptation:
        layer(broken)
        assert adaptation.layers[0].mean == 0


def network(act="relu"):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), BatchNorm2d(4, act=act), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 16, 3),
    )  # fmt: skip
    source(model[1], 1)
    source(model[3], 2)
    return model.eval()


def test_the_model_stays_what_it_was_to_the_bit():
    model, x = network(), torch.randn(4, 1, 8, 8) * 3
    before, plain = copy.deepcopy(model.state_dict()), model(x)
    with adapt(model) as adaptation:
        adapted = model(x)
        assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert (adapted - plain).abs().max() > 0.001
    assert torch.equal(model(x), plain)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    adaptation.remove()  # again
    with pytest.raises(KeyboardInterrupt), adapt(model):
        raise KeyboardInterrupt
    assert torch.equal(model(x), plain)


def test_a_layer_whose_forward_stops_is_left_alone():
    class Stops(nn.BatchNorm1d):
        def forward(self, x):
            raise KeyboardInterrupt

    layer = source(Stops(3))
    before = copy.deepcopy(layer.state_dict())
    adapt(layer)
    with pytest.raises(KeyboardInterrupt):
        layer(torch.randn(4, 3))
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_gives_the_same(guard):
    model, batches = network(), torch.randn(3, 4, 1, 8, 8) * 2 + 1
    with adapt(model):
        want = [model(x) for x in batches]
    with adapt(model):
        with guard():
            outputs = [model(x) for x in batches[:2]]
        outputs.append(model(batches[2]))
        outputs[-1].sum().backward()
    for got, expected_output in zip(outputs, want, strict=True):
        torch.testing.assert_close(got, expected_output, rtol=1e-5, atol=1e-5)


def test_gradients_run_through_the_statistics():
    layer = source(nn.BatchNorm1d(3).double())
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(layer).train()
    (want,) = torch.autograd.grad(twin(x).pow(3).sum(), x)
    with adapt(layer, prior=0, memory=None, **FREE):
        (got,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
        torch.testing.assert_close(got, want)
    with adapt(layer, prior=4, memory=None, **FREE):
        assert torch.autograd.gradcheck(layer, (x,))


def test_what_a_layer_fuses_stays_and_masked_values_do_not_count():
    layer = source(BatchNorm1d(3, act="relu").double())
    x, residual = torch.randn(2, 6, 3, 5, dtype=torch.float64) * 2 + 1
    mask = torch.rand(6, 5) < 0.6
    mask[0] = False  # a sample that is not there
    with adapt(layer, prior=4, memory=None, **FREE) as adaptation:
        y = layer(x, residual=residual)
        want = expected(layer, x, *statistics(x), 6, 4, residual=residual, act="relu")
        assert_gives(y, want)
        y = layer(input=x, residual=residual, mask=mask)
    rows = np.moveaxis(x.numpy(), 1, 0)[:, mask.numpy()]
    want = expected(
        layer, x, rows.mean(1), rows.var(1), 5, 4, residual=residual, act="relu", mask=mask
    )
    assert_gives(y, want)
    assert adaptation.layers[0].samples == 6 + 5


def test_streams_are_apart_and_are_reset_one_by_one():
    layer = source(nn.BatchNorm1d(3).double())
    day, night = (
        torch.randn(2, 4, 5, 3, dtype=torch.float64)
        * torch.tensor([1.0, 3.0])[:, None, None, None].double()
    )
    wants = []
    for batches in (day, night):
        with adapt(layer):
            wants.append([layer(x) for x in batches])
    with adapt(layer) as adaptation:
        for number in range(4):
            for name, batches, want in (("day", day, wants[0]), ("night", night, wants[1])):
                with adaptation.stream(name):
                    assert torch.equal(layer(batches[number]), want[number])
                    assert adaptation.layers[0].samples == 5 * (number + 1)
        assert adaptation.streams == ("day", "night")
        adaptation.reset("day")
        assert adaptation.streams == ("night",)
        with adaptation.stream("day"):
            assert torch.equal(layer(day[0]), wants[0][0])
        adaptation.reset()
        assert adaptation.streams == ()
        assert torch.equal(layer(day[0]), wants[0][0])
        assert adaptation.streams == ("main",)


def test_threads_have_streams_of_their_own():
    layer, x = source(nn.BatchNorm1d(3)), torch.randn(4, 3)
    adaptation, seen = adapt(layer), {}

    def serve(name, times):
        with adaptation.stream(name):
            for _ in range(times):
                layer(x)
            seen[name] = adaptation.layers[0].samples

    with adaptation.stream("outer"):
        threads = [threading.Thread(target=serve, args=(str(n), n)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert adaptation.layers[0].samples == 0
    assert seen == {"1": 4, "2": 8, "3": 12}


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_goes_on_by_itself(copied):
    model, batches = network(), torch.randn(3, 4, 1, 8, 8) + 2
    adaptation = adapt(model)
    model(batches[0])
    twin = copied(model)
    want = model(batches[1])
    assert torch.equal(twin(batches[1]), want)
    twin(batches[2])
    assert adaptation.layers[0].samples == 8
    clone, handle = copied((model, adaptation))
    handle.remove()
    assert torch.equal(clone(batches[0]), network()(batches[0]))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm1d])
@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_layers_are_adapted_in_eval_mode_alone(kind, frozen_first):
    model, x = nn.Sequential(source(kind(3))), torch.randn(32, 3) + 4
    want = model(x).detach()
    if frozen_first:
        freeze(model)
        adaptation = adapt(model)
    else:
        adaptation = adapt(model)
        freeze(model)
    model.train()
    torch.testing.assert_close(model(x), want)  # with the running statistics, as frozen
    assert adaptation.layers[0].samples == 0
    with pytest.raises(ValueError, match="'0' is in training mode"):
        adaptation(x)
    model.eval()
    assert (adaptation(x) - want).abs().max() > 0.1
    assert adaptation.layers[0].samples == 32


def test_a_layer_that_is_the_model_is_called_so():
    layer = source(nn.BatchNorm1d(2))
    adaptation = adapt(layer, prior=0, memory=None)
    assert "\n  the model  0" in repr(adaptation)
    for call, says in (
        (lambda: adapt(layer), "'the model' is adapted already"),
        (lambda: adaptation(torch.ones(1, 2)), "'the model' is given one value per channel"),
        (lambda: layer.train() and adaptation(torch.ones(3, 2)), "'the model' is in training"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_training_goes_on_as_ever():
    model, x = network(), torch.randn(4, 1, 8, 8)
    twin = copy.deepcopy(model)
    adaptation = adapt(model)
    assert torch.equal(model.train()(x), twin.train()(x))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    assert [layer.samples for layer in adaptation.layers] == [0, 0]
    with pytest.raises(ValueError, match=r"'1' is in training mode.* model.eval\(\)"):
        adaptation(x)


def test_a_batch_that_fails_has_not_been():
    model, x = network(), torch.randn(4, 1, 8, 8)
    adaptation = adapt(model, forward=lambda model, batch: model(batch["x"]))
    adaptation({"x": x})
    before = adaptation.layers
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adaptation({"x": torch.randn(4, 1, 9, 9)})
    assert adaptation.layers == before
    assert before[0].samples == 4


def test_some_layers_alone():
    model, x = network(), torch.randn(4, 1, 8, 8)
    with adapt(model, where="3") as adaptation:
        model(x)
        assert [layer.path for layer in adaptation.layers] == ["3"]
        assert not model[1]._forward_pre_hooks


def test_empty_batches_and_foreign_input_are_the_layers_business():
    layer = source(nn.BatchNorm1d(3))
    with adapt(layer) as adaptation:
        assert layer(torch.zeros(0, 3)).shape == (0, 3)
        assert adaptation.layers[0].samples == 0
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 5))
        with pytest.raises(ValueError, match="expected 2D or 3D"):
            layer(torch.randn(3))


def test_one_value_has_no_variance_unless_there_is_a_prior_or_a_memory():
    layer = source(nn.BatchNorm1d(3))
    with adapt(layer, prior=0, memory=None):
        with pytest.raises(ValueError, match="one value per channel"):
            layer(torch.randn(1, 3))
        layer(torch.randn(1, 3, 2))
    for settings in ({"prior": 1, "memory": None}, {"prior": 0}):
        with adapt(layer, **settings):
            assert layer(torch.randn(1, 3)).isfinite().all()


def test_transforms_of_torch_func_are_refused():
    layer = source(nn.BatchNorm1d(3))
    with adapt(layer), pytest.raises(RuntimeError, match=r"remove\(\) the adaptation"):
        torch.func.vmap(layer)(torch.randn(2, 4, 3))


def test_it_reads_well():
    layer = nn.BatchNorm1d(2).eval()
    model = nn.Sequential(layer)
    with adapt(model, prior=4) as adaptation:
        with adaptation.stream("left"):
            model(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        model(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        assert repr(adaptation).splitlines() == [
            "Adaptation: prior 4 samples, memory 256 samples, 2 streams, here 'main'",
            "  layer  samples  mean off  std  cap held  skipped",
            "  0      2        0.33 σ    ×1   0.0%      0",
        ]


def poisoned(buffer, value):
    layer = nn.BatchNorm1d(3)
    getattr(layer, buffer)[1] = value
    return layer


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (network, {"prior": -1}, "prior is a number of samples"),
        (network, {"prior": math.nan}, "prior is a number of samples"),
        (network, {"memory": 0}, "memory is a number of samples"),
        (network, {"where": "9.*"}, "needs batch norm layers with running statistics"),
        (lambda: nn.Linear(2, 2), {}, "needs batch norm layers"),
        (lambda: nn.BatchNorm1d(2, track_running_stats=False), {}, "none of 1 has any"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), {}, "lazy or on the meta device"),
        (lambda: nn.BatchNorm1d(2, device="meta"), {}, "lazy or on the meta device"),
        (lambda: poisoned("running_mean", math.nan), {}, "recalibrate"),
        (lambda: poisoned("running_var", math.inf), {}, "recalibrate"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make, options, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        adapt(model, **options)
    assert not any(m._forward_pre_hooks for m in model.modules() if "Lazy" not in type(m).__name__)


def test_a_model_is_adapted_once_at_a_time():
    model = network()
    with adapt(model), pytest.raises(ValueError, match=r"adapted already; remove\(\)"):
        adapt(model)
    adapt(model).remove()


def test_a_compiled_model_would_not_call_the_hooks():
    model = network()
    with pytest.raises(TypeError, match="adapt the model that was compiled"):
        adapt(torch.compile(model))
    model[1].compile()
    with pytest.raises(TypeError, match="1 is compiled"):
        adapt(model)


def test_caps_out_of_range_are_refused():
    for wrong in ({"mean": -1}, {"std": 0.5}, {"mean": math.nan}):
        with pytest.raises(ValueError, match="Cap needs mean >= 0"):
            Cap(**wrong)


@pytest.mark.as_installed
def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got dict"):
        adapt({})


@pytest.mark.as_installed
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cap": 3}, "cap must be a Cap, such as"),
        ({"entropy": True}, "entropy must be an Entropy, such as"),
        ({"prior": "8"}, "prior must be a number of samples, got '8'"),
        ({"memory": "8"}, "memory must be a number of samples, got '8'"),
    ],
)
def test_options_of_another_type_are_refused(options, said):
    with pytest.raises(TypeError, match=said):
        adapt(nn.Sequential(nn.BatchNorm1d(3)).eval(), **options)


def test_a_where_that_names_nothing_and_a_model_without_layers_are_refused():
    with pytest.raises(ValueError, match="where='zz' names none"):
        adapt(nn.Sequential(nn.BatchNorm1d(3)).eval(), where="zz")
    with pytest.raises(ValueError, match="the model has none; one that was folded"):
        adapt(nn.Sequential(nn.Linear(3, 3)).eval())
