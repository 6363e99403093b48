import copy
import gc
import threading
from contextlib import suppress
from contextvars import ContextVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, LazyBatchNorm2d, rematerialize
from batchnorm.repair.accumulation import accumulate
from batchnorm.repair.pooling import lockstep, pooled_forward

BOTH = {"torch.nn": nn.BatchNorm2d, "ours": BatchNorm2d}


both_norms = pytest.mark.parametrize("norm", BOTH.values(), ids=BOTH)


class Residual(nn.Module):
    """A basic block; one norm serves twice."""

    def __init__(self, norm, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = norm(channels)
        self.fused = norm(channels, act="relu") if norm is BatchNorm2d else None

    def forward(self, x):
        y = F.relu(self.norm(self.conv1(x)))
        if self.fused is not None:
            y = self.fused(y, residual=x)
        return F.relu(self.norm(self.conv2(y)) + x)


def network(norm, dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(inplace=True), Residual(norm, 6),
        norm(6, affine=False, momentum=None), Residual(norm, 6), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    ).to(dtype)  # fmt: skip


def batches(*sizes, dtype=torch.float64, size=7):
    """Micro-batches whose means lie apart."""
    return [
        (torch.randn(n, 3, size, size, dtype=dtype) + i).requires_grad_()
        for i, n in enumerate(sizes)
    ]


def lanes():
    """The threads of micro-batches that run still."""
    return [thread for thread in threading.enumerate() if isinstance(thread, lockstep._Lane)]


def weighted(outputs):
    """A loss in which each output has its own weight."""
    total = torch.cat(list(outputs))
    return (total * torch.linspace(-1, 1, total.numel()).to(total).view_as(total)).sum()


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_close(ours, theirs, tolerance):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_is_one_pass(model, whole, parts, outputs, tolerance=1e-10):
    """Outputs, gradients and buffers are those of `whole` on the pooled batch."""
    weighted(outputs).backward()
    together = torch.cat([part.detach() for part in parts]).requires_grad_()
    expected = whole(together)
    weighted([expected]).backward()
    assert_close([torch.cat(list(outputs))], [expected], tolerance)
    assert_close(gradients(model), gradients(whole), tolerance)
    assert_close([torch.cat([part.grad for part in parts])], [together.grad], tolerance)
    if list(whole.buffers()):
        assert_close(model.buffers(), whole.buffers(), tolerance)


# ---------------------------------------------------------------------------- the law


@both_norms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_deep_network_computes_what_it_computes_of_the_pooled_batch(norm, dtype, tolerance):
    model, parts = network(norm, dtype), batches(2, 5, 1, 3, dtype=dtype)
    whole = copy.deepcopy(model)
    outputs = pooled_forward(model, parts)
    assert_is_one_pass(model, whole, parts, outputs, tolerance)
    assert model[1].num_batches_tracked == 1
    assert model[3].norm.num_batches_tracked == 2  # called twice


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(lambda s: sum(s) > 1),
    act=st.sampled_from([None, "relu", "silu", "gelu"]),
    has_residual=st.booleans(),
    has_mask=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_layer_computes_what_it_computes_of_the_pooled_batch(
    sizes, act, has_residual, has_mask, has_bias, seed
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    layer = BatchNorm1d(3, act=act, bias=has_bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(random(3))
    whole = copy.deepcopy(layer)
    n = sum(sizes)
    x, residual = random(n, 3, 5), random(n, 3, 5) if has_residual else None
    mask = torch.rand(n, 5, generator=generator) < 0.8 if has_mask else None
    dy = random(n, 3, 5).detach()

    def part(i):
        cut = [None if t is None else t.split(sizes)[i] for t in (x, residual, mask)]
        return {"input": cut[0], "residual": cut[1], "mask": cut[2]}

    outputs = torch.cat(pooled_forward(layer, [part(i) for i in range(len(sizes))]))
    inputs = [t for t in (x, residual) if t is not None]
    found = torch.autograd.grad(outputs, [*inputs, *layer.parameters()], dy)
    expected = whole(x, residual=residual, mask=mask)
    theirs = torch.autograd.grad(expected, [*inputs, *whole.parameters()], dy)
    assert_close([outputs, *found, *layer.buffers()], [expected, *theirs, *whole.buffers()], 1e-9)


def composite(xs, weight, bias):
    """Batch norm of all values of several batches, written down; and its mean and variance."""
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)  # (c, values)
    mean, var = rows.mean(1), rows.var(1, correction=0)
    scale = weight / (var + 1e-5).sqrt()
    shape = (1, -1, 1, 1)
    ys = [(x - mean.view(shape)) * scale.view(shape) + bias.view(shape) for x in xs]
    return ys, rows.mean(1), rows.var(1)


@both_norms
def test_images_of_different_sizes_make_one_batch(norm):
    model = nn.Sequential(norm(3), nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 3)).double()
    xs = [batches(n, size=s)[0] for n, s in ((2, 6), (1, 9), (3, 5))]
    outputs = pooled_forward(model, xs)
    sum(y.square().sum() for y in outputs).backward()
    found, grads = gradients(model), [x.grad for x in xs]

    model.zero_grad()
    for x in xs:
        x.grad = None
    first, mean, _ = composite(xs, model[0].weight, model[0].bias)
    second, _, var = composite([model[1](y) for y in first], model[2].weight, model[2].bias)
    expected = [model[3](y) for y in second]
    sum(y.square().sum() for y in expected).backward()
    assert_close(outputs, expected, 1e-12)
    assert_close(found, gradients(model), 1e-10)
    assert_close(grads, [x.grad for x in xs], 1e-10)
    assert_close([model[0].running_mean], [0.1 * mean], 1e-12)
    assert_close([model[2].running_var], [0.9 + 0.1 * var], 1e-12)


@both_norms
def test_gradients_far_from_zero_are_right_in_single_precision(norm):
    layer, parts = norm(1), [3000 + 0.3 * torch.randn(8, 1, 4, 4) for _ in range(3)]
    dys = [1 + torch.randn(8, 1, 4, 4) for _ in parts]
    for part in parts:
        part.requires_grad_()
    torch.autograd.backward(pooled_forward(layer, parts), dys)
    wide = [part.detach().double().requires_grad_() for part in parts]
    weight, bias = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (1, 0))
    torch.autograd.backward(composite(wide, weight, bias)[0], [dy.double() for dy in dys])
    assert_close([p.grad.double() for p in parts], [x.grad for x in wide], 1e-5)
    assert_close([g.double() for g in gradients(layer)], [weight.grad, bias.grad], 1e-5)


@both_norms
def test_micro_batches_of_one_value_make_a_batch(norm):
    model, parts = norm(3).double(), batches(1, 1, size=1)
    whole = copy.deepcopy(model)
    assert_is_one_pass(model, whole, parts, pooled_forward(model, parts))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pooled_forward(model, parts[:1])


@both_norms
def test_layers_in_eval_mode_work_as_alone(norm):
    model, parts = network(norm), batches(2, 3)
    model[4].eval()
    whole = copy.deepcopy(model)
    assert_is_one_pass(model, whole, parts, pooled_forward(model, parts))
    assert model[4].num_batches_tracked == 0
    model.eval()
    for output, part in zip(pooled_forward(model, parts), parts, strict=True):
        assert torch.equal(output, model(part))


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_frozen_layers_work_as_alone(statistics):
    model, parts = network(BatchNorm2d), batches(2, 3)
    model[1].freeze(statistics=statistics, learns=True)
    whole = copy.deepcopy(model)
    assert_is_one_pass(model, whole, parts, pooled_forward(model, parts))
    assert model[1].num_batches_tracked == 0


def test_layers_without_running_statistics_meet_in_eval_mode_too():
    model, parts = nn.BatchNorm2d(3, track_running_stats=False).double().eval(), batches(2, 3)
    whole = copy.deepcopy(model)
    assert_is_one_pass(model, whole, parts, pooled_forward(model, parts))


@both_norms
def test_an_output_that_nobody_uses_has_no_gradient_of_its_own(norm):
    model, parts = norm(3).double(), batches(2, 3)
    whole = copy.deepcopy(model)
    pooled_forward(model, parts)[0].pow(3).sum().backward()
    together = torch.cat([p.detach() for p in parts]).requires_grad_()
    whole(together)[:2].pow(3).sum().backward()
    assert_close(gradients(model), gradients(whole), 1e-10)
    assert_close([torch.cat([p.grad for p in parts])], [together.grad], 1e-10)


def test_a_batch_that_is_not_finite_is_not_tracked():
    model, parts = nn.BatchNorm2d(3), batches(2, 3, dtype=torch.float32)
    with torch.no_grad():
        parts[1][0, 0, 0, 0] = torch.nan
    pooled_forward(model, parts)
    assert model.num_batches_tracked == 0
    assert_close([model.running_mean, model.running_var], [torch.zeros(3), torch.ones(3)], 0)


def test_batches_are_called_as_trainers_call():
    model, parts = nn.BatchNorm2d(3).double(), batches(2, 3)
    expected = pooled_forward(model, parts)
    for kind in (
        [(p, "label") for p in parts],
        [{"input": p} for p in parts],
        (p for p in parts),
    ):
        assert_close(pooled_forward(model, kind), expected, 0)
    doubled = pooled_forward(model, parts, forward=lambda m, p: 2 * m(p))
    assert_close(doubled, [2 * y for y in expected], 0)


# ---------------------------------------------------------------------------- less memory


@both_norms
@pytest.mark.parametrize("early", [True, False])
def test_checkpoints_around_stages_change_nothing(norm, early):
    model, parts = network(norm), batches(2, 3)
    whole = copy.deepcopy(model)
    outputs = parts
    with set_checkpoint_early_stop(early):
        for stage in model:
            outputs = checkpoint(pooled_forward, stage, outputs, use_reentrant=False)
    assert_is_one_pass(model, whole, parts, outputs)
    assert not lanes()


class Inside(nn.Module):
    def __init__(self, norm, reentrant):
        super().__init__()
        self.norm, self.reentrant = norm(3), reentrant

    def forward(self, x):
        return checkpoint(self.norm, x, use_reentrant=self.reentrant)


@both_norms
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_is_refused(norm, reentrant):
    model = Inside(norm, reentrant).double()
    with pytest.raises(RuntimeError, match="norm is called within an activation checkpoint"):
        pooled_forward(model, batches(2, 3))
    assert model.norm.num_batches_tracked == 0


@both_norms
def test_hooks_for_saved_tensors_see_all_that_is_kept(norm):
    model, parts = network(norm), batches(2, 3)
    whole, packed = copy.deepcopy(model), []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        outputs = pooled_forward(model, parts)
    for n in (2, 3):
        assert packed.count((n, 3, 7, 7)) == 1  # the first convolution's input
        assert packed.count((n, 6, 5, 5)) >= 8
    assert_is_one_pass(model, whole, parts, outputs)


def test_outputs_are_rematerialized():
    conv = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    model = nn.Sequential(conv[0], BatchNorm2d(3, act="relu"), conv[1], BatchNorm2d(3), conv[2])
    model = model.double()
    whole, parts, kept = copy.deepcopy(model), batches(2, 3), []
    for i in (1, 3):
        model[i].register_forward_hook(
            lambda m, args, y: kept.append(StorageWeakRef(y.untyped_storage()))
        )
    with rematerialize(model):
        outputs = pooled_forward(model, parts)
    assert [reference.expired() for reference in kept] == [True] * 4
    assert_is_one_pass(model, whole, parts, outputs)


# ---------------------------------------------------------------------------- the threads


class Spy(nn.Module):
    """Notes what PyTorch's state is in the thread that it is called in."""

    def __init__(self, note):
        super().__init__()
        self.norm, self.note, self.noted = nn.BatchNorm2d(3), note, []

    def forward(self, x):
        before = self.note()
        y = self.norm(x)
        self.noted.append((before, self.note()))
        return y


colour = ContextVar("colour", default="none")

SURROUNDINGS = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled, False),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled, True),
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        (True, torch.bfloat16),
    ),
    "device": (lambda: torch.device("meta"), lambda: torch.empty(1).device.type, "meta"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_threads_have_the_callers_surroundings(name):
    context, note, expected = SURROUNDINGS[name]
    model, parts = Spy(note), batches(2, 3, dtype=torch.float32)
    with context():
        outputs = pooled_forward(model, parts)
    assert model.noted == [(expected, expected)] * 2
    assert note() != expected
    assert outputs[0].requires_grad == (name in ("autocast", "device"))


def test_the_threads_have_the_callers_context_variables():
    model = Spy(colour.get)
    token = colour.set("red")
    pooled_forward(model, batches(2, 3, dtype=torch.float32))
    colour.reset(token)
    assert model.noted == [("red", "red")] * 2


def test_modes_that_count_see_what_the_threads_do():
    model, parts = network(nn.BatchNorm2d), batches(2, 3)
    counts = []
    for run in (lambda: pooled_forward(model, parts), lambda: model(torch.cat(parts))):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Backbone(nn.Module):
    """Its first part records no gradients."""

    def __init__(self):
        super().__init__()
        self.still, self.learning = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        with torch.no_grad():
            x = self.still(x)
        return self.learning(x)


def test_a_part_without_gradients_has_none():
    model, parts = Backbone().double(), batches(2, 3)
    weighted(pooled_forward(model, parts)).backward()
    assert model.still.weight.grad is None
    assert model.learning.weight.grad is not None
    assert model.still.num_batches_tracked == 1


def test_random_numbers_are_drawn_in_one_order():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3)).double()
    parts, found = batches(2, 3, 2), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(torch.cat(pooled_forward(model, parts)))
    assert torch.equal(*found)
    torch.manual_seed(1)
    first = [F.dropout(part) for part in parts]  # each draws up to the layer where they meet
    expected = composite(first, torch.ones(3), torch.zeros(3))[0]
    expected = [F.dropout(part) for part in expected]
    expected = composite(expected, torch.ones(3), torch.zeros(3))[0]
    assert_close([found[0]], [torch.cat(expected)], 1e-10)


class Fragile(nn.Module):
    """Raises between its layers, for a batch of three."""

    def __init__(self, error):
        super().__init__()
        self.first, self.second, self.error, self.last = nn.BatchNorm2d(3), BatchNorm2d(3), error, 0

    def forward(self, x):
        y = self.first(x)
        self.last = len(x)
        if len(x) == 3:
            raise self.error
        return self.second(y)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_ends_all_and_leaves_no_trace(error):
    model = Fragile(error).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as raised:
        pooled_forward(model, batches(2, 3, 4))
    assert raised.value is error
    assert not lanes()
    assert_close(model.state_dict().values(), before.values(), 0)
    assert model.last == 0
    assert "forward" not in vars(model.first)
    pooled_forward(model, batches(2, 4))
    assert model.second.num_batches_tracked == 1


def test_an_exception_keeps_no_tensor_alive():
    model, kept = Fragile(RuntimeError("out of memory")).double(), []
    model.first.register_forward_hook(
        lambda m, args, y: kept.append(StorageWeakRef(y.untyped_storage()))
    )
    gc.collect()
    gc.disable()
    try:
        with suppress(RuntimeError):
            pooled_forward(model, batches(2, 3, 4))
        model.error = None  # it holds its traceback
        assert [reference.expired() for reference in kept] == [True, True]
    finally:
        gc.enable()


class Stubborn(nn.Module):
    """Goes on whatever is raised."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        for _ in range(3 if len(x) == 3 else 6):
            try:
                self.norm(x)
            except Exception:
                x = x + 1
        if len(x) == 3:
            raise ValueError("enough")
        return self.norm(x)


def test_work_that_catches_its_end_comes_to_it_all_the_same():
    with pytest.raises(ValueError, match="enough"):
        pooled_forward(Stubborn().double(), batches(2, 3))
    assert not lanes()


class Forked(nn.Module):
    def __init__(self, skips):
        super().__init__()
        self.left, self.right, self.skips = nn.BatchNorm2d(3), nn.BatchNorm2d(3), skips

    def forward(self, x):
        if len(x) == 2:
            return self.left(x)
        return x if self.skips else self.right(x)


@pytest.mark.parametrize(("skips", "ends"), [(False, "right"), (True, "the end")])
def test_different_paths_are_refused(skips, ends):
    model = Forked(skips).double()
    with pytest.raises(RuntimeError, match=rf"different paths .* at \['left', '{ends}'\]"):
        pooled_forward(model, batches(2, 3))
    assert model.left.num_batches_tracked == 0
    assert not lanes()


class Threaded(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.error = nn.BatchNorm2d(3), None

    def forward(self, x):
        def run():
            try:
                self.norm(x)
            except RuntimeError as error:
                self.error = error

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise self.error


def test_a_model_with_threads_of_its_own_is_refused():
    with pytest.raises(RuntimeError, match="thread of the model's own"):
        pooled_forward(Threaded().double(), batches(2, 3))


# ---------------------------------------------------------------------------- errors


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("layer", "error", "says"),
    [
        (WithActivation(3), TypeError, "0 is a WithActivation with a forward of its own"),
        (BatchNorm2d(3, statistics=Ghost(2)), TypeError, r"0 normalizes with .*Ghost\(size=2\)"),
        (LazyBatchNorm2d(), ValueError, "0 is lazy"),
    ],
    ids=["own forward", "ghost", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_cannot_meet_are_refused(layer, error, says):
    with pytest.raises(error, match=says):
        pooled_forward(nn.Sequential(layer), batches(2, 3))


def test_parts_of_other_channels_are_refused():
    layer = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match="one number of channels, dtype and device"):
        pooled_forward(layer, [torch.randn(2, 3, 2, 2), torch.randn(2, 4, 2, 2)])
    with pytest.raises(ValueError, match="expected 4D input"):
        pooled_forward(layer, [torch.randn(2, 3)])


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        pooled_forward(nn.BatchNorm2d(3), [])


@pytest.mark.as_installed
def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got list"):
        pooled_forward([], batches(2))


def test_compiled_accumulated_and_transformed_models_are_refused():
    model, parts = nn.Sequential(nn.BatchNorm2d(3)).double(), batches(2, 3)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        pooled_forward(torch.compile(model, backend="eager"), parts)
    with accumulate(model, 2), pytest.raises(ValueError, match="the model is accumulated"):
        pooled_forward(model, parts)
    with pytest.raises(RuntimeError, match="no compiler or transform follows"):
        torch.func.vmap(lambda x: pooled_forward(model, [x])[0])(torch.stack([parts[0]]))


def test_a_second_derivative_is_refused():
    model, parts = nn.BatchNorm2d(3).double(), batches(2, 3)
    loss = weighted(pooled_forward(model, parts))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, parts, create_graph=True)
