from types import SimpleNamespace

import torch

from batchnorm.kernels import diagnosis
from batchnorm.kernels.cpu import library
from batchnorm.kernels.gpu import library as gpu_library


def found(about):
    return [fact.finding for fact in diagnosis.diagnose() if fact.about == about]


def test_it_says_what_runs_and_on_how_many_threads():
    torch.set_num_threads(2)
    assert found("CPU") == ["compiled kernels: float32, float64 and bfloat16"]
    assert found("threads") == ["2: PyTorch's own"]
    assert found("PyTorch") == [torch.__version__]
    assert found("GPU 0") == [] or torch.cuda.is_available()


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


def test_it_says_what_each_gpu_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"chip {device.index}")
    reasons = {0: None, 1: "its compute capability is 7.5, and Triton needs 8.0"}
    monkeypatch.setattr(gpu_library, "reason_without_on", lambda device: reasons[device.index])
    monkeypatch.setattr(gpu_library, "version", lambda: "3.9.0")
    facts = diagnosis.diagnose()
    start = next(i for i, fact in enumerate(facts) if fact.about == "GPU 0")
    assert [tuple(fact) for fact in facts[start:]] == [
        ("GPU 0", "chip 0"),
        ("", "compiled kernels: float32, bfloat16 and float16"),
        ("", "reference: float64, and calls with a mask"),
        ("Triton", "3.9.0"),
        ("GPU 1", "chip 1"),
        ("", f"reference (PyTorch's operations): {reasons[1]}"),
    ]


def test_it_says_what_is_interpreted(monkeypatch):
    monkeypatch.setattr(diagnosis, "switched_to", lambda: "interpreter")
    monkeypatch.setattr(gpu_library, "reason_without", lambda: None)
    monkeypatch.setattr(gpu_library, "version", lambda: "3.9.0")
    assert found("CPU") == ["the GPU's kernels, interpreted, slow: float32, bfloat16 and float16"]
    assert found("Triton") == ["3.9.0"]
    monkeypatch.setattr(gpu_library, "reason_without", lambda: "Triton is not installed; …")
    assert found("CPU") == ["reference (PyTorch's operations): Triton is not installed; …"]
