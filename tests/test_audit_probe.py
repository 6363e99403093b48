from __future__ import annotations

import copy
import gc
import random
import re
import threading
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    register_module_forward_hook,
)
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, LazyBatchNorm1d, Renorm, Running
from batchnorm.audit import RULES, Finding, Probe, Rule, Severity

BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d], ids=["torch", "ours"])


class Calls(Rule):
    """Keeps the calls it is shown."""

    code = "BN998"
    name = "calls"
    looks_at = "tests"

    def __init__(self):
        self.befores, self.afters = [], []
        type(self).last = self

    def before(self, call):
        self.befores.append(call)

    def after(self, call):
        self.afters.append(call)

    def findings(self):
        return iter(())


def paths(probe: Probe) -> list[str]:
    """Of the layers called, in the order of their first calls."""
    return list(dict.fromkeys(call.path for call in Calls.last.befores))


# Watching changes nothing

NORMS = {
    "torch": nn.BatchNorm1d,
    "torch, average": lambda c: nn.BatchNorm1d(c, momentum=None),
    "torch, nothing tracked": lambda c: nn.BatchNorm1d(c, track_running_stats=False),
    "torch, momentum 0": lambda c: nn.BatchNorm1d(c, momentum=0.0),
    "ours": BatchNorm1d,
    "ours, average": lambda c: BatchNorm1d(c, momentum=None),
    "ours, act": lambda c: BatchNorm1d(c, act="gelu"),
    "ours, ghost": lambda c: BatchNorm1d(c, statistics=Ghost(4)),
    "ours, renorm": lambda c: BatchNorm1d(c, statistics=Renorm()),
    "ours, frozen": lambda c: BatchNorm1d(c).freeze(),
}


def trained(norm, watched: bool, checkpointing: bool | None = None) -> tuple[dict, Probe | None]:
    """Everything that a short run with dropout leaves behind, forgotten eval and all."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    body = nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Dropout(0.3))
    model = nn.Sequential(body, nn.Sequential(nn.Linear(8, 8), norm(8)), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, outputs = [], []
    with Probe() if watched else nullcontext() as probe:
        for step in range(24):
            x, y = torch.randn(10, 6), torch.randint(2, (10,))
            model.train()
            if checkpointing is None:
                z = model(x)
            else:
                z = checkpoint(body, x.requires_grad_(), use_reentrant=checkpointing)
                z = model[2](model[1](z))
            optimizer.zero_grad()
            loss = F.cross_entropy(z, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if step % 6 == 5:
                with torch.no_grad():
                    outputs.append(model(x))  # the classic mistake
                model.eval()
                with torch.inference_mode():
                    outputs.append(model(x))
    left = {
        **{f"loss {i}": value for i, value in enumerate(losses)},
        **{f"output {i}": value for i, value in enumerate(outputs)},
        **model.state_dict(),
        **{f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        "torch's random state": torch.get_rng_state(),
        "python's and numpy's next number": torch.tensor(
            [random.random(), np.random.random()],  # noqa: NPY002, S311 - the global ones
            dtype=torch.float64,
        ),
    }
    return left, probe


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


@pytest.mark.as_installed  # beartype draws from python's random numbers
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_watching_leaves_every_bit_of_a_run_alone(norm):
    plain, _ = trained(norm, watched=False)
    watched, probe = trained(norm, watched=True)
    assert_same_bits(watched, plain)
    report = probe.report()
    assert (report.layers, report.disabled) == (2, {})
    assert report.calls == 2 * (24 + 4 + 4)


@pytest.mark.as_installed
@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_watching_leaves_a_checkpointed_run_alone(norm, use_reentrant):
    plain, _ = trained(norm, watched=False, checkpointing=use_reentrant)
    watched, probe = trained(norm, watched=True, checkpointing=use_reentrant)
    assert_same_bits(watched, plain)
    assert probe.report().disabled == {}


@BOTH
def test_watching_writes_nothing_into_the_layer(norm):
    layer, unwatched = norm(3), norm(3)
    x = torch.randn(5, 3)
    with Probe():
        layer(x)
    unwatched(x)
    assert vars(layer).keys() == vars(unwatched).keys()
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 0
    assert torch.equal(copy.deepcopy(layer).running_mean, unwatched.running_mean)


@BOTH
def test_watching_keeps_no_activation_alive(norm):
    layer = norm(3, momentum=0.0)  # BN103 has to look at the input itself
    with Probe() as probe:
        inputs = []
        for _ in range(20):
            x = torch.randn(5, 3)
            inputs.append(weakref.ref(x))
            layer(x)
        del x
        gc.collect()
        assert [ref for ref in inputs if ref() is not None] == []
    assert probe.report().calls == 20


def test_the_probe_leaves_no_hook_behind():
    with Probe():
        assert len(_global_forward_hooks) == len(_global_forward_pre_hooks) == 1
    assert len(_global_forward_hooks) == len(_global_forward_pre_hooks) == 0


def test_the_probe_leaves_no_hook_behind_when_the_run_fails():
    with pytest.raises(RuntimeError, match="out of memory"), Probe():
        raise RuntimeError("out of memory")
    assert len(_global_forward_hooks) == len(_global_forward_pre_hooks) == 0


def test_the_probe_leaves_hooks_of_others_alone():
    seen = []
    handle = register_module_forward_hook(lambda *call: seen.append(call))
    try:
        with Probe():
            nn.BatchNorm1d(3)(torch.randn(4, 3))
        nn.BatchNorm1d(3)(torch.randn(4, 3))
        assert len(seen) == 2
    finally:
        handle.remove()


def test_calls_after_the_context_are_not_counted():
    layer = nn.BatchNorm1d(3)
    with Probe() as probe:
        layer(torch.randn(4, 3))
    layer(torch.randn(4, 3))
    assert probe.report().calls == 1


# What is seen


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": norm(3)})["norm"])
        self.out = norm(3)

    def forward(self, x):
        return self.out(x + self.branch(x))


@BOTH
def test_paths_are_those_of_the_nested_model(norm):
    with Probe([Calls]) as probe:
        nn.Sequential(nn.Linear(3, 3), Residual(norm), Residual(norm))(torch.randn(4, 3))
    assert paths(probe) == [
        "Sequential.1.branch.1",
        "Sequential.1.out",
        "Sequential.2.branch.1",
        "Sequential.2.out",
    ]
    assert (probe.report().layers, probe.report().calls) == (4, 4)


def test_two_models_in_one_script_are_told_apart_by_their_classes():
    class Generator(Residual):
        pass

    generator, discriminator = Generator(nn.BatchNorm1d), nn.Sequential(BatchNorm1d(3))
    with Probe([Calls]) as probe:
        for _ in range(2):
            discriminator(generator(torch.randn(4, 3)))
    assert paths(probe) == ["Generator.branch.1", "Generator.out", "Sequential.0"]
    assert (probe.report().layers, probe.report().calls) == (3, 6)


def test_a_layer_used_twice_is_one_layer():
    layer = nn.BatchNorm1d(3)
    with Probe([Calls]) as probe:
        nn.Sequential(layer, nn.ReLU(), layer)(torch.randn(4, 3))
    assert (probe.report().layers, probe.report().calls) == (1, 2)
    assert paths(probe) == ["Sequential.0"]


def test_other_modules_are_not_watched():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.InstanceNorm1d(5))
    with Probe([Calls]) as probe:
        model(torch.randn(4, 5, 3))
    assert (probe.report().layers, probe.report().calls) == (0, 0)


@pytest.mark.parametrize("norm", [nn.LazyBatchNorm1d, LazyBatchNorm1d], ids=["torch", "ours"])
def test_a_lazy_layer_is_watched_and_switches_no_rule_off(norm):
    model = nn.Sequential(nn.LazyLinear(3), norm(momentum=0.001))
    with Probe() as probe:
        for _ in range(40):
            model(torch.randn(8, 3) + 5)
        model.eval()
        model(torch.randn(8, 3))
    report = probe.report()
    assert report.disabled == {}
    assert [(f.code, f.modules) for f in report.findings] == [("BN103", ("Sequential.1",))]


@BOTH
def test_a_layer_called_by_keyword_is_watched_without_its_input(norm):
    layer = norm(3)
    with Probe([Calls, *RULES]) as probe:
        for _ in range(20):
            layer(input=torch.randn(8, 3))
        layer.eval()
        layer(input=torch.randn(1, 3))
    report = probe.report()
    assert (report.disabled, report.findings, report.calls) == ({}, (), 21)
    assert {call.input for call in Calls.last.befores} == {None}


@BOTH
def test_a_rule_hears_before_and_after_the_statistics_move(norm):
    layer = norm(3)

    class Means(Calls):
        def before(self, call):
            self.befores.append(call.layer.running_mean.clone())

        def after(self, call):
            self.afters.append(call.layer.running_mean.clone())

    x = torch.randn(4, 3) + 1
    with Probe([Means]):
        layer(x)
    ((before,), (after,)) = Means.last.befores, Means.last.afters
    assert before.tolist() == [0, 0, 0]
    torch.testing.assert_close(after, 0.1 * x.mean(0))


@BOTH
def test_a_rule_hears_whether_gradients_are_on_and_has_them_off_itself(norm):
    modes = []

    class Modes(Calls):
        def before(self, call):
            modes.append((call.has_gradients, torch.is_grad_enabled()))

    layer, x = norm(3), torch.randn(4, 3)
    with Probe([Modes]):
        layer(x)
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        assert torch.is_grad_enabled()
    assert modes == [(True, False), (False, False), (False, False)]


def switched_off(layer: nn.Module) -> nn.Module:
    layer.track_running_stats = False
    return layer


# layer, in training: moves its statistics, uses the batch's, smallest slice of 5 samples × 6
CASES = {
    "torch": (nn.BatchNorm2d(3), True, True, 30),
    "torch in eval": (nn.BatchNorm2d(3).eval(), False, False, 30),
    "torch without statistics": (nn.BatchNorm2d(3, track_running_stats=False), False, True, 30),
    "torch without statistics in eval": (
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        False,
        True,
        30,
    ),
    "torch, tracking switched off": (switched_off(nn.BatchNorm2d(3)), False, True, 30),
    "ours": (BatchNorm2d(3), True, True, 30),
    "ours, tracking switched off": (switched_off(BatchNorm2d(3)), False, True, 30),
    "ours in eval": (BatchNorm2d(3).eval(), False, False, 30),
    "ghost": (BatchNorm2d(3, statistics=Ghost(4)), True, True, 6),
    "running": (BatchNorm2d(3, statistics=Running()), False, False, 0),
    "frozen": (BatchNorm2d(3).freeze(), False, False, 0),
    "renorm": (BatchNorm2d(3, statistics=Renorm()), True, True, 30),
}


@pytest.mark.parametrize(("layer", "tracks", "uses_batch", "values"), CASES.values(), ids=CASES)
def test_a_call_says_what_the_layer_will_do(layer, tracks, uses_batch, values):
    layer = copy.deepcopy(layer)
    before = None if layer.running_mean is None else layer.running_mean.clone()
    with Probe([Calls]):
        layer(torch.randn(5, 3, 2, 3) + 1)
    (call,) = Calls.last.befores
    assert (call.tracks, call.normalizes_with_batch) == (tracks, uses_batch)
    assert call.smallest_slice == values
    # and it did
    moved = before is not None and not torch.equal(before, layer.running_mean)
    assert moved == tracks


# Rules that raise


class Fine(Calls):
    code = "BN997"
    name = "fine"

    def findings(self):
        yield Finding(self.code, Severity.INFO, f"{len(self.afters)} calls", (), "nothing")


def broken(moment: str) -> type[Rule]:
    def fail(self, *_):
        type(self).attempts += 1
        raise ZeroDivisionError(f"in {moment}")

    body = {"code": "BN999", "name": "broken", "looks_at": "tests", "attempts": 0}
    return type("Broken", (Rule,), body | {"findings": lambda self: iter(()), moment: fail})


@pytest.mark.parametrize("moment", ["before", "after", "findings"])
def test_a_rule_that_raises_is_switched_off_and_the_run_goes_on(moment):
    rule = broken(moment)
    model, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    batches = torch.randn(4, 8, 3)
    with Probe([rule, Fine]) as probe:
        outputs = [model(x) for x in batches]
    assert all(torch.equal(y, plain(x)) for x, y in zip(batches, outputs, strict=True))
    report = probe.report()
    assert report.disabled == {"BN999": f"ZeroDivisionError: in {moment}"}
    assert [(f.code, f.message) for f in report.findings] == [("BN997", "4 calls")]
    assert rule.attempts == 1  # and not asked again


def test_the_rules_of_the_library_go_on_where_another_raises():
    layer = BatchNorm1d(3)
    with Probe([broken("after"), *RULES]) as probe, torch.no_grad():
        layer(torch.randn(4, 3))
    report = probe.report()
    assert list(report.disabled) == ["BN999"]
    assert [f.code for f in report.findings] == ["BN108"]


def test_findings_come_worst_first_and_again_when_asked_again():
    class Info(Fine):
        code = "BN990"

    class Error(Fine):
        code = "BN996"

        def findings(self):
            for name in ("b", "a"):
                yield Finding(self.code, Severity.ERROR, "", (name,), "")

    class Warned(Fine):
        def findings(self):
            yield Finding("BN991", Severity.WARNING, "", (), "")

    with Probe([Info, Warned, Error]) as probe:
        pass
    report = probe.report()
    order = [(f.code, f.modules) for f in report.findings]
    assert order == [("BN996", ("a",)), ("BN996", ("b",)), ("BN991", ()), ("BN990", ())]
    assert report.rules == ("BN990", "BN997", "BN996")
    assert probe.report() == report


# Compilers


@pytest.mark.as_installed
def test_the_probe_adds_no_warning_to_a_compiled_run():
    torch._dynamo.reset()
    try:
        with Probe():  # torch warns of global hooks
            torch.compile(nn.BatchNorm1d(3), backend="eager")(torch.randn(4, 3))
    finally:
        torch._dynamo.reset()


@pytest.mark.as_installed
@pytest.mark.filterwarnings("ignore:Using .torch.compile.* when there are global hooks")
@BOTH
def test_a_compiled_model_runs_under_the_probe_in_one_graph(norm):
    torch._dynamo.reset()
    batches = torch.randn(3, 8, 4)

    def run(compiled: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), norm(3), nn.ReLU())
        call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for x in batches:
            call(x).square().sum().backward()
        model.eval()
        return [call(batches[0]).detach(), *model.state_dict().values(), model[0].weight.grad]

    plain = run(compiled=False)
    try:
        with Probe() as probe:
            watched = run(compiled=True)
        assert probe.report().disabled == {}
        for ours, theirs in zip(watched, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        torch._dynamo.reset()


@pytest.mark.as_installed
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_traced_under_the_probe_as_without(norm, training):
    def graph(watched: bool) -> str:
        torch.manual_seed(0)
        model = norm(3)
        with Probe() if watched else nullcontext():
            for _ in range(19):  # in the next pass BN103 would look at the statistics
                model(torch.randn(8, 3))
            traced = torch.jit.trace(model.train(training), torch.randn(4, 3))
        return str(traced.inlined_graph)

    operators = [re.findall(r"aten::\w+", graph(watched)) for watched in (False, True)]
    assert operators[0] != []
    assert operators[0] == operators[1]


@pytest.mark.as_installed
@BOTH
def test_a_model_is_recorded_under_the_probe_as_without(norm):
    def operators(watched: bool) -> list[str]:
        model = nn.Sequential(norm(3), nn.Linear(3, 2))
        with Probe() if watched else nullcontext():
            for _ in range(20):
                model(torch.randn(8, 3))
            graph = make_fx(model.eval())(torch.randn(4, 3)).graph
        return [str(node.target) for node in graph.nodes]

    assert operators(watched=True) == operators(watched=False)


@BOTH
def test_a_model_without_data_switches_no_rule_off(norm):
    with Probe() as probe:
        for device in ("meta", "cpu"):
            layer = norm(3, momentum=0.001, device=device)
            for _ in range(20):
                layer(torch.randn(8, 3, device=device) + 5)
            layer.eval()(torch.randn(8, 3, device=device))
    report = probe.report()
    assert report.disabled == {}
    assert [f.code for f in report.findings] == ["BN103"]


def test_an_output_that_is_saved_warns_of_nothing(tmp_path):
    layer = nn.BatchNorm1d(3)
    with Probe() as probe:
        y = layer(torch.randn(4, 3))
        torch.save(y, tmp_path / "y.pt")
    assert probe.report().disabled == {}
    assert torch.equal(torch.load(tmp_path / "y.pt"), y)


def test_a_history_that_fails_in_a_backward_pass_leaves_the_run_alone(monkeypatch):
    def fails(*arguments):
        raise ArithmeticError("no norm")

    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    monkeypatch.setattr("batchnorm.audit.layer_history.LayerHistory.note_gradient", fails)
    with Probe() as probe:
        layer(x).square().sum().backward()
    report = probe.report()
    assert x.grad is not None
    assert report.disabled["BN103"] == "RuntimeError: in a backward pass: ArithmeticError: no norm"
    assert "BN108" not in report.disabled  # it looks for itself


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.mul_(2), lambda y: y.view(-1).add_(1)])
def test_what_becomes_of_an_output_in_place_is_the_user_s(change):
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        layer = nn.BatchNorm1d(3)
        x = torch.randn(4, 3, requires_grad=True)
        with Probe() if watched else nullcontext():
            y = layer(x)
            change(y)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            g.square().sum().backward()
        gradients.append((g.detach(), x.grad, layer.weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_run_in_another_precision_is_watched_as_any_other(dtype):
    layer = nn.BatchNorm1d(3, dtype=dtype)
    with Probe() as probe:
        for _ in range(8):
            layer(torch.randn(4, 3, dtype=dtype)).square().sum().backward()
    report = probe.report()
    assert report.disabled == {}
    assert len(report.profiles[0].gradients) == 3


def test_a_pass_that_failed_keeps_nothing_alive():
    class Fails(nn.BatchNorm1d):
        def forward(self, input):
            raise ValueError("out of memory, say")

    with Probe() as probe:
        model = nn.Sequential(nn.Linear(3, 3), Fails(3))
        x = torch.randn(4, 3)
        gone = weakref.ref(model), weakref.ref(x)
        with pytest.raises(ValueError, match="out of memory"):
            model(x)
        del model, x
        gc.collect()
        assert [reference() for reference in gone] == [None, None]
    assert probe.report().disabled == {}


def test_a_layer_pruned_in_mid_run_is_reported_with_what_is_left_of_it():
    layer = nn.BatchNorm1d(6, momentum=0.001)
    with Probe() as probe:
        for channels in (6, 3):
            if channels == 3:
                layer.num_features = 3
                for name in ("weight", "bias"):
                    setattr(layer, name, nn.Parameter(getattr(layer, name)[:3]))
                for name in ("running_mean", "running_var"):
                    setattr(layer, name, getattr(layer, name)[:3])
            for _ in range(30):
                layer(torch.randn(8, channels) + 5)
        report = probe.report()
    assert report.disabled == {}
    assert report.profiles[0].channels == 3
    assert [finding.code for finding in report.findings] == ["BN103"]


def test_a_layer_s_own_switch_of_gradients_stays_its_own():
    class Off(nn.BatchNorm1d):
        def forward(self, input):
            torch.set_grad_enabled(False)
            return super().forward(input)

    with Probe():
        try:
            Off(3)(torch.randn(4, 3))
            assert not torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)


def test_parameters_that_are_no_leaves_are_left_alone():
    layer = nn.BatchNorm1d(3)
    parameters = {name: (p * 1.0) for name, p in layer.named_parameters()}  # fast weights
    with Probe() as probe:
        y = torch.func.functional_call(layer, parameters, (torch.randn(4, 3),))
        y.square().sum().backward()  # warnings are errors
    assert probe.report().disabled == {}


def test_models_in_several_threads_are_watched():
    def train():
        for _ in range(20):
            layer = nn.BatchNorm1d(3)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            for _ in range(5):
                layer(torch.randn(4, 3)).sum().backward()
                optimizer.step()

    with Probe() as probe:
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert probe.report().disabled == {}


def test_what_is_remembered_of_very_many_models_is_bounded(monkeypatch):
    monkeypatch.setattr("batchnorm.audit.history.ROOM", 8)
    with Probe() as probe:
        for _ in range(100):
            layer = nn.BatchNorm1d(3, momentum=0.001)
            for _ in range(25):
                layer(torch.randn(8, 3) + 5)
            del layer
        assert len(probe._history._layers) <= 256 + 8
    report = probe.report()
    assert (report.disabled, len(report.profiles)) == ({}, 100)
    assert [f.code for f in report.findings].count("BN103") == 100
