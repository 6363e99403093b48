"""Claim 8: its quick run, the gradients it measures, and how spreads become an effect."""

import pytest
import torch
import torch.nn.functional as F

from batchnorm.lab.claims.c08_keeps_gradients import (
    GROWTH,
    KeepsGradients,
    Trial,
    build,
    gradient_norms,
    layers_of,
    saved,
    spread,
)
from batchnorm.lab.results import Results
from laboratory import quick


def test_the_quick_run_measures_every_layer():
    results = quick(KeepsGradients)
    assert len(results) == 24
    for row in results:
        layers = row["depth"] if row["network"] == "plain" else 1 + (row["depth"] - 1) // 2
        assert len(row["relative"]) == layers
        assert row["relative"][-1] == 1
        first = row["relative"][0]
        assert row["spread"] == pytest.approx(max(first, 1 / first))
    for network, depth in (("plain", 20), ("residual", 21)):
        # what is normalized has no scale: the same seed's gradients but for ε
        spreads = [spread(results, network, depth, "batch", gain)[0] for gain in (0.5, 1.0, 2.0)]
        assert spreads == pytest.approx([spreads[1]] * 3, rel=0.05)
    # without norm each layer multiplies by the gain; the loss's own slope differs a little
    plain = results.where(network="plain", depth=20, arm="none")
    one, half = (next(iter(plain.where(gain=gain)))["relative"][0] for gain in (1.0, 0.5))
    assert half == pytest.approx(one * 0.5**19, rel=0.3)
    for hypothesis in KeepsGradients.hypotheses:
        if "20 layers" in hypothesis.where:
            hypothesis.judge(results)
    KeepsGradients().figure(results)


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_the_norms_are_those_of_the_loss_by_the_layers_outputs(network):
    torch.manual_seed(0)
    made = build(Trial(network, 5, "none", 1.0, 0)).double()
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    norms = gradient_norms(made, x, y)
    place = len(norms) // 2
    direction = None

    def moved_by(h):
        def move(_, __, output):
            nonlocal direction
            if direction is None:
                direction = torch.randn_like(output)
            return output + h * direction

        hook = layers_of(made)[place].register_forward_hook(move)
        loss = F.cross_entropy(made(x), y).item()
        hook.remove()
        return loss

    # over many directions the squared slope is on average the squared norm
    squares = []
    for _ in range(300):
        direction = None
        squares.append(((moved_by(1e-6) - moved_by(-1e-6)) / 2e-6) ** 2)
    mean = sum(squares) / len(squares)
    assert mean**0.5 == pytest.approx(norms[place], rel=0.2)


def test_growth_is_yangs():
    assert pytest.approx(1.2112, abs=1e-4) == GROWTH


def test_an_effect_is_of_its_setting():
    rows = [
        {
            "network": "plain",
            "depth": 20,
            "arm": arm,
            "gain": gain,
            "seed": seed,
            "spread": (8.0 if arm == "none" else 2.0) * (1 + seed) * gain,
        }
        for arm in ("batch", "none")
        for gain in (1.0, 0.5)
        for seed in range(2)
    ]
    rows[0]["spread"] = 1.0
    results = Results(rows)
    assert spread(results, "plain", 20, "batch") == [1.0, 4.0]
    assert saved(results, 1.0) == [8.0, 4.0]
    assert saved(results, 0.5) == [4.0, 4.0]
