"""Claim 6: its quick run, and both definitions of the shift against what they should give."""

import copy

import pytest
import torch
import torch.nn.functional as F

from batchnorm.lab.claims.c06_internal_covariate_shift import (
    MEASURES,
    InternalCovariateShift,
    inputs,
    layers_of,
    moved,
    shift,
)
from batchnorm.lab.data import Examples
from batchnorm.lab.networks import PlainNetwork, norm_of
from batchnorm.models.norms import batch_norms
from laboratory import quick


def made(arm, depth=3):
    torch.manual_seed(0)
    part = Examples(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    return PlainNetwork(norm_of(arm), depth=depth, width=4), part


def test_the_quick_run_measures_a_shift():
    claim, results = InternalCovariateShift(), quick(InternalCovariateShift)
    assert len(results) == 4
    for row in results:
        assert 0 <= row["validation"] <= 1
        for name in MEASURES:
            assert len(row[f"{name}_curve"]) == row["looks"] == 4
            assert 1e-6 <= row[name] <= 1e6
        assert all(value <= 2 for value in row["angle_curve"])
    assert max(row["validation"] for row in results.where(arm="batch")) > 0.5
    claim.figure(results)
    for hypothesis in claim.hypotheses:
        assert hypothesis.judge(results).interval.mean > 0


def test_inputs_of_a_nonlinearity_behind_batch_norm_are_about_normal():
    network, part = made("batch")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = inputs(network, part.x)
    assert [tuple(each.shape) for each in seen] == [(3, 4)] * 3
    for each in seen:  # γ is 1 and β 0: percentiles of about ∓1 and 0
        torch.testing.assert_close(each[0], torch.full((4,), -1.0), rtol=0, atol=0.5)
        torch.testing.assert_close(each[1], torch.zeros(4), rtol=0, atol=0.5)
        torch.testing.assert_close(each[2], torch.ones(4), rtol=0, atol=0.5)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    next(iter(batch_norms(network).values())).bias.data += 2.0
    assert moved(seen[:1], inputs(network, part.x)[:1]) == pytest.approx(1.0, abs=0.2)


def test_how_far_percentiles_move_is_told_in_their_own_distance():
    before = [torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]])]
    assert moved(before, before) == 0
    # one layer moves by 1 of 4; the other not
    assert moved(before, [before[0] + 1, before[1]]) == pytest.approx(0.125)
    # units do not matter
    assert moved([5 * b for b in before], [5 * (b + 1) for b in before]) == pytest.approx(0.375)


@pytest.mark.parametrize("arm", ["none", "batch"])
def test_the_shift_is_that_of_gradients_before_and_after_the_layers_before(arm):
    network, part = made(arm)
    rate = 0.3

    def gradients(model):
        model.zero_grad()
        F.cross_entropy(model(part.x), part.y).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    now = gradients(copy.deepcopy(network))
    weights = [name for name, p in network.named_parameters() if p.ndim > 1]
    names = list(dict(network.named_parameters()))
    distances, angles = [], []
    for weight in weights[1:]:
        model = copy.deepcopy(network)
        earlier = names[: names.index(weight)]
        for name in earlier:
            model.get_parameter(name).data -= rate * now[name]
        then = gradients(model)[weight]
        distances.append((now[weight] - then).norm())
        angles.append(1 - F.cosine_similarity(now[weight].flatten(), then.flatten(), dim=0))
    found = shift(network, part, rate)
    assert found["distance"] == pytest.approx(float(sum(distances)) / 3, rel=1e-3)
    assert found["angle"] == pytest.approx(float(sum(angles)) / 3, rel=1e-2)
    assert all(p.grad is None for p in network.parameters())
    assert shift(network, part, 0.0)["distance"] == 0


def test_a_layer_has_its_weight_first_and_its_norm_behind():
    assert [len(layer) for layer in layers_of(made("batch")[0])] == [3, 3, 3, 2]
    assert [len(layer) for layer in layers_of(made("none")[0])] == [2, 2, 2, 2]
    assert [layer[0].ndim for layer in layers_of(made("batch")[0])] == [4, 4, 4, 2]
