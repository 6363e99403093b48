"""The layers inside what people put around them: compilers, exporters, wrappers, transforms."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm import Batch, BatchNorm1d, BatchNorm2d, Ghost, Renorm, Running
from processes import run_ranks

# compilers and exporters cannot trace the run-time shape checks
pytestmark = pytest.mark.as_installed

POLICIES = [Batch(), Ghost(2), Ghost(4), Renorm(3.0, 5.0), Renorm(), Running()]


def network(**options):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        BatchNorm2d(4, act="relu", **options),
        nn.Conv2d(4, 4, 1),
        BatchNorm2d(4),
    )


def step(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *gradients]


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_fullgraph_in_train_and_eval(policy, momentum):
    torch._dynamo.reset()
    model = network(statistics=policy, momentum=momentum)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        model.train(training), compiled.train(training)
        x = torch.randn(6, 3, 6, 6)
        assert_close(step(compiled, x), step(model, x))
        assert_close(compiled.state_dict().values(), model.state_dict().values())


def test_a_compiled_backward_uses_the_statistics_that_its_forward_used():
    class FrozenThenTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, x):
            frozen = self.norm.eval()(x)
            return frozen + self.norm.train()(x)  # moves the buffers that the first call read

    torch._dynamo.reset()
    model = FrozenThenTraining()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3) * 5 + 2
    assert_close(step(compiled, x), step(model, x))


def test_compile_to_machine_code_with_mask_residual_and_dynamic_batch():
    torch._dynamo.reset()
    layer = BatchNorm1d(3, act="gelu")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True)
    for training, n in ((True, 4), (True, 6), (False, 5)):
        layer.train(training), compiled.train(training)
        x, residual = (torch.randn(n, 3, 7, requires_grad=True) for _ in range(2))
        mask = torch.rand(n, 7) < 0.8
        got, want = (m(x, residual=residual, mask=mask) for m in (compiled, layer))
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), (x, residual)),
            torch.autograd.grad(want.square().sum(), (x, residual)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_close(compiled.state_dict().values(), layer.state_dict().values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compile_keeps_layouts(layout):
    torch._dynamo.reset()
    layer = BatchNorm2d(3, act="relu")
    x = torch.randn(4, 3, 5, 6).to(memory_format=layout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).stride() == layer(x).stride() == x.stride()


def test_compile_with_activation_checkpointing_counts_once():
    torch._dynamo.reset()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(compiled, torch.randn(4, 3, 6, 6))
    assert model.body[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", [Batch(), Ghost(2)], ids=repr)
def test_export_gives_the_same_numbers_without_this_library(training, policy):
    model = network(statistics=policy).train(training)
    x = torch.randn(4, 3, 6, 6)
    program = torch.export.export(copy.deepcopy(model), (x,))
    assert "batchnorm" not in str(program.graph)
    exported = program.module()
    for _ in range(2):
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
    want = dict(model.named_buffers())
    assert_close([want[name] for name, _ in exported.named_buffers()], exported.buffers())


def test_export_in_eval_is_conv_batch_norm_relu():
    model = network()[:2].eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (torch.randn(2, 3, 6, 6),), dynamic_shapes={"input": {0: batch}}
    )
    operations = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [o.split(".")[1] for o in operations if o.startswith("aten.")] == [
        "conv2d",
        "batch_norm",
        "relu",
    ]
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_precisions_in_eval_go_through_the_same_doors(dtype):
    layer = BatchNorm2d(3, act="relu").to(dtype).eval()
    layer.running_mean.normal_()
    x = torch.randn(2, 3, 4, 4).to(dtype)
    want = layer(x)
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    got = [
        torch.export.export(layer, (x,)).module()(x),
        torch.jit.trace(layer, x)(x),
        torch.vmap(layer)(x.unsqueeze(0)).squeeze(0),
    ]
    for y in got:
        assert y.dtype == dtype
        torch.testing.assert_close(y, want, **near)
    gradient = torch.func.grad(lambda x: layer(x).double().sum())(x)
    torch.testing.assert_close(gradient, (want > 0).to(dtype) * (1 + 1e-5) ** -0.5, **near)


def test_vmap_over_mixed_precision_as_autocast_makes_it():
    layer = BatchNorm2d(3).eval()
    x = torch.randn(2, 4, 3, 5, 5).bfloat16()
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(s) for s in x]))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export_in_eval(dynamo, tmp_path):
    model = network()
    model(torch.randn(8, 3, 6, 6))
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_in_eval():
    model = network().eval()
    x = torch.randn(2, 3, 6, 6)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    assert "batchnorm::" not in str(traced.inlined_graph)


def test_functional_transforms_in_eval_and_clear_errors_in_training():
    layer = BatchNorm2d(3, act="relu")
    layer(torch.randn(8, 3, 4, 4))
    layer.eval()
    x = torch.randn(5, 2, 3, 4, 4)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(s) for s in x]))
    per_sample = torch.vmap(torch.func.grad(lambda s: layer(s).square().sum()))(x)
    want = torch.stack([torch.func.grad(lambda s: layer(s).square().sum())(s) for s in x])
    torch.testing.assert_close(per_sample, want)

    layer.train()
    before = copy.deepcopy(layer.state_dict())
    for transformed, inputs in (
        (torch.vmap(layer), x),
        (torch.func.grad(lambda s: layer(s).sum()), x[0]),
    ):
        with pytest.raises(RuntimeError, match=r"running statistics in place.*eval\(\)"):
            transformed(inputs)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_vmap_trains_an_ensemble_with_stacked_buffers():
    """What torch.func's ensembling tutorial does, with a layer in training."""
    layers = [BatchNorm1d(3) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    x = torch.randn(4, 8, 3)

    def call(parameters, buffers, x):
        buffers = {k: v.clone() for k, v in buffers.items()}
        y = torch.func.functional_call(skeleton, (parameters, buffers), (x,))
        return y, buffers

    y, updated = torch.vmap(call)(parameters, buffers, x)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(y[i], layer(x[i]))
        torch.testing.assert_close(updated["running_var"][i], layer.running_var)
        assert updated["num_batches_tracked"][i] == 1


def _train_wrapped(rank, world, wrapper, path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, act="relu"), nn.Linear(3, 1))
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(3):
        x = torch.randn(8, 4, generator=generator)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norm = model.module[1] if wrapper == "ddp" else model[1]
    assert norm.num_batches_tracked.item() == 3
    torch.save((losses, norm.running_var), f"{path}.{rank}")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_data_parallel_wrappers_train_as_torch_s_layers_do(wrapper, tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    run_ranks(2, _train_wrapped, wrapper, str(ours))
    theirs = tmp_path / "theirs"
    run_ranks(2, _train_wrapped_in_torch, wrapper, str(theirs))
    for rank in (0, 1):
        a, b = (torch.load(f"{path}.{rank}") for path in (ours, theirs))
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        torch.testing.assert_close(a[1], b[1])


class _TorchNorm(nn.Sequential):
    """torch.nn's layer with ReLU behind it, in the place of ours."""

    def __init__(self, c, act):
        super().__init__(nn.BatchNorm1d(c), nn.ReLU())

    @property
    def num_batches_tracked(self):
        return self[0].num_batches_tracked

    @property
    def running_var(self):
        return self[0].running_var


def _train_wrapped_in_torch(rank, world, wrapper, path):
    globals()["BatchNorm1d"] = _TorchNorm  # in this process alone
    _train_wrapped(rank, world, wrapper, path)


def test_ddp_accepts_a_double_use_per_backward_like_torch_s():
    """One layer called twice before a backward: buffers change in between, gradients hold."""
    layer = BatchNorm1d(3)
    plain = nn.BatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    grads = [torch.autograd.grad((m(x) * m(2 * x)).sum(), x)[0] for m in (layer, plain)]
    torch.testing.assert_close(*grads)


def test_the_whole_model_can_be_saved_and_loaded():
    model = network(statistics=Ghost(2))
    model(torch.randn(4, 3, 6, 6))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_public_names_are_importable():
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)
