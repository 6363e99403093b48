from types import SimpleNamespace

import torch

from batchnorm.kernels import diagnosis
from batchnorm.kernels.cpu import library


def found(about):
    return [fact.finding for fact in diagnosis.diagnose() if fact.about == about]


def test_it_says_what_runs_and_on_how_many_threads():
    torch.set_num_threads(2)
    assert found("CPU") == ["compiled kernels: float32, float64 and bfloat16"]
    assert found("threads") == ["2: PyTorch's own"]
    assert found("PyTorch") == [torch.__version__]
    assert found("GPU") == []


def test_it_names_the_reason_for_the_reference(monkeypatch):
    monkeypatch.setattr(diagnosis, "reason_without", lambda: "Numba is not installed; …")
    assert found("CPU") == ["reference (PyTorch's operations): Numba is not installed; …"]
    assert found("threads") == []


def test_it_says_where_threads_or_a_cache_are_missing(monkeypatch):
    monkeypatch.setattr(diagnosis, "cache_folder", lambda: None)
    monkeypatch.setattr(diagnosis, "pool", SimpleNamespace(parallel_region=lambda: None))
    assert found("kernels kept in") == ["nowhere: each process compiles its own"]
    assert found("threads") == ["1: PyTorch here has no OpenMP that the kernels can share"]


def test_the_cache_it_names_is_where_kernels_lie():
    folder = library.cache_folder()
    library.address_of(library.Variant("track", "rows", "float32", "identity", "none"))
    assert folder is not None
    assert list(folder.glob("*track_rows_float32_identity_none*.nbc"))
