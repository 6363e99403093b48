import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from batchnorm import (
    Batch,
    BatchNorm1d,
    BatchNorm2d,
    DomainBatchNorm,
    Ghost,
    LazyBatchNorm2d,
    Renorm,
    Running,
)
from batchnorm.audit.call import Call
from batchnorm.models.norms import TorchBatchNorm, batch_norms
from batchnorm.models.snapshot import left_as_it_was
from batchnorm.repair.freezing import Switches, freeze, unfreeze
from batchnorm.repair.frozen_statistics import frozen_statistics

COMBINATIONS = list(itertools.product(("running", "batch"), (False, True), (False, True)))


class WithAct(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's."""

    def forward(self, x):
        return F.relu(super().forward(x))

    def answer(self):
        return 42


class Unruly(nn.BatchNorm2d):
    """A subclass that tracks its statistics itself, and binds new tensors."""

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var.mul_(0.9).add_(0.1 * var.detach())
            self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()


KINDS = [nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, WithAct]


def network(norm=nn.BatchNorm2d, trained=True):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 5, 1), norm(5), nn.Flatten(),
        nn.Linear(5 * 16, 2),
    )  # fmt: skip
    for layer in batch_norms(model).values():
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    for _ in range(3 * trained):
        model(images() * 2 + 1)
    return model


def images(n=4):
    return torch.randn(n, 3, 6, 6)


def statistics_of(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name] is value is None or torch.equal(ours[name], value), name


def everything(model):
    """All that a freeze may change, and what it must not."""
    found = {}
    for path, module in model.named_modules():
        attributes = {
            name: value for name, value in vars(module).items()
            if not isinstance(value, dict) or name == "_buffers"
        }  # fmt: skip
        found[path] = (type(module), attributes, list(vars(module)))
    learned = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return found, learned


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()
        model(images()).square().mean().backward()
        optimizer.step()
        model.eval()


@pytest.mark.parametrize("norm", KINDS)
def test_a_frozen_model_answers_as_in_eval_and_its_norms_stay(norm):
    model = network(norm)
    x = images()
    want = model.eval()(x)
    modules = [id(m) for m in model.modules()]
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    freeze(model.train())
    assert torch.equal(model.train()(x), want)  # to the bit, in another class too
    before = statistics_of(model)
    train(model)
    assert_same(statistics_of(model), before)
    for name, parameter in model.named_parameters():
        frozen = name.split(".")[0] in "14"
        assert torch.equal(parameter, parameters[name]) == frozen, name
        assert (parameter.grad is None) == frozen
    assert torch.equal(model.train()(x), model.eval()(x))
    assert [id(m) for m in model.modules()] == modules
    assert list(model.state_dict()) == keys
    assert all(isinstance(layer, norm) for layer in batch_norms(model).values())


def oracle(layer, x, dy, statistics, updates, learns):
    """PyTorch's function, told each of the three."""
    mean, var, count = (b.clone() for b in layer.buffers())
    new_mean, new_var = mean.clone(), var.clone()
    F.batch_norm(x, new_mean, new_var, training=True, momentum=0.1)
    x = x.clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    batch = statistics == "batch"
    given = (None, None) if batch else (mean, var)
    y = F.batch_norm(x, *given, weight, bias, training=batch, eps=layer.eps)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    after = (new_mean, new_var, count + 1) if updates else (mean, var, count)
    return y, gradients if learns else (gradients[0], None, None), after


def assert_combination(layer, kind, statistics, updates, learns):
    for _ in range(2):
        x = torch.randn(6, 3, 4, dtype=torch.float64) * 2 + 1
        dy = torch.randn_like(x)
        want, gradients, after = oracle(layer, x, dy, statistics, updates, learns)
        layer.zero_grad()
        x.requires_grad_()
        y = layer.train()(x)
        y.backward(dy)
        torch.testing.assert_close(y, want)
        for got, expected in zip((x.grad, *(p.grad for p in layer.parameters())), gradients,
                                 strict=True):  # fmt: skip
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected)
        for got, expected in zip(layer.buffers(), after, strict=True):
            torch.testing.assert_close(got, expected)
        layer.eval()
        mean, var, _ = layer.buffers()
        frozen = F.batch_norm(x, mean, var, *layer.parameters(), eps=layer.eps)
        torch.testing.assert_close(layer(x), frozen)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize(("statistics", "updates", "learns"), COMBINATIONS)
def test_the_three_switches_are_independent(kind, statistics, updates, learns):
    layer = kind(3, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    layer(torch.randn(8, 3, 2, dtype=torch.float64) * 3 + 1)
    if kind is nn.SyncBatchNorm and (statistics, updates) == ("running", True):
        with pytest.raises(TypeError, match="either by its running statistics or moves them"):
            freeze(layer, statistics=statistics, updates=updates, learns=learns)
        assert type(layer) is kind
        assert layer.weight.requires_grad
        return
    freezing = freeze(layer, statistics=statistics, updates=updates, learns=learns)
    assert freezing.layers[0].before == Switches("batch", updates=True, learns=True)
    assert freezing.layers[0].after == Switches(statistics, updates, learns)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own
    for each in (layer, *copies):
        assert_combination(each, kind, statistics, updates, learns)
        assert unfreeze(each) == ("",)
        assert type(each) is kind
        assert_combination(each, kind, "batch", updates=True, learns=True)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm1d])
@pytest.mark.parametrize(("statistics", "updates"), [c[:2] for c in COMBINATIONS[::2]])
def test_the_auditor_knows_which_layers_move(kind, statistics, updates):
    layer = kind(3)
    freeze(layer, statistics=statistics, updates=updates)
    seen = Call(layer.train(), 0, "", torch.randn(4, 3), True, layer)
    assert seen.tracks == updates
    assert Call(layer.eval(), 0, "", torch.randn(4, 3), True, layer).tracks is False


@pytest.mark.parametrize("policy", [Ghost(2), Renorm(2.0, 1.0), Running()], ids=repr)
@pytest.mark.parametrize(("statistics", "updates", "learns"), COMBINATIONS)
def test_the_layer_s_own_policy_is_kept_while_it_is_frozen(policy, statistics, updates, learns):
    layer = BatchNorm1d(3, statistics=policy)
    x = torch.randn(6, 3) * 2 + 1
    usual = BatchNorm1d(3, statistics=Batch() if policy == Running() else policy)
    want, before = usual.train(statistics == "batch")(x), statistics_of(layer)
    usual.load_state_dict(before, strict=False)
    usual.train()(x)  # a batch's trace
    layer.freeze(statistics=statistics, updates=updates, learns=learns)
    torch.testing.assert_close(layer(x), want)
    assert_same(statistics_of(layer), statistics_of(usual) if updates else before)
    assert layer.weight.requires_grad == learns
    assert layer.unfreeze().statistics == policy
    assert layer.weight.requires_grad


@pytest.mark.parametrize("norm", [*KINDS, Unruly])
def test_unfreezing_gives_everything_back(norm):
    model = network(norm)
    model[1].bias.requires_grad_(False)
    before = everything(model)
    freeze(model)
    model.eval(), model.train()
    assert unfreeze(model) == ("1", "4")
    assert_same_state(everything(model), before)
    assert unfreeze(model) == ()
    model.eval()
    freeze(model)
    model.train()
    freeze(model, statistics="running", learns=True)
    assert [p.requires_grad for p in model[1].parameters()] == [True, False]
    unfreeze(model, where="1")
    assert type(model[1]) is norm
    assert model[1].training
    assert (type(model[4]) is norm) == (norm is BatchNorm2d)
    unfreeze(model)
    assert_same_state(everything(model), before)


def assert_same_state(now, before):
    (modules, learned), (before_modules, before_learned) = now, before
    assert learned == before_learned
    for path, (kind, attributes, names) in before_modules.items():
        assert modules[path][0] is kind
        assert modules[path][2] == names
        for name, value in attributes.items():
            if name == "_buffers":
                assert_same(modules[path][1][name], value)
            else:
                assert modules[path][1][name] == value, (path, name)


@pytest.mark.parametrize("norm", KINDS)
def test_copies_and_loaded_states_stay_frozen(norm, tmp_path):
    model, other = network(norm), network(norm)
    freeze(model)
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    x = images()
    want = other.eval()(x)
    torch.save(model, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (model, copy.deepcopy(model), saved):
        before = statistics_of(each)
        assert torch.equal(each.train()(x), want)
        assert_same(statistics_of(each), before)
        assert not any(p.requires_grad for p in each[1].parameters())
        assert unfreeze(each) == ("1", "4")
        assert type(each[1]) is norm
        assert not torch.equal(each(x), want)
        assert each[1].num_batches_tracked == before["1.num_batches_tracked"] + 1


def test_half_frozen_is_what_requires_grad_alone_leaves():
    """The example of BN102, and its repair."""
    backbone = network()
    backbone.requires_grad_(False)
    before = statistics_of(backbone)
    backbone.train()(images())
    assert not torch.equal(backbone[1].running_mean, before["1.running_mean"])
    freeze(backbone)
    before = statistics_of(backbone)
    backbone.train()(images())
    assert_same(statistics_of(backbone), before)
    unfreeze(backbone)
    assert not any(p.requires_grad for p in backbone.parameters())  # as it was


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, WithAct])
def test_gradients_through_a_frozen_layer(norm):
    layer = norm(2).double()
    layer(torch.randn(4, 2, 3, 3, dtype=torch.float64) + 2)
    freeze(layer, learns=True)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm1d])
def test_gradients_hold_when_the_statistics_move_after_the_forward_pass(kind, updates):
    layer = kind(3).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    freeze(layer, updates=updates)
    y = layer(x)
    layer(torch.randn(6, 3, dtype=torch.float64) * 9)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, (1 + 1e-5) ** -0.5))


def test_stale_gradients_do_not_move_a_frozen_layer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(images()).sum().backward()
    optimizer.step()  # momentum is there, and gradients
    before = model[1].weight.detach().clone()
    freeze(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("norm", KINDS)
def test_as_a_context_it_is_undone(norm):
    model = network(norm)
    model[4].weight.requires_grad_(False)
    before = everything(model)
    with freeze(model) as outer:
        frozen = everything(model)
        with freeze(model, where="1", learns=True):
            assert model[1].weight.requires_grad
        assert_same_state(everything(model), frozen)
        assert outer.parameters == ("1.weight", "1.bias", "4.bias")
    assert_same_state(everything(model), before)


def test_an_undoing_that_is_refused_undoes_nothing():
    model = network()
    freezing = freeze(model)
    parametrize.register_parametrization(model[4], "weight", nn.Softplus())
    frozen = everything(model)
    with pytest.raises(TypeError, match="was derived from a frozen layer's class"):
        freezing.undo()
    assert_same_state(everything(model), frozen)
    parametrize.remove_parametrizations(model[4], "weight")
    freezing.undo()
    assert [type(model[place]) for place in (1, 4)] == [nn.BatchNorm2d] * 2
    assert all(p.requires_grad for p in model.parameters())


def test_undoing_keeps_what_was_learned():
    layer = nn.BatchNorm1d(3)
    freezing = freeze(layer, updates=True)
    assert isinstance(layer, BatchNorm1d)
    layer(torch.randn(4, 3) + 5)
    moved = statistics_of(layer)
    freezing.undo()
    assert type(layer) is nn.BatchNorm1d
    assert_same(statistics_of(layer), moved)
    assert layer.num_batches_tracked == 1


def test_half_precision_statistics_come_back_in_it():
    layer = nn.BatchNorm1d(3).bfloat16()
    before = statistics_of(layer)
    with freeze(layer, updates=True):
        assert layer.running_mean.dtype == torch.float32
    assert_same(statistics_of(layer), before)
    assert layer.running_mean.dtype == torch.bfloat16


def test_where_chooses():
    model = nn.ModuleDict({"backbone": network(), "head": network()})
    freeze(model, where="backbone.*")
    assert [path for path, layer in batch_norms(model).items() if not layer.weight.requires_grad] \
        == ["backbone.1", "backbone.4"]  # fmt: skip
    unfreeze(model)
    freeze(model, where=lambda path, layer: layer.num_features == 4)
    assert [path for path, layer in batch_norms(model).items() if not layer.weight.requires_grad] \
        == ["backbone.1", "head.1"]  # fmt: skip


def test_parameters_that_layers_share_learn_again_in_any_order():
    for order in (["a", "b"], ["b", "a"]):
        model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
        model["b"].weight = model["a"].weight
        for path in order:
            freeze(model, where=path)
        assert not model["a"].weight.requires_grad
        for path in order:
            unfreeze(model, where=path)
        assert model["a"].weight.requires_grad
    model = DomainBatchNorm(BatchNorm1d(3), ["x", "y"])
    with freeze(model):
        model(torch.randn(1, 3), domain="x")
    assert all(p.requires_grad for p in model.parameters())


def test_a_parametrized_layer():
    model = network(nn.BatchNorm2d)
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    x = images()
    want = model.eval()(x)
    freeze(model)
    assert not any(p.requires_grad for p in model[1].parameters())
    before = statistics_of(model)
    assert torch.equal(model.train()(x), want)
    assert_same(statistics_of(model), before)
    unfreeze(model)
    assert parametrize.is_parametrized(model[1], "weight")
    assert all(p.requires_grad for p in model[1].parameters())


def test_a_class_that_was_replaced_since_is_refused():
    model = network()
    freeze(model)
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="was derived from a frozen layer's class"):
        unfreeze(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not model[4].weight.requires_grad


def test_a_subclass_keeps_its_methods_and_reads_as_in_eval():
    model = network(WithAct)
    freeze(model)
    layer = model.train()[1]
    assert (layer.answer(), layer.training) == (42, False)
    layer.training = True  # not by train()
    assert not layer.training
    unfreeze(model)
    assert layer.training
    freeze(model)
    model.eval()
    unfreeze(model)
    assert not layer.training


def interrupting(parameter):
    """Ctrl-C when a parameter is told to stop learning: in the middle of freezing."""

    class Interrupting(nn.Parameter):
        def requires_grad_(self, learns=True):
            if not learns:
                raise KeyboardInterrupt
            return super().requires_grad_(learns)

    parameter.__class__ = Interrupting


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_others_who_put_a_model_back_do_not_change_what_it_thaws_to(statistics):
    model = network()
    freeze(model, statistics=statistics)
    before = everything(model)
    with left_as_it_was(model):
        model.eval()
    for layer in batch_norms(model).values():  # as read, as people do
        training, flag = layer.training, layer.track_running_stats
        layer.training = layer.track_running_stats = True
        layer.training, layer.track_running_stats = training, flag
    assert_same_state(everything(model), before)
    unfreeze(model)
    assert all(layer.training for layer in batch_norms(model).values())
    assert all(layer.track_running_stats for layer in batch_norms(model).values())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm])
def test_an_interrupted_freeze_freezes_nothing(norm):
    model = network(norm)
    model(images()).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    interrupting(model[4].bias)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        freeze(model)
    assert_same_state(everything(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_refusal_freezes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), WithAct(3), nn.SyncBatchNorm(3))
    before = everything(model)
    with pytest.raises(TypeError, match="1 is a WithAct, whose own forward decides"):
        freeze(model, statistics="batch")
    with pytest.raises(TypeError, match="1 is a WithAct, which normalizes either"):
        freeze(model, updates=True)
    with pytest.raises(TypeError, match="2 is a SyncBatchNorm, which normalizes either"):
        freeze(model, where=["0", "2"], updates=True)
    assert_same_state(everything(model), before)


def test_layers_that_cannot_be_frozen_are_named():
    model = nn.Sequential(*(nn.BatchNorm1d(3, track_running_stats=i > 3) for i in range(6)))
    with pytest.raises(ValueError, match="0, 1, 2 and 1 more: no running statistics to use"):
        freeze(model)
    assert all(p.requires_grad for p in model.parameters())
    freeze(model, statistics="batch")
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    model[4].running_var[1] = torch.nan
    with pytest.raises(ValueError, match="4: running statistics that are not finite"):
        freeze(model, where=["4", "5"])
    freeze(model, where="5")
    with pytest.raises(ValueError, match=r"where='bn\*' means none of them: 0, 1, 2 and 3 more"):
        freeze(model, where="bn*")
    with pytest.raises(ValueError, match="it has none"):
        unfreeze(nn.Linear(3, 3))
    for lazy in (nn.LazyBatchNorm2d(), LazyBatchNorm2d()):
        with pytest.raises(ValueError, match="the model: lazy"):
            freeze(lazy)


@pytest.mark.as_installed
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm1d])
def test_a_misspelled_switch(kind):
    layer = kind(3)
    with pytest.raises(ValueError, match='must be "running" or "batch", got \'eval\''):
        freeze(layer, statistics="eval")
    with pytest.raises(ValueError, match='must be "running" or "batch", got \'eval\''):
        BatchNorm1d(3).freeze(statistics="eval")


def test_a_model_on_the_meta_device():
    model = nn.Sequential(nn.BatchNorm1d(3, device="meta"), BatchNorm1d(3, device="meta"))
    freeze(model)
    assert model(torch.empty(1, 3, device="meta")).shape == (1, 3)
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    assert torch.equal(model.train()(torch.ones(1, 3)), model.eval()(torch.ones(1, 3)))


def test_what_it_says():
    model = network()
    model[4].requires_grad_(False)
    text = """\
Freezing: 2 layers, 2 parameters
  layer  statistics       updated   γ, β
  1      batch → running  yes → no  learn → fixed
  4      batch → running  yes → no  fixed"""
    assert repr(freeze(model)) == text
    assert "\n  the model  batch → running  yes → no" in repr(freeze(nn.BatchNorm1d(2)))
    assert "FrozenBatchNorm2d(4, eps" in repr(model)
    unfreeze(model)
    freeze(model, updates=True)
    assert "BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, " \
        "track_running_stats=True, statistics=Running(updates=True))" in repr(model)  # fmt: skip


COMPILED = [
    *((norm, "running", False) for norm in KINDS),
    *((norm, "running", True) for norm in (nn.BatchNorm2d, BatchNorm2d)),
    *((norm, "batch", False) for norm in (nn.BatchNorm2d, BatchNorm2d)),
]


@pytest.mark.as_installed
@pytest.mark.parametrize(("norm", "statistics", "updates"), COMPILED)
def test_compiled_models_freeze_and_thaw(norm, statistics, updates):
    torch._dynamo.reset()
    model = network(norm)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(images())
    model.load_state_dict(compiled._orig_mod.state_dict())
    for change in (freeze, unfreeze):
        for each in (model, compiled):
            switches = {"statistics": statistics, "updates": updates} if change is freeze else {}
            change(each, **switches)
        x = images()
        for training in (True, False, True):
            torch.testing.assert_close(compiled.train(training)(x), model.train(training)(x))
            for a, b in zip(compiled.buffers(), model.buffers(), strict=True):
                torch.testing.assert_close(a, b)


INSTANCE = {
    "torch.nn": lambda c: nn.BatchNorm2d(c),
    "this library": lambda c: BatchNorm2d(c),
    "ghost": lambda c: BatchNorm2d(c, statistics=Ghost(2)),
    "renorm": lambda c: BatchNorm2d(c, statistics=Renorm(2.0, 1.0)),
    "synchronized": lambda c: nn.SyncBatchNorm(c),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "own forward": WithAct,
    "own tracking": Unruly,
}


def normalizing(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), INSTANCE[kind](4), nn.ReLU(), INSTANCE[kind](4))
    model(images() * 2 + 1)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", INSTANCE)
def test_a_forward_pass_leaves_no_trace(kind, training, gradients):
    model = normalizing(kind).train(training)
    twin, x = copy.deepcopy(model), images()
    before = everything(model)
    bits, held = statistics_of(model), {name: id(b) for name, b in model.named_buffers()}
    with torch.set_grad_enabled(gradients):
        want = twin(x)
        with frozen_statistics(model):
            y = model(x)
    assert torch.equal(y, want)
    assert_same(statistics_of(model), bits)
    assert {name: id(b) for name, b in model.named_buffers()} == held
    assert_same_state(everything(model), before)
    if gradients:
        y.square().mean().backward()
        want.square().mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    model.train()(x)
    assert any(not torch.equal(b, bits[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("kind", INSTANCE)
def test_no_trace_of_a_block_that_raised(kind):
    model = normalizing(kind)
    before, bits = everything(model), statistics_of(model)

    @frozen_statistics(model)
    def fail():
        model(images())
        with frozen_statistics(model):
            model(images())
        model(images())  # the inner block's end did not end the outer one
        raise RuntimeError("in the middle")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            fail()
        assert_same(statistics_of(model), bits)
        assert_same_state(everything(model), before)


@pytest.mark.parametrize("kind", ["torch.nn", "this library", "synchronized", "renorm"])
def test_passes_inside_do_not_see_each_other(kind):
    model = normalizing(kind)
    x = images()
    want = copy.deepcopy(model).eval()(x)
    with frozen_statistics(model):
        model.train()(images() * 9)
        assert torch.equal(model.eval()(x), want)
        state = copy.deepcopy(model.state_dict())
    assert_same(state, model.state_dict())


def test_what_is_loaded_inside_stays():
    model, other = normalizing("torch.nn"), normalizing("torch.nn")
    with frozen_statistics(model):
        model.load_state_dict(other.state_dict())
        model(images())
    assert_same(statistics_of(model), statistics_of(other))


def test_frozen_layers_and_layers_without_statistics_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3),
    )  # fmt: skip
    model(images())
    freeze(model, where=["0", "2"])
    freeze(model, where="1", statistics="batch")
    before, bits = everything(model), statistics_of(model)
    with frozen_statistics(model):
        model(images())
    assert_same_state(everything(model), before)
    assert_same(statistics_of(model), bits)
    unfreeze(model)
    assert all(layer.track_running_stats for layer in model[:3])


def test_an_exported_program_that_trains():
    model = normalizing("torch.nn")
    program = torch.export.export(model, (images(),)).module()
    bits = statistics_of(program)
    with frozen_statistics(program):
        program(images())
    assert_same(statistics_of(program), bits)
    program(images())
    assert not torch.equal(program.get_buffer("1.running_mean"), bits["1.running_mean"])


@pytest.mark.as_installed
@pytest.mark.parametrize("kind", ["torch.nn", "this library", "own forward"])
def test_compiled_models_leave_no_trace(kind):
    torch._dynamo.reset()
    model = normalizing(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    want = compiled(x)
    bits = statistics_of(model)
    with frozen_statistics(compiled):
        torch.testing.assert_close(compiled(x), want)
    assert_same(statistics_of(model), bits)
    compiled(x)
    assert not torch.equal(model[1].running_mean, bits["1.running_mean"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_left_without_a_trace_is_refused():
    with (
        pytest.raises(ValueError, match="0 is lazy"),
        frozen_statistics(nn.Sequential(nn.LazyBatchNorm1d())),
    ):
        pass
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="0 is scripted"), frozen_statistics(scripted):
        pass


def test_switches_are_read_off_any_layer():
    layers = {
        nn.BatchNorm1d(3): ("batch", True, True),
        nn.BatchNorm1d(3, affine=False): ("batch", True, False),
        nn.BatchNorm1d(3, track_running_stats=False): ("batch", False, True),
        BatchNorm1d(3, statistics=Running()): ("running", False, True),
        BatchNorm1d(3, statistics=Renorm()): ("batch", True, True),
    }
    for layer, switches in layers.items():
        assert isinstance(layer, TorchBatchNorm)
        assert Switches.of(layer) == Switches(*switches)


def test_a_freeze_under_another_is_undone_after_it():
    model = nn.Sequential(nn.BatchNorm1d(3))
    first = freeze(model)
    second = freeze(model, updates=True)
    with pytest.raises(ValueError, match="0 has been frozen otherwise since; undo that first"):
        first.undo()
    assert Switches.of(model[0]) == second.layers[0].after
    second.undo()
    first.undo()
    assert type(model[0]) is nn.BatchNorm1d
    assert Switches.of(model[0]) == Switches("batch", True, True)
