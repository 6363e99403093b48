import copy
import math
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d
from batchnorm.repair.adaptation import Entropy, adapt
from batchnorm.repair.adaptation.entropy import mean_entropy

SGD = torch.optim.SGD
BATCH = {"prior": 0, "memory": None, "cap": None}


def network(classes=4):
    """Linear layers around norms with weights, statistics, γ and β of their own; in eval mode."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), BatchNorm1d(8, act="relu"),
        nn.Linear(8, classes),
    ).double()  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias)
    return model.eval()


def batch(n=32):
    return torch.randn(n, 6, dtype=torch.float64) * 2 + 1


def affine(model):
    return [p for norm in (model[1], model[4]) for p in (norm.weight, norm.bias)]


def state(model):
    return copy.deepcopy(model.state_dict())


def same_bits(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mean_entropy_agrees_with_numpy():
    logits = torch.randn(5, 3, 2, dtype=torch.float64) * 4
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    assert mean_entropy(logits).item() == pytest.approx(-(p * np.log(p)).sum(1).mean())
    assert mean_entropy(torch.zeros(2, 8)).item() == pytest.approx(math.log(8))
    sure = torch.tensor([[1e4, -1e4]])
    assert mean_entropy(sure).item() == 0
    assert mean_entropy(sure.half()).dtype == torch.float32


def test_one_step_goes_down_the_gradient_of_the_entropy():
    model, x = network(), batch()
    twin = copy.deepcopy(model).train()  # normalizes with the batch too
    answers = twin(x)
    p = answers.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    gradients = torch.autograd.grad(entropy, affine(twin))
    adaptation = adapt(model, **BATCH, entropy=Entropy(lr=0.1, optimizer=SGD, cap=10))
    torch.testing.assert_close(adaptation(x), answers.detach())
    for ours, before, gradient in zip(affine(model), affine(twin), gradients, strict=True):
        torch.testing.assert_close(ours.detach(), (before - 0.1 * gradient).detach())
    assert adaptation.entropy.before == pytest.approx(entropy.item())
    changed = {
        name for name, t in model.state_dict().items() if not torch.equal(t, state(network())[name])
    }
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_entropy_goes_down_and_reset_gives_everything_back_to_the_bit():
    model, x = network(), batch()
    before = state(model)
    adaptation = adapt(model, prior=16, entropy=Entropy(lr=0.02, steps=3))
    entropies = [mean_entropy(adaptation(x)).item() for _ in range(8)]
    assert all(later < earlier for earlier, later in pairwise(entropies))
    assert entropies[-1] < 0.9 * entropies[0]
    progress = adaptation.entropy
    assert (progress.batches, progress.undone, progress.collapses) == (8, 0, 0)
    assert progress.after < progress.before
    adaptation.reset()
    assert same_bits(model, before)
    assert adaptation.entropy.batches == 0
    again = [mean_entropy(adaptation(x)).item() for _ in range(8)]
    assert again == entropies  # the optimizer has forgotten too
    adaptation.remove()
    assert same_bits(model, before)
    model[1].weight.data.fill_(3.0)
    adaptation.remove()
    assert model[1].weight[0] == 3.0


def test_shifted_classes_are_told_apart_again():
    torch.manual_seed(0)
    centers = torch.eye(4).double() * 3
    model = nn.Sequential(nn.BatchNorm1d(4).double(), nn.Linear(4, 4).double())
    labels = torch.arange(400) % 4
    x = centers[labels] + 0.4 * torch.randn(400, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    shifted = x * torch.tensor([1.0, 0.2, 1.0, 3.0]) + torch.tensor([2.0, -1.0, 0.0, 4.0])
    model.eval()

    def accuracy(answers):
        return (answers.argmax(1) == labels).double().mean().item()

    assert accuracy(model(x)) > 0.99
    plain = accuracy(model(shifted))
    with adapt(model, prior=8, cap=None, entropy=Entropy(lr=1e-2)) as adaptation:
        adapted = accuracy(torch.cat([adaptation(part) for part in shifted.split(50)]))
        assert adaptation.entropy.collapses == 0
    assert plain < 0.6
    assert adapted > 0.95


def test_a_batch_enters_its_stream_once_however_many_steps():
    model, x = network(), batch(8)
    with adapt(model, entropy=Entropy(steps=5)) as adaptation:
        adaptation(x)
        adaptation(x)
        assert [layer.samples for layer in adaptation.layers] == [16, 16]
        assert [layer.remembered for layer in adaptation.layers] == [16, 16]


def test_flags_and_gradients_are_put_back():
    model, x = network(), batch()
    model[1].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.grad = torch.full_like(model[4].bias, 2.0)
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    frozen = model[1].weight.clone()
    answers = adapt(model, entropy=Entropy(lr=0.1))(x)
    assert not answers.requires_grad
    for name, parameter in model.named_parameters():
        learns, gradient = before[name]
        assert parameter.requires_grad == learns
        assert parameter.grad is gradient
    assert model[4].bias.grad.tolist() == [2.0] * 8
    assert not torch.equal(model[1].weight, frozen)  # γ, whose flag was off


class Gated(nn.Module):
    """Multiplies by what it is given, which autograd then keeps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * x[:, :4]


def test_what_was_made_in_inference_mode_can_be_learned_from():
    model, twin, x = Gated(network()), Gated(network()), batch()
    adapt(model, entropy=Entropy(lr=0.1))(x)
    with torch.inference_mode():
        adapt(twin, entropy=Entropy(lr=0.1))({"x": x.clone()})
    assert all(map(torch.equal, affine(model.inner), affine(twin.inner)))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_nothing_is_recorded(guard):
    model, twin = network(), network()
    adapt(model, entropy=Entropy(lr=0.1))(x := batch())
    adaptation = adapt(twin, entropy=Entropy(lr=0.1))
    with guard():
        adaptation(x.clone())
    for ours, theirs in zip(affine(model), affine(twin), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        twin(x.clone())  # a pass that does not learn, between those that do
    adaptation(x)


def test_the_cap_holds_gamma_and_beta():
    model, x = network(), batch()
    before = [p.detach().clone() for p in affine(model)]
    rms = [model[i].weight.detach().square().mean().sqrt() for i in (1, 1, 4, 4)]
    adaptation = adapt(model, entropy=Entropy(lr=1.0, steps=4, cap=0.25))
    adaptation(x)
    moved = [(p - b).abs().max().item() for p, b in zip(affine(model), before, strict=True)]
    assert moved == pytest.approx([0.25 * r.item() for r in rms])
    assert adaptation.entropy.capped > 0.5
    assert "cap held in" in repr(adaptation)


def test_answers_that_become_one_class_take_gamma_and_beta_back():
    model, x = network(), batch(16)
    with torch.no_grad():
        model[5].bias += torch.tensor([6.0, 0, 0, 0])
    before = state(model)
    adaptation = adapt(model, entropy=Entropy(lr=0.1, window=40, collapse=0.9))
    for number in range(3):
        adaptation(x)
        assert adaptation.entropy.collapses == number // 2  # at 48 samples of 40
        assert same_bits(model, before) == (number == 2)
    assert adaptation.entropy.batches == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_teaches_nothing(value):
    model, good = network(), batch()
    twin = copy.deepcopy(model)
    adaptation, other = (adapt(m, entropy=Entropy(lr=0.1, steps=2)) for m in (model, twin))
    broken = good.clone()
    broken[3, 2] = value
    for x in (good, broken, good):
        adaptation(x)
    for x in (good, good):
        other(x)
    assert all(map(torch.equal, affine(model), affine(twin)))
    assert (adaptation.entropy.batches, adaptation.entropy.undone) == (2, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_batch_that_fails_has_not_been(error):
    class Stops(nn.Module):
        passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes == 6:  # the second step of the third batch
                raise error
            return x

    model, x = nn.Sequential(*network(), Stops()).eval(), batch()
    twin = copy.deepcopy(model)
    adaptation, other = (adapt(m, entropy=Entropy(lr=0.1, steps=2)) for m in (model, twin))
    for each in (adaptation, other):
        each(x)
        each(x)
    before, layers = state(model), adaptation.layers
    with pytest.raises(error):
        adaptation(x)
    assert same_bits(model, before)
    assert adaptation.layers == layers
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(adaptation(x), other_than_stopped(other, x))
    assert all(map(torch.equal, affine(model), affine(twin)))


def other_than_stopped(adaptation, x):
    """The third batch, where nothing stops it."""
    adaptation._model[-1].passes = 100
    return adaptation(x)


def test_one_sample_needs_a_memory():
    model = network()
    before = state(model)
    with adapt(model, memory=None, entropy=Entropy()) as adaptation:
        with pytest.raises(ValueError, match="at least 2 samples in a batch, got 1"):
            adaptation(batch(1))
        assert same_bits(model, before)
    with adapt(model, entropy=Entropy()) as adaptation:
        for x in batch(5).split(1):
            assert adaptation(x).isfinite().all()
        assert adaptation.entropy.batches == 5


def test_logits_may_lie_anywhere_and_have_positions():
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return {"features": x, "out": self.norm(self.conv(x))}

    model, x = Segments().eval(), torch.randn(4, 2, 3, 3)
    settings = Entropy(lr=0.1, optimizer=partial(SGD, momentum=0.9), logits=lambda out: out["out"])
    with adapt(model, entropy=settings) as adaptation:
        first = adaptation(x)
        assert not first["out"].requires_grad
        assert mean_entropy(adaptation(x)["out"]) < mean_entropy(first["out"])


class Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: network(classes=1), "at least 2 classes, got \\(32, 1\\)"),
        (lambda: Detached(*network()).eval(), "carry no gradient"),
        (lambda: nn.Sequential(*network(), nn.Flatten(0)).eval(), r"got \(128,\)"),
        (lambda: network().train(), "'1' is in training mode"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(model, says):
    model = model()
    before, adaptation = state(model), adapt(model, entropy=Entropy())
    with pytest.raises(ValueError, match=says):
        adaptation(batch())
    assert same_bits(model, before)
    assert [layer.samples for layer in adaptation.layers] == [0, 0]


def test_streams_would_share_gamma_and_beta():
    adaptation = adapt(network(), entropy=Entropy())
    with pytest.raises(ValueError, match="adapt a copy of the model"), adaptation.stream("left"):
        pass


def test_layers_without_gamma_and_beta_have_nothing_to_learn():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False)).eval()
    with pytest.raises(ValueError, match="have none; adapt their statistics alone"):
        adapt(model, entropy=Entropy())
    assert not model[0]._forward_pre_hooks
    adapt(model).remove()


def test_numbers_out_of_range_are_refused():
    for wrong in ({"lr": -1.0}, {"steps": 0}, {"cap": math.nan}, {"window": 0}, {"collapse": 0.0}):
        with pytest.raises(ValueError, match=f"Entropy needs .*{next(iter(wrong))}"):
            Entropy(**wrong)


@dataclass
class ModelOutput(OrderedDict):
    """An answer by name, by attribute and by place, as Hugging Face's models give it."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    def __post_init__(self):
        for field in ("logits", "hidden"):
            OrderedDict.__setitem__(self, field, getattr(self, field))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        make, _, *rest = super().__reduce__()
        return make, (self.logits, self.hidden), *rest


class Answers(UserDict):
    """A mapping that is no dict, with an attribute of its own."""

    language = "sv"


def _by_name(model, x):
    return ModelOutput(model(x), (x + model[1].bias[0],))


def _in_a_mapping(model, x):
    answers = Answers({"logits": model(x)})
    answers.language = "fi"
    return answers


def test_answers_keep_their_type_and_their_attributes():
    x = batch()
    want = adapt(network(), **BATCH, entropy=Entropy())(x)
    answers = adapt(network(), **BATCH, entropy=Entropy(), forward=_by_name)(x)
    assert type(answers) is ModelOutput
    assert list(answers) == ["logits", "hidden"]
    assert answers.logits is answers["logits"]
    assert answers.hidden[0] is answers["hidden"][0]
    assert torch.equal(answers.logits, want)
    assert not answers.logits.requires_grad
    assert not answers.hidden[0].requires_grad
    mapping = adapt(network(), **BATCH, entropy=Entropy(), forward=_in_a_mapping)(x)
    assert type(mapping) is Answers
    assert mapping.language == "fi"
    assert torch.equal(mapping["logits"], want)
    proxy = adapt(
        network(), **BATCH, entropy=Entropy(),
        forward=lambda model, x: MappingProxyType({"logits": model(x)}),
    )(x)  # fmt: skip
    assert torch.equal(proxy["logits"], want)  # which cannot be copied
