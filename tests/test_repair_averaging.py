import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.repair.averaging import average, averaging


def make(kind=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(3, 4), kind(4), nn.Linear(4, 2))


def trained(seed, kind=nn.BatchNorm1d):
    """Random weights and statistics, of whatever scale."""
    torch.manual_seed(seed)
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model[1].running_mean.normal_(0, 3)
        model[1].running_var.uniform_(0.2, 4)
        model[1].num_batches_tracked.fill_(10 * seed + 5)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def mixture(means, variances, shares):
    """The mean and variance of a mixture of distributions, by E[x²] − E[x]² in float64."""
    means, variances = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    shares = np.asarray(shares, dtype=np.float64)[:, None] / np.sum(shares)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + means**2)).sum(0) - mean**2


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.sampled_from(["weights", "counts"])
)
def test_weights_average_and_statistics_are_a_mixtures(shares, given_as):
    models, model = [trained(seed) for seed in range(len(shares))], make()
    average(model, models, **{given_as: shares})
    for name, parameter in model.named_parameters():
        stacked = np.stack([m.get_parameter(name).detach().double().numpy() for m in models])
        want = np.average(stacked, axis=0, weights=shares)
        np.testing.assert_allclose(parameter.detach(), want, rtol=1e-6, atol=1e-6)
    mean, var = mixture(
        [m[1].running_mean for m in models], [m[1].running_var for m in models], shares
    )
    np.testing.assert_allclose(model[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var, var, rtol=1e-5)


def test_unequal_shards_merge_to_the_statistics_of_all_their_data():
    data = torch.randn(400, 4, dtype=torch.float64) * 2 + 5
    data[:40] += 30
    shards, models, model = data.split([40, 360]), [], make().double()
    for shard in shards:
        models.append(make().double())
        models[-1][1].running_mean.copy_(shard.mean(0))
        models[-1][1].running_var.copy_(shard.var(0, unbiased=False))
    average(model, models, counts=[40, 360])
    torch.testing.assert_close(model[1].running_mean, data.mean(0))
    torch.testing.assert_close(model[1].running_var, data.var(0, unbiased=False))
    average(model, models)  # alike, which they are not
    assert (model[1].running_mean - data.mean(0)).abs().min() > 5


def test_weights_and_counts_may_differ():
    models, model = [trained(0), trained(1)], make()
    average(model, models, weights=[1, 3], counts=[1, 0])
    want = (models[0][0].weight + 3 * models[1][0].weight) / 4
    torch.testing.assert_close(model[0].weight, want)
    torch.testing.assert_close(model[1].running_var, models[0][1].running_var)


def test_the_distance_of_the_means_is_variance_and_is_told():
    models, model = [make(), make()], make()
    models[1][1].running_mean.fill_(4.0)
    result = average(model, models)
    assert model[1].running_var.tolist() == [5.0] * 4  # 1, and 2² between the means
    (layer,) = result.layers
    assert layer.path == "1"
    assert layer.between == pytest.approx(4 / 5)
    assert layer.shift == pytest.approx((2 / 5**0.5,) * 2, rel=1e-5)
    assert layer.stretch == pytest.approx((1 / 5**0.5,) * 2, rel=1e-5)
    assert repr(result).splitlines() == [
        "Averaging: 2 models, statistics of 1 layer merged",
        "  layer  means off  at most  std     at most  between means",
        "  1      0.89 σ     0.89 σ   ×0.447  ×0.447   80.0% of var",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_all_models_agree_on_keeps_its_bits(dtype):
    model, one = make(BatchNorm1d).to(dtype), trained(3, BatchNorm1d).to(dtype)
    one.register_buffer("causal", torch.tensor([0.0, -torch.inf]))
    model.register_buffer("causal", torch.zeros(2))
    average(model, [one, copy.deepcopy(one), copy.deepcopy(one)], weights=[0.1, 0.2, 0.7])
    assert_same_bits(model, state(one))


def test_variances_that_agree_are_not_even_rounded():
    model, one = nn.BatchNorm1d(1000).double(), nn.BatchNorm1d(1000).double()
    one.running_var.uniform_(0.1, 7)
    average(model, (one for _ in "abc"), weights=[0.3, 1.1, 0.5])
    assert torch.equal(model.running_var, one.running_var)


def test_the_counter_becomes_the_largest_and_integers_are_the_firsts():
    models, model = [trained(seed) for seed in (1, 4, 2)], make()
    for number, each in enumerate((model, *models)):
        each.register_buffer("version", torch.tensor(number))
        each.register_buffer("flags", torch.tensor([number == 1, number > 1]))
        each.register_buffer("scale", torch.tensor(float(number)))
    average(model, models)
    assert model[1].num_batches_tracked.item() == 45
    assert model.version.item() == 1
    assert model.flags.tolist() == [True, False]
    assert model.scale.item() == 2.0


def test_parameters_stay_the_same_objects_and_dtypes():
    model = make(BatchNorm1d).to(torch.bfloat16)
    held = dict(model.named_parameters())
    average(model, [trained(0, BatchNorm1d), trained(1, BatchNorm1d)])
    assert all(model.get_parameter(name) is parameter for name, parameter in held.items())
    assert model[0].weight.dtype == torch.bfloat16
    want = (trained(0)[0].weight.double() + trained(1)[0].weight.double()) / 2
    assert torch.equal(model[0].weight, want.bfloat16())  # rounded once
    assert model[1].running_mean.dtype == torch.float32


def test_a_step_of_ema_writes_into_one_of_the_models():
    ema, model = trained(0).double(), trained(1).double()
    before = state(ema)
    average(ema, [ema, model], weights=[0.99, 0.01])
    torch.testing.assert_close(
        ema[0].weight.detach(), 0.99 * before["0.weight"] + 0.01 * model[0].weight.detach()
    )
    mean, var = mixture(
        [before["1.running_mean"], model[1].running_mean],
        [before["1.running_var"], model[1].running_var],
        [0.99, 0.01],
    )
    np.testing.assert_allclose(ema[1].running_mean, mean)
    np.testing.assert_allclose(ema[1].running_var, var)


def test_state_dicts_modules_and_wrappers_mix():
    models = [trained(seed) for seed in range(3)]
    want = make()
    average(want, models)
    averaged = AveragedModel(make())
    wrapped = nn.DataParallel(models[2])
    average(averaged, [models[0].state_dict(), AveragedModel(models[1]), wrapped.state_dict()])
    assert_same_bits(averaged.module, state(want))
    assert averaged.n_averaged.item() == 3


def test_an_averaged_model_goes_on_from_there():
    models, averaged = [trained(seed) for seed in range(3)], AveragedModel(make())
    average(averaged, models[:2])
    averaged.update_parameters(models[2])
    want = sum(m[0].weight for m in models) / 3
    torch.testing.assert_close(averaged.module[0].weight, want)
    twice = AveragedModel(make())
    average(twice, [averaged, trained(9)], weights=[3, 1])
    assert twice.n_averaged.item() == 4


def test_averaged_models_stand_for_as_many_as_went_into_them():
    models = [trained(seed).double() for seed in range(7)]
    averaged = AveragedModel(make().double())
    for model in models[:5]:
        averaged.update_parameters(model)
    average(averaged, [averaged, models[5]])
    assert averaged.n_averaged.item() == 6
    averaged.update_parameters(models[6])
    assert averaged.n_averaged.item() == 7
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, sum(m.get_parameter(name) for m in models) / 7)
    plain = make().double()
    result = average(plain, [averaged, models[0]])  # weighs them in a model that counts nothing too
    torch.testing.assert_close(
        plain[0].weight, (7 * averaged.module[0].weight + models[0][0].weight) / 8
    )
    mean, var = mixture(
        [averaged.module[1].running_mean, models[0][1].running_mean],
        [averaged.module[1].running_var, models[0][1].running_var],
        [7, 1],
    )
    np.testing.assert_allclose(plain[1].running_mean, mean)
    np.testing.assert_allclose(plain[1].running_var, var)
    assert result.models == 2


def one_by_one(net, seeds, answer=lambda net: net):
    """One network, loaded again and again."""
    for seed in seeds:
        net.load_state_dict(trained(seed).state_dict())
        yield answer(net)


@pytest.mark.parametrize("answer", [lambda net: net, lambda net: net.state_dict()])
def test_a_generator_may_load_all_into_one_network(answer):
    want, model = make(), make()
    average(want, [trained(seed) for seed in range(3)])
    average(model, one_by_one(make(), range(3), answer))
    assert_same_bits(model, state(want))


def test_a_generator_may_load_all_into_the_model_that_is_given_the_average():
    want, model = make(), trained(9)
    before = state(model)
    average(want, [trained(seed) for seed in range(3)])
    result = average(model, one_by_one(model, range(3)))
    assert_same_bits(model, state(want))
    result.undo()
    assert_same_bits(model, before)

    def missing(net):
        yield from one_by_one(net, range(2))
        raise FileNotFoundError("2.pt")

    with pytest.raises(FileNotFoundError):
        average(model, missing(model))
    assert_same_bits(model, before)


def test_a_generator_of_averaged_models_keeps_what_each_stands_for():
    def counting(net):
        for seed, number in enumerate((4, 2)):
            net.module.load_state_dict(trained(seed).state_dict())
            net.n_averaged.fill_(number)
            yield net

    model = AveragedModel(make())
    average(model, counting(AveragedModel(make())))
    assert model.n_averaged.item() == 6
    want = (2 * trained(0)[0].weight + trained(1)[0].weight) / 3
    torch.testing.assert_close(model.module[0].weight, want)


@pytest.mark.parametrize("answer", [lambda net: net, lambda net: net.state_dict()])
def test_one_network_that_is_in_a_list_twice_is_refused(answer):
    model, net = trained(5), make()
    before = state(model)
    models = [trained(8), *one_by_one(net, range(2), answer)]
    with pytest.raises(ValueError, match=r"models\[2\] is models\[1\]: .* pass copies"):
        average(model, models)
    assert_same_bits(model, before)


def test_models_may_share_a_backbone():
    models = [trained(seed) for seed in range(2)]
    models[1][0] = models[0][0]
    model = make()
    average(model, models)
    assert torch.equal(model[0].weight, models[0][0].weight)
    torch.testing.assert_close(model[2].weight, (models[0][2].weight + models[1][2].weight) / 2)


def test_layers_of_any_kind_that_keep_statistics():
    kinds = (nn.SyncBatchNorm, nn.BatchNorm2d, BatchNorm2d)
    instance = nn.InstanceNorm2d(4, track_running_stats=True)
    models = [nn.Sequential(*(kind(4) for kind in kinds), copy.deepcopy(instance)) for _ in "ab"]
    for layer in models[1]:
        layer.running_mean.fill_(2.0)
    model = copy.deepcopy(models[0])
    result = average(model, models)
    assert [layer.path for layer in result.layers] == ["0", "1", "2", "3"]
    for layer in model:
        assert layer.running_mean.tolist() == [1.0] * 4
        assert layer.running_var.tolist() == [2.0] * 4


def test_a_layer_that_is_the_model_and_one_without_statistics():
    layer, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.running_mean.fill_(2.0)
    result = average(layer, [nn.BatchNorm1d(2), other])
    assert layer.running_var.tolist() == [2.0, 2.0]
    assert "the model" in repr(result)
    plain = nn.Linear(2, 2)
    assert average(plain, [nn.Linear(2, 2), nn.Linear(2, 2)]).layers == ()


def test_undo_gives_everything_back():
    averaged = AveragedModel(trained(7))
    before = state(averaged)
    result = average(averaged, [trained(1), trained(2)])
    assert not torch.equal(averaged.module[0].weight, before["module.0.weight"])
    result.undo()
    assert_same_bits(averaged, before)


def test_statistics_are_estimated_again_with_the_averaged_weights():
    models, averaged = [trained(seed) for seed in range(2)], AveragedModel(make())
    batches = [torch.randn(n, 3) * 2 + 1 for n in (30, 7, 19)]
    result = average(averaged, models, batches=batches)
    model = averaged.module
    given = model[0](torch.cat(batches)).detach().double()
    torch.testing.assert_close(model[1].running_mean.double(), given.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), given.var(0), rtol=1e-4, atol=1e-5)
    merged = make()
    average(merged, models)
    sigma = (merged[1].running_var + 1e-5).sqrt()
    moved = (model[1].running_mean - merged[1].running_mean) / sigma
    (shift,) = result.recalibration.layers
    assert shift.mean == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
    assert shift.mean > 0.1
    assert repr(result).endswith(repr(result.recalibration))
    result.undo()
    assert model[1].running_var.tolist() == [1.0] * 4


def test_batches_that_fail_leave_the_model_as_it_was():
    model = trained(5)
    before, modes = state(model), [m.training for m in model.modules()]

    def batches():
        yield torch.randn(8, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average(model, [trained(1), trained(2)], batches=batches())
    assert_same_bits(model, before)
    assert [m.training for m in model.modules()] == modes


def test_an_interrupted_copy_leaves_the_model_as_it_was(monkeypatch):
    model, real = trained(5), averaging._copy
    before = state(model)

    def interrupted(changes):
        real(changes[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(averaging, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        average(model, [trained(1), trained(2)])
    assert_same_bits(model, before)


def broken(name, value):
    model = trained(1)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("models", "options", "says"),
    [
        ([], {}, "at least one model, got none"),
        ([nn.Linear(3, 4)], {}, r"models\[0\] lacks 0.bias, 0.weight, 1.bias and 6 more"),
        ([trained(0), nn.Sequential(*make(), nn.Linear(2, 2))], {}, r"models\[1\] has 3.bias"),
        (
            [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))],
            {},
            r"0.weight of shape \(4, 5\), not \(4, 3\)",
        ),
        ([broken("0.weight", torch.nan)], {}, "average of '0.weight' is not finite"),
        ([trained(0), broken("0.weight", torch.inf)], {}, "average of '0.weight' is not finite"),
        ([trained(0), broken("1.running_var", -1)], {}, r"models\[1\] .*'1.running_\*'"),
        ([trained(0), broken("1.running_mean", torch.nan)], {}, r"models\[1\] .*recalibrate"),
        ([trained(0)], {"weights": [1, 2]}, r"weights must hold one number for each of the 1"),
        ([trained(0), trained(1)], {"weights": [1, -1]}, "at least 0 and not all 0"),
        ([trained(0), trained(1)], {"counts": [0, 0]}, "at least 0 and not all 0"),
        ([trained(0), trained(1)], {"counts": [1, torch.nan]}, "must be finite"),
        ([{"epoch": 3}], {}, "no tensors"),
        ([nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))], {}, "lazy"),
        ([make().to("meta")], {}, "meta device"),
    ],
)
def test_what_makes_no_average_is_refused(models, options, says):
    model = trained(5)
    before = state(model)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=says):
        average(model, models, **options)
    assert_same_bits(model, before)


def test_a_model_without_weight_may_be_broken():
    model, good = make(), trained(0)
    average(model, [good, broken("0.weight", torch.nan)], weights=[1, 0])
    assert torch.equal(model[0].weight, good[0].weight)


def test_an_average_that_the_models_dtype_cannot_hold_is_refused():
    for name in ("0.weight", "1.running_var"):
        with pytest.raises(ValueError, match=rf"'{name}' .*float16 is too narrow"):
            average(make().half(), [broken(name, 1e6)])


@pytest.mark.as_installed
def test_what_is_no_list_of_models_is_refused():
    for models in (make(), make().state_dict()):
        with pytest.raises(TypeError, match="put it in a list"):
            average(make(), models)
    with pytest.raises(TypeError, match=r"models\[0\] must be a module or a state_dict, got str"):
        average(make(), ["model.pt"])
