import copy
import gc
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, Ghost, LazyBatchNorm2d, Renorm
from batchnorm.functional import track
from batchnorm.repair import accumulation as accumulation_module
from batchnorm.repair.accumulation import accumulate
from processes import run_ranks

NORMS = {
    "torch.nn": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "ours": BatchNorm2d,
    "ghost": partial(BatchNorm2d, statistics=Ghost(2)),
    "renorm": partial(BatchNorm2d, statistics=Renorm(r_max=2.0, d_max=1.0)),
}
BOTH = {"torch.nn": nn.BatchNorm2d, "ours": BatchNorm2d}

each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
both_norms = pytest.mark.parametrize("norm", BOTH.values(), ids=BOTH)


def network(norm, **options):
    return nn.Sequential(
        norm(3, **options), nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(),
        nn.Conv2d(4, 2, 3), norm(2, **options),
    )  # fmt: skip


def images(*sizes, size=6):
    """Batches whose means lie apart."""
    return [2 * torch.randn(n, 3, size, size) + 3 * i for i, n in enumerate(sizes)]


def train(model, batches):
    for x in batches:
        model(x).square().sum().backward()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(ours, theirs, rtol=1e-6):
    for name, buffer in theirs.items():
        torch.testing.assert_close(ours[name], buffer, rtol=rtol, atol=rtol, msg=name)


# ---------------------------------------------------------------------------- the law


@each_norm
@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
def test_running_statistics_are_those_of_the_pooled_batch(norm, momentum):
    ours, theirs = norm(3, momentum=momentum), norm(3, momentum=momentum)
    accumulation = accumulate(ours, 3)
    for sizes in ((2, 4, 6), (6, 2, 2)):
        parts = images(*sizes)
        train(ours, parts)
        theirs(torch.cat(parts))
    assert_same_buffers(buffers(ours), buffers(theirs))
    assert ours.num_batches_tracked == 2
    assert (accumulation.passes, accumulation.updates, accumulation.pending) == (6, 2, 0)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([nn.BatchNorm1d, BatchNorm1d]),
    st.floats(-1e3, 1e3),
)
def test_any_split_of_a_batch_leaves_what_the_batch_leaves(sizes, norm, offset):
    generator = torch.Generator().manual_seed(sum(sizes))
    whole = torch.randn(sum(sizes), 2, 3, generator=generator, dtype=torch.float64) + offset
    ours, theirs = norm(2).double(), norm(2).double()
    accumulate(ours, len(sizes))
    for part in whole.split(sizes):
        ours(part)
    theirs(whole)
    assert_same_buffers(buffers(ours), buffers(theirs), rtol=1e-12 * max(1, offset**2))


@both_norms
def test_deeper_layers_pool_the_inputs_that_they_had(norm):
    model = network(norm).double()
    seen = {path: [] for path in ("0", "2", "5")}
    for path, inputs in seen.items():
        model[int(path)].register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0].detach().numpy())
        )
    accumulate(model, 3)
    train(model, [x.double() for x in images(2, 5, 3)])
    for path, inputs in seen.items():
        rows = np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in inputs], 1)
        layer = model[int(path)]
        np.testing.assert_allclose(layer.running_mean, 0.1 * rows.mean(1), rtol=1e-12, atol=1e-13)
        expected = 0.9 + 0.1 * rows.var(1, ddof=1)
        np.testing.assert_allclose(layer.running_var, expected, rtol=1e-12)
        assert layer.num_batches_tracked == 1


@both_norms
def test_micro_batches_far_from_zero_keep_their_variance(norm):
    layer = norm(1, momentum=1.0)
    accumulate(layer, 4)
    parts = [3000 + 0.3 * torch.randn(16, 1, 8, 8) for _ in range(4)]
    for part in parts:
        layer(part)
    expected = torch.cat(parts).double().var()
    torch.testing.assert_close(layer.running_var.double(), expected[None], rtol=1e-5, atol=0)


@both_norms
def test_images_of_different_sizes_count_by_their_values(norm):
    layer = norm(3, momentum=1.0).double()
    accumulate(layer, 2)
    parts = [torch.randn(2, 3, s, s, dtype=torch.float64) + s for s in (4, 9)]
    for part in parts:
        layer(part)
    rows = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
    torch.testing.assert_close(layer.running_mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, rows.var(1), rtol=1e-12, atol=0)


def test_masked_values_do_not_count():
    parts = [torch.randn(n, 2, 7) + n for n in (2, 3)]
    masks = [torch.rand(n, 7) < 0.6 for n in (2, 3)]
    layer, whole = BatchNorm1d(2), BatchNorm1d(2)
    accumulate(layer, 2)
    for x, mask in zip(parts, masks, strict=True):
        layer(x, mask=mask)
    whole(torch.cat(parts), mask=torch.cat(masks))
    assert_same_buffers(buffers(layer), buffers(whole))


@each_norm
def test_outputs_and_gradients_stay_the_same_bits(norm):
    model = network(norm)
    twin = copy.deepcopy(model)
    accumulate(model, 1)
    x = images(4)[0]
    y, z = model(x), twin(x)
    y.square().sum().backward()
    z.square().sum().backward()
    assert torch.equal(y, z)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert_same_buffers(buffers(model), buffers(twin))


# ---------------------------------------------------------------------------- what a pass is


class Twice(nn.Module):
    """Calls one layer twice: for a first and a second input."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + self.norm(x.square())


@both_norms
def test_a_layer_called_twice_makes_two_updates_in_order(norm):
    model, whole = Twice(norm(3)), Twice(norm(3))
    accumulate(model, 3)
    parts = images(2, 3, 4)
    train(model, parts)
    whole(torch.cat(parts))
    assert model.norm.num_batches_tracked == 2
    assert_same_buffers(buffers(model), buffers(whole))


class Recursive(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, depth=2):
        y = self.norm(x)
        return self.norm(self(y + 1, depth - 1) + 1) if depth else y


@both_norms
def test_a_model_that_calls_itself_makes_one_pass(norm):
    model = Recursive(norm(3))
    accumulation = accumulate(model, 2)
    train(model, images(2, 3))
    assert (accumulation.passes, accumulation.updates) == (2, 1)
    assert model.norm.num_batches_tracked == 5


@both_norms
def test_passes_in_eval_mode_do_not_count(norm):
    model, whole = norm(3), norm(3)
    accumulation = accumulate(model, 2)
    parts = images(2, 3, 4)
    model(parts[0])
    model.eval()
    expected = nn.functional.batch_norm(parts[1], torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(model(parts[1]), expected)  # by the running statistics, unmoved
    model.train()
    model(parts[2])
    whole(torch.cat([parts[0], parts[2]]))
    assert accumulation.passes == 2
    assert_same_buffers(buffers(model), buffers(whole))


def test_frozen_layers_gather_nothing():
    model = network(BatchNorm2d)
    model[0].freeze()
    flagged = nn.BatchNorm2d(3)
    flagged.track_running_stats = False
    model.insert(0, flagged)
    accumulation = accumulate(model, 2)
    before = buffers(model)
    train(model, images(2, 3))
    assert accumulation.updates == 1
    for i in (0, 1):
        assert_same_buffers(
            buffers(model[i]), {k[2:]: v for k, v in before.items() if k[0] == f"{i}"}
        )
    assert model[3].num_batches_tracked == 1

    model.eval()[3].train().freeze()
    train(model, images(2))
    assert accumulation.passes == 2
    assert flagged.track_running_stats is False


def block(norm, early):
    layers = [nn.Conv2d(3, 3, 3), norm(3)]
    return nn.Sequential(*layers) if early else nn.Sequential(*layers, nn.Sigmoid())


class Checkpointed(nn.Module):
    def __init__(self, norm, reentrant, early):
        super().__init__()
        self.block, self.reentrant = block(norm, early), reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@both_norms
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("early", [True, False], ids=["stops within the norm", "goes on"])
def test_what_a_checkpoint_computes_again_counts_once(norm, reentrant, early):
    model = Checkpointed(norm, reentrant, early)
    plain = copy.deepcopy(model.block)
    accumulation, expected = accumulate(model, 2), accumulate(plain, 2)
    parts = [x.requires_grad_() for x in images(2, 3, 4, 2)]
    train(model, parts)
    train(plain, parts)
    assert (accumulation.passes, accumulation.updates) == (4, 2) == (expected.passes, 2)
    assert model.block[1].num_batches_tracked == 2
    assert model.block[1].track_running_stats
    assert_same_buffers(buffers(model.block), buffers(plain))


class Fragile(nn.Module):
    """Raises behind its first layer, or within its second, when told to."""

    def __init__(self, norm, error):
        super().__init__()
        self.norm, self.error, self.raises = norm, error, False

    def forward(self, x):
        y = self.norm(x)
        if self.raises:
            raise self.error
        return y


@both_norms
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_pass_that_raises_leaves_nothing(norm, error):
    model, whole = Fragile(norm(3), error), norm(3)
    accumulation = accumulate(model, 2)
    parts = images(2, 3, 4)
    model(parts[0])
    model.raises = True
    with pytest.raises(type(error)):
        model(parts[1])
    model.raises = False
    assert accumulation.pending == 1
    model(parts[2])
    whole(torch.cat([parts[0], parts[2]]))
    assert_same_buffers(buffers(model.norm), buffers(whole))


class Interrupted(nn.BatchNorm2d):
    """Ctrl-C within the layer, when told to."""

    raises = False

    def forward(self, input):
        if self.raises:
            raise KeyboardInterrupt
        return super().forward(input)


def test_a_layer_that_ctrl_c_ended_goes_on():
    layer, whole = Interrupted(3), nn.BatchNorm2d(3)
    accumulation = accumulate(layer, 2)
    layer.raises = True
    with pytest.raises(KeyboardInterrupt):
        layer(images(2)[0])
    layer.raises = False
    assert copy.deepcopy(layer)(images(2)[0]).shape == (2, 3, 6, 6)
    layer.eval()(images(2)[0])
    assert accumulation.pending == 0
    layer.train()
    parts = images(2, 3)
    for part in parts:
        layer(part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(layer), buffers(whole))
    layer.raises = True
    with pytest.raises(KeyboardInterrupt):
        layer(images(2)[0])
    accumulation.remove()
    assert layer.track_running_stats


# ---------------------------------------------------------------------------- the end


@both_norms
@pytest.mark.parametrize("end", ["step", "remove", "exit"])
def test_the_rest_of_an_epoch_is_one_smaller_batch(norm, end):
    model, whole = norm(3), norm(3)
    parts = images(2, 3, 4)
    with accumulate(model, 2) as accumulation:
        train(model, parts)
        assert (accumulation.updates, accumulation.pending) == (1, 1)
        if end != "exit":
            getattr(accumulation, end)()
            assert (accumulation.updates, accumulation.pending) == (2, 0)
    for pooled in (torch.cat(parts[:2]), parts[2]):
        whole(pooled)
    assert_same_buffers(buffers(model), buffers(whole))
    accumulation.step()
    assert accumulation.updates == 2


@both_norms
def test_after_an_exception_the_rest_is_dropped(norm):
    model = norm(3)
    before = buffers(model)
    accumulation = accumulate(model, 2)
    train(model, images(2))
    with pytest.raises(ZeroDivisionError), accumulation:
        raise ZeroDivisionError
    assert_same_buffers(buffers(model), before, rtol=0)


@each_norm
def test_removed_hooks_leave_the_model_as_it_was(norm):
    model = network(norm)
    before = [(type(m), {k: v for k, v in vars(m).items() if k[0] != "_"}) for m in model.modules()]
    keys = [list(vars(m)) for m in model.modules()]
    with accumulate(model, 2):
        train(model, images(2, 3, 4))
    assert [list(vars(m)) for m in model.modules()] == keys
    after = [(type(m), {k: v for k, v in vars(m).items() if k[0] != "_"}) for m in model.modules()]
    assert after == before
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    counted = [m.num_batches_tracked.item() for m in model if hasattr(m, "momentum")]
    assert counted == [2, 2, 2]
    train(model, images(2, 3))
    assert model[0].num_batches_tracked == 4


@both_norms
def test_a_step_that_fails_moves_no_layer(norm, monkeypatch):
    model = network(norm)
    accumulation = accumulate(model, 3)
    train(model, images(2, 3))
    before, calls = buffers(model), []

    def third_fails(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        track(*given)

    monkeypatch.setattr(accumulation_module, "track", third_fails)
    with pytest.raises(KeyboardInterrupt):
        accumulation.step()
    assert_same_buffers(buffers(model), before, rtol=0)
    assert accumulation.pending == 2


# ---------------------------------------------------------------------------- odd batches


@both_norms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_micro_batch_that_is_not_finite_skips_the_update(norm, bad):
    model, whole = norm(3), norm(3)
    accumulation = accumulate(model, 2)
    parts = images(2, 3, 4, 5)
    parts[1][0, 0, 0, 0] = bad
    for part in parts:
        model(part)
    assert accumulation.updates == 2
    whole(torch.cat(parts[2:]))
    assert_same_buffers(buffers(model), buffers(whole))
    assert model.num_batches_tracked == 1


@both_norms
def test_an_empty_micro_batch_adds_nothing(norm):
    model, whole = norm(3), norm(3)
    accumulate(model, 3)
    parts = images(2, 0, 4)
    for part in parts:
        model(part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(model), buffers(whole))


@both_norms
def test_half_precision_is_gathered_wide(norm):
    model = norm(3, momentum=1.0).to(torch.bfloat16)
    accumulate(model, 2)
    parts = [(torch.randn(64, 3, 4, 4) + 100 * i).to(torch.bfloat16) for i in (1, 2)]
    for part in parts:
        model(part)
    expected = torch.cat(parts).double().transpose(0, 1).flatten(1)
    tolerance = torch.finfo(model.running_var.dtype).eps
    mean, var = model.running_mean.double(), model.running_var.double()
    torch.testing.assert_close(mean, expected.mean(1), rtol=tolerance, atol=0)
    torch.testing.assert_close(var, expected.var(1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("norm", [nn.LazyBatchNorm2d, LazyBatchNorm2d])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_gathers_from_its_first_pass_on(norm):
    model, whole = norm(), nn.BatchNorm2d(3)
    accumulate(model, 2)
    parts = images(2, 3)
    for part in parts:
        model(part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(model), buffers(whole))


def test_an_input_by_its_name_is_gathered():
    model, whole = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    accumulate(model, 2)
    parts = images(2, 3)
    for part in parts:
        model(input=part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(model), buffers(whole))


@both_norms
def test_nothing_but_moments_is_kept(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
    kept = []
    model[1].register_forward_hook(
        lambda m, args, y: kept.extend(StorageWeakRef(t.untyped_storage()) for t in (args[0], y))
    )
    accumulation = accumulate(model, 4)
    model(images(2)[0])
    gc.collect()
    assert [reference.expired() for reference in kept] == [True, True]
    assert accumulation.pending == 1


# ---------------------------------------------------------------------------- others' hands


@both_norms
@pytest.mark.as_installed
@pytest.mark.parametrize("order", ["compiled first", "compiled last", "in place"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_gathers_too(norm, order):
    torch._dynamo.reset()
    model, whole = nn.Sequential(norm(3), nn.ReLU()), norm(3)
    compiled = torch.compile(model, backend="eager") if order == "compiled first" else model
    if order == "compiled first":
        compiled(images(2)[0])  # without hooks
        whole.load_state_dict(model[0].state_dict())
    if order == "in place":
        model.compile(backend="eager")
    accumulation = accumulate(compiled, 3)
    if order == "compiled last":
        compiled = torch.compile(model, backend="eager")
    parts = images(2, 3, 4)
    for part in parts:
        compiled(part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(model[0]), buffers(whole))
    accumulation.remove()
    compiled(parts[0])
    assert accumulation.passes == 3
    assert model[0].num_batches_tracked == whole.num_batches_tracked + 1


@both_norms
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301 - our own
def test_a_copy_goes_on_by_itself(norm, copied):
    model, whole = network(norm), norm(3)
    accumulate(model, 2)
    parts = images(2, 3)
    model(parts[0])
    twin = copied(model)
    twin(parts[1])
    whole(torch.cat(parts))
    assert_same_buffers(buffers(twin[0]), buffers(whole))
    assert model[0].num_batches_tracked == 0


class Unasked(nn.BatchNorm2d):
    """Tracks whatever its flag says, as detectron2's NaiveSyncBatchNorm does."""

    def forward(self, input):
        with torch.no_grad():
            self.running_mean += self.momentum * (input.mean((0, 2, 3)) - self.running_mean)
        return input


def test_a_forward_that_tracks_in_any_case_is_refused():
    model = nn.Sequential(Unasked(3))
    accumulate(model, 2)
    with pytest.raises(RuntimeError, match=r"0 moved its running statistics.*forward of Unasked"):
        model(images(2)[0])
    assert model[0].track_running_stats


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def test_a_subclass_that_asks_its_flag_is_gathered():
    model, whole = WithActivation(3), WithActivation(3)
    accumulate(model, 2)
    parts = images(2, 3)
    for part in parts:
        model(part)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(model), buffers(whole))


@both_norms
def test_a_layer_called_by_itself_is_refused(norm):
    model = network(norm)
    accumulate(model, 2)
    with pytest.raises(RuntimeError, match="0 was called in training mode outside of a forward"):
        model[0](images(2)[0])
    model.eval()
    model[0](images(2)[0])


@both_norms
def test_a_replica_is_refused(norm):
    model = network(norm)
    accumulate(model, 2)
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(images(2)[0])


class LocalSync(nn.SyncBatchNorm):
    """As SyncBatchNorm, whose own forward refuses the CPU, but normalized by the rank's batch."""

    forward = nn.BatchNorm2d.forward


def _on_ranks(rank, world):
    torch.manual_seed(0)
    parts = images(2, 3, 4, 5)
    mine = parts[2 * rank : 2 * rank + 2]
    synced, whole = LocalSync(3), nn.BatchNorm2d(3)
    accumulate(synced, 2)
    train(synced, mine)
    whole(torch.cat(parts))
    assert_same_buffers(buffers(synced), buffers(whole))

    model, whole = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), nn.BatchNorm2d(3)
    accumulate(model, 2)
    train(DistributedDataParallel(model), mine)
    whole(torch.cat(mine))
    assert_same_buffers(buffers(model[0]), buffers(whole))


def test_synchronized_layers_pool_over_the_ranks_and_others_under_ddp():
    run_ranks(2, _on_ranks)


# ---------------------------------------------------------------------------- errors, and text


@pytest.mark.as_installed
@pytest.mark.parametrize("steps", [2.0, "2", None, True])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(TypeError, match=r"whole number of micro-batches, got steps="):
        accumulate(nn.BatchNorm2d(3), steps)


@pytest.mark.as_installed
def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got list"):
        accumulate([nn.BatchNorm2d(3)], 2)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_must_be_positive(steps):
    with pytest.raises(ValueError, match=f"at least one micro-batch, got steps={steps}"):
        accumulate(nn.BatchNorm2d(3), steps)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_model_without_running_statistics_is_refused(model):
    with pytest.raises(ValueError, match="no batch norm layer with running statistics"):
        accumulate(model, 2)


def test_a_model_is_accumulated_once():
    model = network(nn.BatchNorm2d)
    accumulation = accumulate(model, 2)
    with pytest.raises(ValueError, match="accumulated already"):
        accumulate(model[:3], 2)
    accumulation.remove()
    accumulate(model, 2)


def test_it_says_what_plain_accumulation_misses():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    accumulation = accumulate(model, 2)
    assert repr(accumulation) == (
        "Accumulation: 2 layers, one update for 2 passes; 0 passes seen, 0 updates made"
    )
    for part in ([[-1.0], [1.0]], [[9.0], [11.0]]):  # variance 2 each; 34 2/3 together
        model(torch.tensor(part))
    assert repr(accumulation) == (
        "Accumulation: 2 layers, one update for 2 passes; 2 passes seen, 1 update made\n"
        "  layer  std of the batch to that of its parts\n"
        f"  0      ×{math.sqrt(34 + 2 / 3) / math.sqrt(2):.3f}\n"
        f"  1      ×{math.sqrt(4 / 3 / 2):.3f}"
    )
