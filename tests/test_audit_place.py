from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d
from batchnorm.audit import Probe, Rule, run_script
from batchnorm.audit.place import calling_place, is_inside

HERE = Path(__file__).name


class Places(Rule):
    code = "BN998"
    name = "where it was called"
    looks_at = "tests"
    seen: list[tuple[str, str | None]] = []  # noqa: RUF012 - one list, emptied by the fixture

    def before(self, call):
        self.seen.append((call.path, calling_place()))

    def findings(self):
        return iter(())


@pytest.fixture
def places():
    Places.seen.clear()
    return Places.seen


def line_of(marker: str, text: str) -> int:
    (line,) = [i for i, line in enumerate(text.splitlines(), 1) if line.endswith(f"# {marker}")]
    return line


def placed(text: str, folder: Path, places) -> list[str | None]:
    """Where a script's calls of batch norm layers are said to come from."""
    (folder / "script.py").write_text(text)
    with Probe([Places]):
        status, _ = run_script(folder / "script.py", [])
    assert status == 0
    return [place for _, place in places]


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), norm(3))])

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d])
def test_a_path_starts_at_the_class_of_the_outermost_module(norm, places):
    block = Block(norm)
    with Probe([Places]):
        block(torch.randn(4, 3))
        nn.Sequential(nn.Identity(), block)(torch.randn(4, 3))
        block.layers[0][1](torch.randn(4, 3))
    paths = [path for path, _ in places]
    assert paths == ["Block.layers.0.1"] * 3  # where it was seen first


def test_a_layer_outside_the_module_tree_is_named_by_its_class(places):
    hidden = [nn.BatchNorm1d(3)]

    class Hiding(nn.Module):
        def forward(self, x):
            return hidden[0](x)

    with Probe([Places]):
        Hiding()(torch.randn(4, 3))
    assert [path for path, _ in places] == ["BatchNorm1d"]


SCRIPT = """
import torch
from torch import nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
    def forward(self, x):
        return self.norm(x)  # not here

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
    def forward(self, x):
        return self.inner(x)  # nor here

def step(model, x):
    return model(x)  # here

step(Outer(), torch.randn(4, 3))
"""


def test_the_place_is_the_line_that_calls_the_outermost_module(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    assert placed(SCRIPT, tmp_path, places) == [f"script.py:{line_of('here', SCRIPT)}"]


def test_a_script_outside_the_working_directory_is_named_in_full(tmp_path, places):
    place = f"{tmp_path.resolve() / 'script.py'}:{line_of('here', SCRIPT)}"
    assert placed(SCRIPT, tmp_path, places) == [place]


def test_a_script_is_the_users_own_though_it_is_installed(tmp_path, monkeypatch, places):
    folder = tmp_path / "site-packages"  # as `batchnorm demo` runs it from a wheel
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert placed(SCRIPT, folder, places) == [f"script.py:{line_of('here', SCRIPT)}"]


def test_the_place_is_in_the_users_own_file_that_the_script_imports(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    helper = "def evaluate_placed(model, x):\n    return model(x)  # here\n"
    (tmp_path / "helper_of_place.py").write_text(helper)
    script = (
        "import torch\nfrom torch import nn\nfrom helper_of_place import evaluate_placed\n"
        "evaluate_placed(nn.BatchNorm1d(3), torch.randn(4, 3))\n"
    )
    assert placed(script, tmp_path, places) == ["helper_of_place.py:2"]


def test_installed_code_between_the_user_and_the_model_is_passed_over(
    tmp_path, monkeypatch, places
):
    monkeypatch.chdir(tmp_path)
    script = """
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
update_bn([torch.randn(4, 3)], nn.BatchNorm1d(3))  # here
"""
    assert placed(script, tmp_path, places) == [f"script.py:{line_of('here', script)}"]


def test_a_place_within_this_file_is_found_too(places):
    with Probe([Places]):
        nn.BatchNorm1d(3)(torch.randn(4, 3))  # this very line
    ((_, place),) = places
    line = line_of("this very line", Path(__file__).read_text(encoding="utf-8"))
    assert place is not None
    assert place.endswith(f"{HERE}:{line}")


def test_a_function_on_the_stack_is_known_by_file_and_name():
    def asked_from_here(*names):
        return is_inside(frozenset(names))

    assert asked_from_here((HERE, "asked_from_here"))
    assert asked_from_here(("elsewhere.py", "asked_from_here"), (HERE, "asked_from_here"))
    assert not asked_from_here(("elsewhere.py", "asked_from_here"), (HERE, "somebody_else"))
