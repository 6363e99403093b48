"""What the GPU's benchmarks compute besides times, by value: none of it needs a GPU."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from batchnorm import kernels
from batchnorm.kernels import Activation

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYERS = ("BN", "BN+ReLU", "BN+add+ReLU")


@pytest.fixture
def imported(monkeypatch):
    """A benchmark by name: they import each other by their names alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def on_reference(monkeypatch):
    """PyTorch's operations: what is tested here is no kernel, which would be compiled first."""
    monkeypatch.setattr(kernels, "BACKENDS", kernels.BACKENDS[-1:])


def row(ours=2e-4, copy=5e-5, operation="BN+ReLU", frozen=False, large=True, **others):
    """A row of `gpu_layers.py` in which others take so many times ours, in both ways."""
    parts = ("forward", "backward", "both")
    over = {name: dict.fromkeys(parts, (value,) * 3) for name, value in others.items()}
    times = {"seconds": {"ours": dict.fromkeys(parts, (ours,) * 3)}, "over ours": over}
    return {
        "shape": "256×64×56×56",
        "layout": "channels_last",
        "dtype": "bf16",
        "operation": operation,
        "frozen": frozen,
        "bytes": 10**8,
        "large": large,
        "sets": 2,
        "past cache": True,
        "torch takes": "Native",
        "errors": {"y": 1e-3},
        "copy": (copy,) * 3,
        "on the device": times,
        "as called": times,
    }


class TestPasses:
    @pytest.mark.parametrize(
        ("operation", "frozen", "forward", "backward"),
        [
            ("BN", False, 3, 5),
            ("BN+ReLU", False, 3, 5),
            ("BN+add+ReLU", False, 4, 7),
            ("BN", True, 2, 3),
            ("BN+ReLU", True, 2, 3),
            ("BN+add+ReLU", True, 3, 5),
        ],
    )
    def test_least(self, imported, operation, frozen, forward, backward):
        least = imported("gpu_goals").passes(operation, frozen)
        assert (least.forward, least.backward, least.both) == (
            forward,
            backward,
            forward + backward,
        )

    def test_share_is_of_the_copy_whose_bytes_count_twice(self, imported):
        # 8 passes in 4 copies' time are all that a copy's 2 passes reach
        share = imported("gpu_goals").share
        assert share(row(ours=2e-4, copy=5e-5), "both") == pytest.approx(1.0)
        assert share(row(ours=4e-4, copy=5e-5), "both") == pytest.approx(0.5)
        assert share(row(ours=2e-4, copy=5e-5), "forward") == pytest.approx(3 / 8)
        frozen = row(ours=2e-4, copy=5e-5, operation="BN+add+ReLU", frozen=True)
        assert share(frozen, "both") == pytest.approx(1.0)


class TestRatios:
    def test_median_and_fifths(self, imported):
        timing = imported("timing")
        assert timing.spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 1.0, 4.0))
        assert timing.spread([7.0]) == (7.0, 7.0, 7.0)

    def test_round_by_round(self, imported):
        timing = imported("timing")
        # the medians' ratio would be 2, of every round's own it is 3
        times, of = [3.0, 6.0, 30.0, 4.0, 90.0], [1.0, 3.0, 10.0, 1.0, 30.0]
        assert timing.ratio_spread(times, of)[0] == 3.0
        assert timing.ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == "2.00 (2.00 to 2.00)"

    def test_laps_by_any_clock(self, imported):
        class Counting:
            """Marks 0, 1, 2, …, each lap of which took as long as it is early."""

            marks = 0

            def mark(self):
                self.marks += 1
                return self.marks

            def between(self, marks):
                return tuple(1.0 / (b - marks[0]) for b in marks[1:])

        def work():
            yield
            yield

        laps = imported("timing").laps_in_turns({"a": work, "b": work}, 2, Counting())
        assert laps == {"a": [(1.0, 0.5)] * 2, "b": [(1.0, 0.5)] * 2}


class TestRotation:
    CACHE = 60 * 2**20

    @pytest.mark.parametrize("touched", [2**22, 2**24 + 2, 2**26, 60 * 2**20 * 4])
    def test_sets_together_exceed_the_cache_several_times(self, imported, touched):
        timing = imported("gpu_timing")
        sets = timing.sets_needed(touched, self.CACHE)
        assert sets * touched > timing.SEVERAL * self.CACHE
        assert (sets - 1) * touched <= timing.SEVERAL * self.CACHE
        assert timing.is_past_cache(touched, self.CACHE)

    def test_within_bounds(self, imported):
        timing = imported("gpu_timing")
        assert timing.sets_needed(2**33, self.CACHE) == timing.FEWEST_SETS == 2
        assert timing.sets_needed(2**10, self.CACHE) == timing.MOST_SETS
        assert not timing.is_past_cache(2**10, self.CACHE)

    def test_every_resnet_shape_is_past_an_h200s_cache(self, imported):
        cases, timing = imported("gpu_cases"), imported("gpu_timing")
        for shape in (s for s in cases.SHAPES if len(s) == 4):
            touched = 2 * 2 * math.prod(shape)
            assert timing.is_past_cache(touched, self.CACHE), shape

    def test_a_call_takes_the_next_set(self, imported):
        timing, seen = imported("gpu_timing"), []
        candidate = timing.Candidate(lambda i: i, lambda y, i, keep: seen.append((y, i, keep)))
        laps = timing.called(candidate, 3)
        for _ in range(4):
            assert len(list(laps())) == 2
        assert seen == [(0, 0, False), (1, 1, False), (2, 2, False), (0, 0, False)]

    def test_replays_go_through_all_sets(self, imported):
        timing = imported("gpu_timing")
        forward, backward = [], []
        candidate = timing.Candidate(
            lambda i: forward.append(i) or i, lambda y, i, keep: backward.append((y, i))
        )
        laps = timing.replayed(candidate, 2, torch.device("cpu"))
        forward.clear(), backward.clear()
        assert len(list(laps())) == 3
        assert forward == [0, 1] * 2  # alone, and in turns with the backward passes
        assert backward == [(0, 0), (1, 1)] * 2


class TestGoals:
    def verdicts(self, imported, rows):
        return {g.name: g for g in imported("gpu_goals").goals(rows)}

    def test_bandwidth_of_large_tensors_in_training(self, imported):
        rows = [row(ours=2.2e-4), row(ours=2.5e-4)]
        rows += [row(ours=1.0, large=False), row(ours=1.0, frozen=True)]
        rows += [row(ours=1.0, operation="BN+add+ReLU")]
        found = self.verdicts(imported, rows)
        name = "share of the copy's bandwidth at 8 passes, large tensors"
        least, median = found[f"{name}: least"], found[f"{name}: median"]
        assert (least.found, least.rows) == (pytest.approx(0.8), 2)
        assert median.found == pytest.approx((0.8 + 1 / 1.1) / 2)
        assert (least.verdict, median.verdict) == ("missed", "reached")

    def test_never_slower_than_any_of_torchs(self, imported):
        rows = [row(eager=1.7), row(eager=1.2, native=0.9, frozen=True)]
        name = "never slower than eager or native, on the device: least"
        least = self.verdicts(imported, rows)[name]
        assert (least.found, least.rows, least.verdict) == (0.9, 3, "missed")
        assert "BN+ReLU, frozen" in least.where

    def test_geometric_means_of_what_was_asked_for(self, imported):
        rows = [row(eager=1.0, compile=1.5), row(eager=4.0)]
        rows += [row(eager=100.0, operation="BN"), row(eager=100.0, frozen=True)]
        rows += [{**row(eager=100.0), "dtype": "fp32"}, {**row(eager=9.0), "layout": "contiguous"}]
        found = self.verdicts(imported, rows)
        about = "bf16 channels_last, on the device: geometric mean"
        eager, default = (found[f"BN+ReLU over {n}, {about}"] for n in ("eager", "compile"))
        assert (eager.found, eager.rows, eager.verdict) == (pytest.approx(2.0), 2, "reached")
        assert (default.found, default.rows) == (pytest.approx(1.5), 1)
        tuned = found[f"BN+ReLU over max-autotune, {about}"]
        assert (tuned.found, tuned.rows, tuned.verdict) == (None, 0, "not measured")

    def test_a_page_tells_what_failed(self, imported):
        wrong = {**row(), "wrong": ["dx"], "errors": {"dx": 0.3}}
        del wrong["copy"]
        failed = {**row(operation="BN"), "failed": "out of memory"}
        del failed["copy"]
        half = {**row(eager=2.0), "left out": {"compile": "Error: of a compiler"}}
        page = imported("gpu_layers").page([half, half, wrong, failed], 3, "a machine", True)
        assert "**Dry run: no numbers mean anything.**" in page
        assert "wrong, and not timed: 256×64×56×56, bf16, channels_last, BN+ReLU" in page
        assert "BN, training: out of memory" in page
        assert "compile left out in 2 cases: Error: of a compiler" in page
        assert "time ran out before 3 cases" in page
        assert "| 2.00 (2.00 to 2.00) |" in page


class TestCases:
    def test_what_the_goals_ask_for_comes_first(self, imported):
        cases = imported("gpu_cases")
        found = cases.cases(cases.SHAPES, ["bf16"], ["channels_last"], True)
        assert len(found) == len(cases.SHAPES) * 6
        assert [c.shape for c in found if c.compiled] == [
            c.shape for c in found[: len(cases.COMPILED)]
        ]
        assert {c.operation for c in found[: len(cases.SHAPES)]} == {"BN+ReLU"}
        assert not any(
            c.compiled for c in cases.cases(cases.SHAPES, ["bf16"], ["contiguous"], False)
        )

    def test_bytes(self, imported):
        cases = imported("gpu_cases")
        assert cases.Case((2, 3, 4, 5), "contiguous", "bf16", "BN", False).bytes == 240
        assert cases.Case((2, 3), "contiguous", "fp32", "BN", False).bytes == 24

    @pytest.mark.usefixtures("on_reference")
    @pytest.mark.parametrize("operation", LAYERS)
    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_right_layer_passes_the_check_and_leaves_no_trace(self, imported, operation, frozen):
        cases = imported("gpu_cases")
        case = cases.Case((4, 3, 5, 5), "channels_last", "fp32", operation, frozen)
        _, layer = cases.pair(case, torch.device("cpu"))
        held = layer.running_mean.clone()
        found = cases.errors(case, layer, cases.Inputs.random(case, torch.Generator()))
        assert cases.are_wrong(found, "fp32") == []
        assert layer.running_mean.equal(held)
        assert {"y", "dx", "dγ", "dβ"} <= found.keys()

    @pytest.mark.usefixtures("on_reference")
    def test_a_wrong_layer_fails_it(self, imported, monkeypatch):
        cases = imported("gpu_cases")
        case = cases.Case((4, 3, 5, 5), "contiguous", "fp32", "BN", False)
        _, layer = cases.pair(case, torch.device("cpu"))
        monkeypatch.setattr(cases, "ours", lambda _: lambda layer, x, r: layer(x) + 1e-3 * x)
        found = cases.errors(case, layer, cases.Inputs.random(case, torch.Generator()))
        assert cases.are_wrong(found, "fp32") == ["y", "dx"]
        assert cases.are_wrong({"y": math.nan, "dγ": 0.0}, "bf16") == ["y"]
        assert cases.are_wrong({"y": 5e-3, "dγ": 5e-3}, "bf16") == ["y", "dγ"]
        assert cases.are_wrong({"y": 5e-3, "dγ": 5e-3}, "bf16", slack=4) == ["dγ"]


class TestStep:
    @pytest.mark.parametrize(
        ("largest", "start", "step", "trials", "found"),
        [
            (187, 128, 8, 10, (184, 192)),
            (56, 128, 8, 10, (56, 64)),
            (1000, 128, 8, 10, (1000, 1008)),
            (3, 128, 8, 10, (0, 8)),
            (187, 128, 8, 3, (128, 192)),
            (10**6, 128, 8, 2, (256, 512)),
        ],
    )
    def test_largest_that_fits(self, imported, largest, start, step, trials, found):
        asked = []

        def fits(size):
            asked.append(size)
            return size <= largest

        assert imported("gpu_networks").largest_that_fits(fits, start, step, trials) == found
        assert len(asked) == len(set(asked)) <= trials

    @pytest.mark.parametrize(
        ("kernel", "kind"),
        [
            ("void at::native::batch_norm_collect_statistics_channels_last_kernel<", "NORM"),
            ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512>", "NORM"),
            ("triton_red_fused__native_batch_norm_legit_functional_convolution_3", "NORM"),
            ("void at::native::vectorized_elementwise_kernel<4, launch_clamp_scalar(", "NORM"),
            ("vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>", "NORM"),
            ("ampere_scudnn_128x64_relu_medium_nn_v1", "CONVOLUTION"),
            ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "CONVOLUTION"),
            (
                "multi_tensor_apply_kernel<BinaryOpListAlphaFunctor<float, std::plus<float>>",
                "OPTIMIZER",
            ),
            ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<", "POOLING"),
            ("at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)", "COPIES"),
            ("cunn_SoftMaxForward", "OTHERS"),
            ("our_sweep", "NORM"),
        ],
    )
    def test_kernels_by_name(self, imported, kernel, kind):
        by_name = imported("gpu_kernels")
        assert by_name.kind_of(kernel, frozenset({"our_sweep"})) == getattr(by_name, kind)

    @pytest.mark.usefixtures("on_reference")
    def test_variants_compute_what_torch_does(self, imported):
        pytest.importorskip("pytorchcv")
        networks, cpu = imported("gpu_networks"), torch.device("cpu")
        batch = networks.random_batch(4, 8, 10, cpu)

        def gradients(variant):
            return networks.gradients("gpu_networks:tiny", variant, batch, cpu, torch.float64)

        wanted = gradients(networks.EAGER)
        for variant in networks.VARIANTS[2:]:
            torch.testing.assert_close(gradients(variant), wanted, rtol=1e-9, atol=1e-12)

    def test_additions_are_fused(self, imported):
        pytest.importorskip("pytorchcv")
        networks = imported("gpu_networks")
        plain = networks.varied(networks.network("gpu_networks:tiny"), networks.OURS)
        fused = networks.varied(networks.network("gpu_networks:tiny"), networks.ADDED)
        acts = [
            sum(getattr(module, "act", None) == Activation.of("relu") for module in model.modules())
            for model in (plain, fused)
        ]
        assert acts == [5, 7]  # and those of the two additions
        with pytest.raises(ValueError, match="by hand"):
            networks.fuse_additions(torch.nn.Linear(2, 2))

    def test_goals(self, imported):
        fits = {"torch eager": 160, "ours, rematerialized": 192}
        fits["ours, additions fused, rematerialized"] = 240
        speeds = {"ours": (1.1, 1.0, 1.2), "ours, additions fused": (1.2, 1.1, 1.3)}
        used = {variant: {"fits": {"largest": size}} for variant, size in fits.items()}
        found = imported("gpu_step").goals({"times": {"eager over": speeds}, "use": used})
        told = [(g.found, g.verdict) for g in found]
        assert told == [(1.1, "missed"), (1.2, "reached"), (1.2, "missed"), (1.5, "reached")]
        nothing = imported("gpu_step").goals({"use": {}})
        assert {g.verdict for g in nothing} == {"not measured"}

    def test_what_runs_out_of_memory(self, imported):
        step = imported("gpu_step")
        assert step.is_out_of_memory(torch.OutOfMemoryError("of it"))
        assert step.is_out_of_memory(RuntimeError("GET was unable to find an engine to execute"))
        assert not step.is_out_of_memory(RuntimeError("an illegal memory access"))


def test_results_are_no_dry_runs(imported):
    timing = imported("gpu_timing")
    with pytest.raises(SystemExit, match="measures nothing"):
        timing.refuse_dry_results(BENCHMARKS / "results" / "layers.md", True)
    timing.refuse_dry_results(BENCHMARKS / "results" / "layers.md", False)
    timing.refuse_dry_results(Path("elsewhere.md"), True)


def test_numbers_lie_beside_the_page(imported, tmp_path):
    page = tmp_path / "results" / "layers.md"
    imported("gpu_timing").write(page, "text", {"rows": [{"shape": "2×3", "t": 1 / 3}]})
    assert page.read_text("utf-8") == "text"
    told = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert told == {"rows": [{"shape": "2×3", "t": 0.33333}]}


def test_no_results_without_a_measurement():
    """Whoever measures on a GPU commits the pages, and lets the README quote them."""
    results = BENCHMARKS / "results"
    told = "not measured yet: no table" in (BENCHMARKS / "README.md").read_text("utf-8")
    assert told != any(results.glob("gpu_*.md"))
