"""Graphs of models, of exported programs and of ONNX files, and the rules that read them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.audit import Finding, Selection, Severity, audit, check, read_onnx
from batchnorm.models.tracing import graph_of


def conv(i=3, o=4, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


class Branches(nn.Module):
    """A convolution whose output something else takes too."""

    def __init__(self, norm=nn.BatchNorm2d, shortcut=True):
        super().__init__()
        self.conv, self.norm, self.shortcut = conv(), norm(4), shortcut

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x if self.shortcut else self.norm(x)


class Shared(nn.Module):
    def __init__(self, own=False):
        super().__init__()
        self.conv, self.one, self.two = conv(3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other = conv(3, 3) if own else self.conv

    def forward(self, x):
        return self.two(self.other(self.one(self.conv(x))))


class Undecided(nn.Module):
    """Control flow that no tracer follows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() > -1e9 else x


def half_trained(model: nn.Module) -> nn.Module:
    model.eval()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).train()
    return model


def transposed(groups: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=groups, bias=False), nn.BatchNorm2d(4))


def images() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 6, 6) for _ in range(4)]


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


FOUND = [
    ("BN119", Branches),
    ("BN119", lambda: Branches(BatchNorm2d)),
    ("BN119", Shared),
    ("BN119", lambda: half_trained(chain(conv(), nn.BatchNorm2d(4)))),
    ("BN119", lambda: transposed(groups=2)),
    ("BN127", lambda: chain(conv(), nn.BatchNorm2d(4))),
    ("BN127", lambda: chain(nn.Linear(6, 4), BatchNorm1d(4))),
    ("BN127", lambda: chain(nn.Dropout(0.5), nn.BatchNorm2d(3))),
    ("BN127", lambda: chain(nn.Dropout2d(0.1), conv(bias=False), nn.BatchNorm2d(4))),
]


class Again(nn.Module):
    """A block that is called twice, whose convolution feeds its own norm alone."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.block(self.block(x))


SILENT = [
    ("BN119", Again),
    ("BN119", lambda: Branches(shortcut=False)),
    ("BN119", lambda: Shared(own=True)),
    ("BN119", lambda: chain(conv(), nn.BatchNorm2d(4)).eval()),
    ("BN119", lambda: transposed(groups=1)),
    ("BN127", lambda: chain(conv(bias=False), nn.BatchNorm2d(4))),
    ("BN127", lambda: chain(conv(), nn.ReLU(), nn.BatchNorm2d(4))),
    ("BN127", Branches),  # the shortcut needs the bias
    ("BN127", lambda: chain(nn.Dropout(0.0), nn.BatchNorm2d(3))),
    ("BN127", lambda: chain(conv(bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5))),
]


def found(code: str, model: nn.Module, batches=None) -> list[Finding]:
    report = audit(model, batches)
    assert report.disabled == {}
    assert report.graph == ("torch.fx" if batches is None else "hooks on one pass")
    return [finding for finding in report.findings if finding.code == code]


@pytest.mark.parametrize(("code", "make"), FOUND)
def test_it_is_found_in_a_traced_graph(code, make):
    (finding,) = found(code, make())
    assert finding.severity is Severity.INFO
    assert finding.modules


@pytest.mark.parametrize(("code", "make"), SILENT)
def test_it_is_silent_in_a_traced_graph(code, make):
    assert found(code, make()) == []


def fed(model: nn.Module) -> list[torch.Tensor]:
    first = next(m for m in model.modules() if hasattr(m, "weight") or isinstance(m, nn.Dropout))
    channels = {nn.Linear: (4, 6), nn.ConvTranspose2d: (4, 4, 6, 6)}.get(type(first), (4, 3, 6, 6))
    return [torch.randn(channels) for _ in range(4)]


@pytest.mark.parametrize(("code", "make"), FOUND)
def test_it_is_found_in_one_pass_where_nothing_can_be_traced(code, make):
    model = make()
    wrapped = Undecided(model)
    wrapped.training = model.training
    assert len(found(code, wrapped, fed(model))) == 1


@pytest.mark.parametrize(("code", "make"), SILENT)
def test_it_is_silent_in_one_pass(code, make):
    model = make()
    wrapped = Undecided(model)
    wrapped.training = model.training
    assert found(code, wrapped, fed(model)) == []


def test_a_bias_along_another_axis_is_not_taken_out():
    model = chain(nn.Linear(6, 5), nn.BatchNorm1d(7))  # features, then a norm over 7 time steps
    model(torch.randn(4, 7, 6))
    assert audit(model).findings == ()


def test_reading_a_graph_leaves_the_model_as_it_was(seeded):
    model = Undecided(chain(conv(), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    model.model[0].weight.grad = torch.ones_like(model.model[0].weight)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(2, 3, 6, 6)
    torch.set_rng_state(random)
    graph = graph_of(model, x)
    assert graph is not None
    modules = [node.name for node in graph.nodes if node.module is not None]
    assert modules == ["model.0", "model.1", "model.2"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.model[0].weight.grad == 1).all()
    assert not x.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Keeps(nn.Module):
    """A forward that leaves something behind."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls, self.seen = nn.BatchNorm2d(3), 0, []
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("made", None)

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen.append(x)
        self.cache = torch.zeros(self.calls + 2)
        self.made = torch.ones(1)
        return self.norm(x)


@pytest.mark.parametrize("batches", [None, images()])
def test_what_a_forward_leaves_behind_is_taken_away(batches):
    model = Keeps()
    cache = model.cache
    audit(model, batches)
    assert (model.calls, model.seen, hasattr(model, "last")) == (0, [], False)
    assert model.cache is cache
    assert model.made is None
    copy.deepcopy(model)


def test_a_graph_is_read_where_a_rule_that_was_selected_needs_one():
    assert audit(Branches(), selection=Selection(select=("BN119",))).graph == "torch.fx"
    assert audit(Branches(), selection=Selection(select=("BN101",))).graph is None
    left_out = Selection(modules={"norm": ("BN119",)})
    assert [f.code for f in audit(Branches(), selection=left_out).findings] == []


def test_where_nothing_reads_a_graph_the_rules_that_need_one_do_not_look():
    report = audit(Undecided(Branches()))
    assert report.graph is None
    assert not {"BN119", "BN120"} & set(report.rules)


# Exported programs


def exported(norm=nn.BatchNorm2d, training=True, decomposed=False):
    model = chain(conv(), norm(4), nn.ReLU()).train(training)
    program = torch.export.export(model, (torch.randn(2, 3, 6, 6),))
    return program.run_decompositions() if decomposed else program


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # PyTorch's own
@pytest.mark.as_installed
def test_a_program_exported_in_training_mode_is_an_error(norm, decomposed):
    (finding,) = [f for f in audit(exported(norm, True, decomposed)).findings if f.code == "BN120"]
    assert finding.severity is Severity.ERROR
    assert "normalize with the batch's statistics" in finding.message


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # PyTorch's own
@pytest.mark.as_installed
def test_a_program_exported_in_eval_mode_is_fine(norm, decomposed):
    report = audit(exported(norm, False, decomposed))
    assert [f.code for f in report.findings if f.code == "BN120"] == []
    assert report.graph == "its own graph"


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # PyTorch's own
@pytest.mark.as_installed
def test_an_instance_norm_that_is_exported_is_no_batch_norm():
    model = chain(conv(), nn.InstanceNorm2d(4)).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 6, 6),)).run_decompositions()
    assert audit(program).findings == ()


@pytest.mark.as_installed
def test_an_exported_program_is_not_run():
    with pytest.raises(ValueError, match="read and not run"):
        audit(exported(), [torch.randn(2, 3, 6, 6)])


# ONNX


def file(folder: Path, *, training=0, opset=17, values=None, more=(), external=False) -> Path:
    """An ONNX file of a convolution and a batch norm of two channels."""
    values = {"scale": [1, 2], "bias": [0, 1], "mean": [0.5, 1], "var": [1, 4], **(values or {})}
    tensors = [
        numpy_helper.from_array(np.asarray(v, dtype=np.float32), name) for name, v in values.items()
    ]
    kernel = np.ones((2, 1, 1, 1), dtype=np.float32)
    tensors.append(numpy_helper.from_array(kernel, "kernel"))
    if external:
        for tensor in tensors:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="/etc/passwd")
    mode = {"training_mode": training} if opset >= 14 else {}
    outputs = ["y", *more]
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], name="conv"),
        helper.make_node(
            "BatchNormalization",
            ["c", "scale", "bias", "mean", "var"],
            outputs,
            name="norm",
            epsilon=1e-3,
            **mode,
        ),
    ]
    shape = [2, None, 3, 3]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 1, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    path = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    path.write_bytes(model.SerializeToString())  # onnx itself would not save such a location
    return path


def test_an_onnx_file_tells_its_layers_and_their_eps(tmp_path):
    state, graph = read_onnx(file(tmp_path))
    (layer,) = state.layers
    assert layer.path == "norm"
    assert layer.eps == pytest.approx(1e-3)
    for tensor, values in [
        (layer.weight, [1, 2]),
        (layer.bias, [0, 1]),
        (layer.running_mean, [0.5, 1]),
        (layer.running_var, [1, 4]),
    ]:
        assert tensor is not None
        assert tensor.tolist() == values
    assert {node.name: node.uses_batch for node in graph.nodes} == {"conv": None, "norm": False}
    assert graph.nodes[1].source is graph.nodes[0]


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({}, []),
        ({"training": 1}, ["BN120"]),
        ({"opset": 9, "more": ("m", "v", "sm", "sv")}, ["BN120"]),
        ({"opset": 9}, []),
        ({"values": {"var": [1, -1]}}, ["BN101"]),
        ({"values": {"mean": [float("nan"), 1]}}, ["BN101"]),
        ({"values": {"mean": [0, 0], "var": [1, 1]}}, ["BN106"]),
        ({"values": {"scale": [0, 1]}}, ["BN128"]),
    ],
)
def test_the_rules_of_a_state_look_at_an_onnx_file(tmp_path, options, codes):
    state, graph = read_onnx(file(tmp_path, **options))
    report = check([state], graphs=[graph])
    assert [finding.code for finding in report.findings] == codes
    assert report.disabled == {}
    assert report.graph == "ONNX"


@pytest.mark.as_installed
@pytest.mark.parametrize("training", [True, False])
def test_what_pytorch_exports(tmp_path, training):
    model = chain(conv(), BatchNorm2d(4), nn.ReLU()).train(training)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2, 3, 6, 6),), str(path), dynamo=True, verbose=False)
    state, graph = read_onnx(path)
    codes = [finding.code for finding in check([state], graphs=[graph]).findings]
    assert codes == (["BN120"] if training else [])


def test_weights_in_other_files_are_not_looked_up(tmp_path):
    (layer,) = read_onnx(file(tmp_path, external=True))[0].layers
    assert (layer.weight, layer.running_mean, layer.running_var) == (None, None, None)


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 200])
def test_a_truncated_onnx_file_is_refused_or_read_in_one_line(tmp_path, keep):
    path = file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    said = ""
    try:
        state, graph = read_onnx(path)
        assert check([state], graphs=[graph]).disabled == {}
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or str(path) in said


def test_an_onnx_file_of_odd_parts_is_read_as_far_as_it_goes(tmp_path):
    path = file(tmp_path, training=1)
    model = onnx.load(path)
    inner = helper.make_graph(list(model.graph.node), "then", [], list(model.graph.output))
    del model.graph.node[:]
    outer = helper.make_node("If", ["x"], ["z"], name="if", then_branch=inner, else_branch=inner)
    model.graph.node.append(outer)
    path.write_bytes(model.SerializeToString())
    state, graph = read_onnx(path)
    assert [layer.path for layer in state.layers] == ["norm", "norm"]
    assert [f.code for f in check([state], graphs=[graph]).findings] == ["BN120"]

    model = onnx.load(file(tmp_path))
    model.graph.initializer[0].data_type = 99
    norm = model.graph.node[1]
    norm.ClearField("name")
    del norm.output[:]
    path.write_bytes(model.SerializeToString())
    (layer,) = read_onnx(path)[0].layers
    assert (layer.path, layer.weight) == ("BatchNormalization", None)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no graph"):
        read_onnx(path)


def test_no_onnx_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no ONNX file"):
        read_onnx(tmp_path / "none.onnx")
    path = tmp_path / "text.onnx"
    path.write_text("no protobuf at all, whatever its name says " * 20)
    with pytest.raises(ValueError, match="cannot read"):
        read_onnx(path)
