import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from batchnorm import BatchNorm1d, BatchNorm2d, DomainBatchNorm
from batchnorm.repair.parameter_groups import parameter_groups

NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "this library's": lambda: BatchNorm2d(4),
    "synchronized": lambda: nn.SyncBatchNorm(4),
    "lazy": lambda: nn.LazyBatchNorm2d(),
    "domains": lambda: DomainBatchNorm(BatchNorm2d(4), ["a", "b"], separate_affine=True),
    "shared domains": lambda: DomainBatchNorm(BatchNorm2d(4), ["a", "b"]),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "RMS norm": lambda: nn.RMSNorm(4),
}


def names(model, groups):
    """Each group's parameters by name."""
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[of[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("biases", [True, False])
def test_gamma_and_beta_have_no_decay(norm, biases):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[norm](), nn.Linear(4, 2))
    decayed, apart = parameter_groups(model, 5e-4, biases=biases)
    assert (decayed["weight_decay"], apart["weight_decay"]) == (5e-4, 0)
    affine = [f"1.{name}" for name, _ in model[1].named_parameters()]
    assert affine
    if biases:
        want = [["0.weight", "2.weight"], ["0.bias", *affine, "2.bias"]]
    else:
        want = [["0.weight", "0.bias", "2.weight", "2.bias"], affine]
    assert names(model, [decayed, apart]) == want


@pytest.mark.parametrize("biases", [True, False])
def test_a_step_without_gradients_shrinks_weights_alone(biases):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(parameter_groups(model, 0.25, biases=biases), lr=0.5).step()
    for name, parameter in model.named_parameters():
        shrinks = name in ("0.weight", "2.weight") or (name in ("0.bias", "2.bias") and not biases)
        factor = 1 - 0.5 * 0.25 if shrinks else 1.0  # exact in binary
        assert torch.equal(parameter, factor * before[name]), name


@given(st.lists(st.sampled_from(["conv", "norm", "frozen", "tied"]), max_size=6), st.booleans())
def test_every_parameter_that_learns_is_in_exactly_one_group(layers, biases):
    model, shared = nn.ModuleList(), nn.Linear(3, 3)
    for kind in layers:
        if kind == "tied":
            model.append(shared)
        elif kind == "conv":
            model.append(nn.Conv1d(3, 3, 1))
        else:
            model.append(nn.BatchNorm1d(3).requires_grad_(kind == "norm"))
    groups = parameter_groups(model, 0.1, biases=biases)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    learning = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(learning)
    assert all(group["params"] for group in groups)
    for group in groups:  # in the model's order
        ids = [id(parameter) for parameter in group["params"]]
        assert ids == [each for each in learning if each in set(ids)]


def test_biases_by_every_name_they_have():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "lstm": nn.LSTM(3, 4)})
    assert names(model, parameter_groups(model, 0.1)) == [
        ["attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0",
         "lstm.weight_hh_l0"],
        ["attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_ih_l0",
         "lstm.bias_hh_l0"],
    ]  # fmt: skip


def test_parametrized_layers():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 4, 1)), nn.BatchNorm1d(4))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert names(model, parameter_groups(model, 0.1)) == [
        ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
        ["0.parametrizations.bias.original", "1.bias", "1.parametrizations.weight.original"],
    ]


def test_a_shared_parameter_has_no_decay_under_any_of_its_names():
    model = nn.ModuleDict({"scale": nn.ParameterList([nn.Parameter(torch.ones(3))])})
    model["norm"] = BatchNorm1d(3)
    model["norm"].weight = model["scale"][0]
    assert names(model, parameter_groups(model, 0.1)) == [["scale.0", "norm.bias"]]
    model = nn.ModuleDict({"offset": nn.ParameterList([nn.Parameter(torch.ones(3))])})
    model["linear"] = nn.Linear(3, 3)
    model["linear"].bias = model["offset"][0]
    assert names(model, parameter_groups(model, 0.1)) == [["linear.weight"], ["offset.0"]]
    assert names(model, parameter_groups(model, 0.1, biases=False, undecayed="*.bias")) == [
        ["linear.weight"],
        ["offset.0"],
    ]


class Scale(nn.Module):
    """A normalization that derives from none of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def test_further_names_without_decay():
    model = nn.Sequential(nn.Linear(4, 4), Scale(), Scale())
    groups = parameter_groups(model, 0.1, undecayed=["*.scale", "0.weight"])
    assert names(model, groups) == [["0.weight", "0.bias", "1.scale", "2.scale"]]
    assert names(model, parameter_groups(model, 0.1, undecayed="1.scale")) == [
        ["0.weight", "2.scale"],
        ["0.bias", "1.scale"],
    ]
    with pytest.raises(ValueError, match=r"'scale' matches no parameter.*0.weight, 0.bias"):
        parameter_groups(model, 0.1, undecayed=["*.scale", "scale"])


def test_options_go_into_each_group_and_empty_groups_out():
    backbone, head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm1d(4)
    backbone[0].requires_grad_(False)
    groups = parameter_groups(backbone, 0.1, lr=0.01) + parameter_groups(head, 0.1, lr=0.5)
    optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9)
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in optimizer.param_groups] == [
        (0.01, 0, 0.9),
        (0.5, 0, 0.9),
    ]
    assert parameter_groups(nn.ReLU(), 0.1) == []
    (only,) = parameter_groups(nn.Conv2d(3, 4, 1, bias=False), 0.1)
    assert only["weight_decay"] == 0.1


def test_an_optimizer_s_groups_are_split_where_they_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(
        [
            {"params": [*model[:2].parameters(), other], "weight_decay": 0.25, "lr": 0.5},
            {"params": model[3].parameters()},
        ],
        lr=0.1,
        momentum=0.5,
    )
    model(torch.randn(4, 3, 1, 1)).square().mean().backward()
    optimizer.step()
    momenta = {id(p): optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    groups = parameter_groups(model, optimizer=optimizer)
    assert groups is optimizer.param_groups
    assert [(g["weight_decay"], g["lr"], g["momentum"]) for g in groups] == [
        (0.25, 0.5, 0.5),
        (0, 0.5, 0.5),
        (0, 0.1, 0.5),
    ]
    weight, *affine = model[:2].parameters()
    want = [[weight, other], affine, list(model[3].parameters())]
    for group, parameters in zip(groups, want, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    before = {p: p.detach().clone() for p in model.parameters()}
    for parameter in before:
        parameter.grad = torch.zeros_like(parameter)
        momenta[id(parameter)].zero_()  # the same, which the optimizer still has
    optimizer.step()
    for parameter, value in before.items():
        assert torch.equal(parameter, value * (1 - 0.5 * 0.25) if parameter is weight else value)


def test_an_optimizer_s_names_are_split_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.named_parameters(), weight_decay=0.1)
    parameter_groups(model, optimizer=optimizer, biases=False)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
    ]
    only = torch.optim.AdamW(model[1].parameters(), weight_decay=0.1)
    assert [g["weight_decay"] for g in parameter_groups(model, optimizer=only)] == [0]
    assert [g["weight_decay"] for g in parameter_groups(model, optimizer=only)] == [0]


def test_an_optimizer_that_cannot_be_split():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="settings of their own, got weight_decay, lr beside it"):
        parameter_groups(model, 0.1, optimizer=optimizer, lr=0.2)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="scheduler, which notes its groups"):
        parameter_groups(model, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got None"):
        parameter_groups(nn.Linear(2, 2))
    for decay in (-0.1, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got"):
            parameter_groups(nn.Linear(2, 2), decay)
    with pytest.raises(ValueError, match="takes no params="):
        parameter_groups(nn.Linear(2, 2), 0.1, params=[])


def test_another_model_s_optimizer_has_nothing_to_split():
    optimizer = torch.optim.SGD(nn.BatchNorm1d(3).parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="none of the model's γ, β and biases"):
        parameter_groups(nn.BatchNorm1d(3), optimizer=optimizer)


@pytest.mark.as_installed
def test_what_is_no_number_and_no_optimizer_is_refused():
    optimizer = torch.optim.SGD(nn.BatchNorm1d(3).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="weight_decay must be a number, got SGD"):
        parameter_groups(nn.BatchNorm1d(3), optimizer)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got 'sgd'"):
        parameter_groups(nn.BatchNorm1d(3), optimizer="sgd")
