import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, rematerialize
from batchnorm.functional import again
from batchnorm.functional.recipe import observer
from batchnorm.repair import rematerialization
from processes import run_ranks


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Residual(nn.Module):
    """A basic block; the shortcut is projected where the shape changes."""

    def __init__(self, inputs, outputs, stride=1, act="relu"):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, stride), BatchNorm2d(outputs, act=act)
        self.conv2, self.norm2 = conv(outputs, outputs), BatchNorm2d(outputs, act=act)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs)
            )

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.shortcut(x))


class PreActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = BatchNorm2d(channels, act="relu"), conv(channels, channels)
        self.norm2, self.conv2 = BatchNorm2d(channels, act="relu"), conv(channels, channels)

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


def chain(act="relu", **options):
    layers = []
    for _ in range(4):
        layers += [conv(8, 8), BatchNorm2d(8, act=act, **options)]
    return nn.Sequential(conv(3, 8), *layers, nn.Flatten(), nn.Linear(8 * 36, 5))


def residual(act="relu"):
    return nn.Sequential(
        conv(3, 8), BatchNorm2d(8, act=act), Residual(8, 8, act=act), Residual(8, 8, act=act),
        Residual(8, 12, stride=2, act=act), nn.Flatten(), nn.Linear(12 * 9, 5),
    )  # fmt: skip


def pre_activation():
    return nn.Sequential(
        conv(3, 8), PreActivation(8), PreActivation(8), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


MODELS = {
    "chain": chain,
    "chain, silu": lambda: chain("silu"),
    "chain, ghost": lambda: chain(statistics=Ghost(4)),
    "chain, uneven ghost": lambda: chain(statistics=Ghost(5)),
    "residual": residual,
    "residual, gelu": lambda: residual("gelu"),
    "pre-activation": pre_activation,
}


def images(n=8):
    return torch.randn(n, 3, 6, 6)


def everything(model, x, passes=1):
    """Loss, all gradients and all buffers."""
    for _ in range(passes):
        loss = model(x).square().mean()
        loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    return [loss.detach(), *gradients, *model.buffers()]


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


def storages_of_outputs(model):
    """Weak references to the memory of what the fused layers return, filled by a forward pass."""
    found = []
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.register_forward_hook(
                lambda m, i, y: found.append(StorageWeakRef(y.untyped_storage()))
            )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_buffers_are_the_same_bits(name):
    model, x = MODELS[name](), images()
    twin = copy.deepcopy(model)
    rematerialize(twin)
    assert_same_bits(everything(twin, x, passes=2), everything(model, x, passes=2))


@pytest.mark.parametrize("name", ["chain", "residual", "pre-activation"])
def test_outputs_are_not_kept(name):
    model, x = MODELS[name](), images()
    kept = storages_of_outputs(model)
    loss = model(x).sum()
    assert not any(storage.expired() for storage in kept)
    kept.clear()
    with rematerialize(model):
        loss = model(x).sum()
    assert all(storage.expired() for storage in kept)
    assert len(kept) >= 4
    loss.backward()


def test_nothing_is_kept_after_the_backward_pass(monkeypatch):
    model, rebuilt = residual(), []

    def remember(how):
        y = again(how)
        rebuilt.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(rematerialization, "again", remember)
    with rematerialize(model):
        loss = model(images()).sum()
        loss.backward()
    assert len(rebuilt) > 4
    assert all(storage.expired() for storage in rebuilt)


def test_a_chain_of_residual_blocks_is_rebuilt_once(monkeypatch):
    blocks, rebuilt = nn.Sequential(*(Residual(4, 4) for _ in range(6))), []
    monkeypatch.setattr(rematerialization, "again", lambda how: rebuilt.append(how) or again(how))
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    with rematerialize(blocks):
        blocks(x).sum().backward()
    # twelve outputs; the last one nobody saves
    assert len(rebuilt) == 11


def test_what_is_rebuilt_has_the_layout_and_dtype_it_had():
    model = nn.Sequential(conv(3, 8), BatchNorm2d(8, act="relu"), conv(8, 4))
    model, x = (part.to(memory_format=torch.channels_last) for part in (model, images()))
    twin = copy.deepcopy(model)
    rematerialize(twin)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(everything(twin, x), everything(model, x))


def test_two_backward_passes_through_one_graph():
    results = []
    model, x = residual(), images()
    for wrap in (False, True):
        twin = copy.deepcopy(model)
        if wrap:
            rematerialize(twin)
        loss = twin(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in twin.parameters()])
    assert_same_bits(*results)


def test_second_derivatives_run_through_what_is_rebuilt():
    results = []
    model, x = residual("silu").double(), images().double()
    for wrap in (False, True):
        twin = copy.deepcopy(model)
        if wrap:
            rematerialize(twin)
        parameters = list(twin.parameters())
        first = torch.autograd.grad(twin(x).square().mean(), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, parameters))
    assert_same_bits(*results)


def test_gradients_accumulate():
    model, x = chain(), images()
    twin = copy.deepcopy(model)
    rematerialize(twin)
    for part in x.split(4):
        want, got = everything(model, part), everything(twin, part)
    assert_same_bits(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_nests_with_activation_checkpoints(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(conv(3, 8), BatchNorm2d(8, act="relu"))
            self.block, self.head = Residual(8, 8), Residual(8, 8)

        def forward(self, x):
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=reentrant))

    model, x = Checkpointed(), images()
    twins = [copy.deepcopy(model) for _ in range(2)]
    rematerialize(twins[0])
    rematerialize(twins[1].block)  # inside of the checkpoint
    want = everything(model, x)
    for twin in twins:
        assert_same_bits(everything(twin, x), want)


class Modifies(nn.Module):
    """Something is added to a layer's output where it lies, before others save it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = conv(3, 8), BatchNorm2d(8, act="relu"), conv(8, 4)

    def forward(self, x):
        y = self.norm(self.first(x))
        y.add_(1)
        return self.second(y)


def test_an_output_that_was_modified_is_kept_as_it_is():
    model, x = Modifies(), images()
    twin = copy.deepcopy(model)
    kept = storages_of_outputs(twin)
    rematerialize(twin)
    assert_same_bits(everything(twin, x), everything(model, x))
    twin(x).sum()
    loss = twin(x).sum()
    assert not kept[-1].expired()
    del loss


def test_parts_of_an_output_are_rebuilt_as_parts():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = conv(3, 8), BatchNorm2d(8, act="relu")
            self.left, self.right = conv(4, 4), conv(4, 4)

        def forward(self, x):
            left, right = self.norm(self.first(x)).split(4, dim=1)
            return self.left(left) * self.right(right)

    model, x = Halves(), images()
    twin = copy.deepcopy(model)
    rematerialize(twin)
    assert_same_bits(everything(twin, x), everything(model, x))


def test_frozen_layers_and_masks():
    model = nn.ModuleDict(
        {"embed": nn.Conv1d(3, 8, 3, padding=1), "norm": BatchNorm1d(8, act="relu")}
    )
    model["head"] = nn.Conv1d(8, 2, 3, padding=1)
    x, mask = torch.randn(4, 3, 10), torch.rand(4, 10) < 0.7

    class Padded(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            parts = self.parts
            return parts["head"](parts["norm"](parts["embed"](x), mask=mask))

    want, got = Padded(model), Padded(copy.deepcopy(model))
    rematerialize(got)
    assert_same_bits(everything(got, x), everything(want, x))
    for padded in (want, got):
        padded.parts["norm"].freeze()
        padded.zero_grad()
    loss = [padded(x).square().sum() for padded in (got, want)]
    weights = [padded.parts["head"].weight for padded in (got, want)]
    a, b = (torch.autograd.grad(part, w)[0] for part, w in zip(loss, weights, strict=True))
    assert torch.equal(a, b)


def test_an_exception_in_forward_leaves_nothing_behind():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3, act="relu")

        def forward(self, x):
            self.norm(x)
            raise LookupError("on purpose")

    model = Fails()
    rematerialize(model)
    for _ in range(2):
        with pytest.raises(LookupError, match="on purpose"):
            model(torch.randn(4, 3))
    assert observer.notify is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_removing_it_and_leaving_its_context_end_it():
    model, x = chain(), images()
    kept = storages_of_outputs(model)
    with rematerialize(model):
        inside = model(x).sum()
    assert all(storage.expired() for storage in kept)
    kept.clear()
    outside = model(x).sum()
    assert not any(storage.expired() for storage in kept)
    kept.clear()
    handle = rematerialize(model)
    handle.remove()
    after = model(x).sum()
    assert not any(storage.expired() for storage in kept)
    for loss in (inside, outside, after):
        loss.backward()


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_rematerializes_too(way):
    model = residual()
    rematerialize(model)
    twin = way(model)
    kept, x = storages_of_outputs(twin), images()
    assert_same_bits(everything(twin, x), everything(model, x))
    kept.clear()
    loss = twin(x).sum()
    assert all(storage.expired() for storage in kept)
    loss.backward()


def test_inputs_that_change_before_the_backward_pass_are_an_error():
    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = conv(3, 8), BatchNorm2d(8, act="relu"), conv(8, 4)

        def forward(self, x):
            self.between = self.first(x)
            return self.second(self.norm(self.between))

    model = Leaks()
    with rematerialize(model):
        loss = model(images()).sum()
    with torch.no_grad():
        model.between.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place: shape \(8, 8, 6, 6\)"):
        torch.autograd.grad(loss, model.second.weight)


@pytest.mark.as_installed
def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        rematerialize(lambda x: x)


def _ranks_agree(rank, world):
    torch.manual_seed(0)
    model, x = residual(), images()
    twin = copy.deepcopy(model)
    rematerialize(twin)
    for wrapped in (DistributedDataParallel(model), DistributedDataParallel(twin)):
        wrapped(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_ddp():
    run_ranks(2, _ranks_agree)


@pytest.mark.as_installed
def test_a_compiled_model_is_left_to_its_compiler():
    torch._dynamo.reset()
    model, x = chain(), images()
    rematerialize(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for a, b in zip(everything(compiled, x), everything(twin, x), strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_lost_its_memory_to_another_tensor_is_not_taken_for_it():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3, act="relu")

        def forward(self, x, weight):
            y = self.norm(x)
            memory, y.data = y.untyped_storage(), torch.empty(0)
            self.y = y  # alive: its note is not forgotten
            other = torch.empty(0).set_(memory, 0, x.shape).fill_(1)  # as an allocator would
            return other * weight

    model, x = Reuses(), torch.randn(500, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    with rematerialize(model):
        out = model(x, weight)
    (dw,) = torch.autograd.grad(out.sum(), weight)
    assert dw.tolist() == [500, 500, 500]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("lasting", [True, False])
def test_a_forward_pass_that_was_broken_off_leaves_no_hooks(stopped, lasting):
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.stops = BatchNorm1d(3, act="relu"), True

        def forward(self, x):
            y = self.norm(x).exp()
            if self.stops:
                raise stopped
            return y

    model, x = Stops(), torch.randn(4, 3, requires_grad=True)
    if lasting:
        handle = rematerialize(model)
        for _ in range(3):  # the next pass puts away what the last one left
            with pytest.raises(stopped):
                model(x)
        assert len(handle._running._begun) == 1
        model.stops = False
        model(x).sum().backward()
    else:
        with pytest.raises(stopped), rematerialize(model):
            model(x)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert observer.notify is None


def test_the_pass_after_one_that_was_broken_off_keeps_no_outputs():
    model, x = chain(), images()
    handle = rematerialize(model)
    breaking = model[-1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    breaking.remove()
    kept = storages_of_outputs(model)
    loss = model(x).sum()
    assert len(kept) == 4
    assert all(storage.expired() for storage in kept)
    handle.remove()
    loss.backward()


def interrupted(module, inputs):
    raise KeyboardInterrupt


def test_nothing_outlives_a_pass_but_what_the_graph_keeps():
    model, x = chain(), images()
    rematerialize(model)
    model(x).sum().backward()  # kernels are loaded, and leave cycles, before it is counted
    gc.collect()
    gc.disable()
    try:
        inputs = []
        for layer in model:
            if isinstance(layer, BatchNorm2d):
                layer.register_forward_pre_hook(
                    lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))
                )
        for _ in range(2):
            model(x).sum().backward()
        assert len(inputs) == 8
        assert all(storage.expired() for storage in inputs)
        assert gc.collect() == 0  # nor a cycle, with the caller's own tensors in it
    finally:
        gc.enable()


def test_other_hooks_around_the_model_decide_what_is_kept():
    model, x = chain(), images()
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    rematerialize(model)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(seen) > 5
    assert all(map(torch.equal, got, want))
    kept = []
    model[0].register_forward_hook(lambda *a: kept.append(StorageWeakRef(a[2].untyped_storage())))
    y = checkpoint(model, x, use_reentrant=False)
    assert kept[0].expired()  # the checkpoint's, not the recipe's, whose input it would be
    kept.clear()
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), model.parameters()), want))


def test_torch_func_goes_through_a_rematerialized_model():
    model, x = chain().eval(), images()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    want = torch.func.grad(loss)(parameters)
    rematerialize(model)
    got = torch.func.grad(loss)(parameters)
    assert all(torch.equal(got[name], want[name]) for name in want)
