"""Reports that tests turn into every form."""

from __future__ import annotations

import dataclasses
import math

from batchnorm.audit import (
    Distance,
    Finding,
    GradientNorm,
    LayerProfile,
    Noise,
    Period,
    Report,
    Severity,
)
from batchnorm.audit.finding import Ending

WARNED = Finding(
    "BN108",
    Severity.WARNING,
    "2 layers moved in 3 forward passes",
    ("Net.a", "Net.b"),
    "call model.eval() before this line",
    "train.py:12",
    {"layers": 2.0, "passes": 3.0},
    "statistics moved with gradients off",
)
FAILED = Finding(
    "BN109",
    Severity.ERROR,
    "an input of shape (1, 3)",
    ("Net.c",),
    "drop_last=True",
    name="one value per channel",
)
CODES = ("BN103", "BN108", "BN109")

# what a stranger may have named things: markup, a link, quotes, a reversal, nothing to see, no text
HOSTILE = (
    "<script>document.title='run'</script>",
    '"><img src=x onerror="document.title=1">',
    "</style></svg></details><h1>forged</h1>",
    "javascript:alert(1)",
    "'single' & \"double\" &lt;",
    "abc\u202edef\u2066ghi",
    "zero\u200bwidth\ufeff",
    "escape\x1b[2Jbell\x07null\x00",
    "two\nlines\r\n::error::forged",
    "half\udc80a pair",
    "{{ 7 * 7 }}{% raw %}",
    "100%, [a](b) {0}",
    "Größe.层.طبقة",
)


def report(*findings: Finding, layers: int = 3, disabled: dict[str, str] | None = None) -> Report:
    """A report with these findings and nothing measured."""
    return Report(findings, layers, 7, CODES, disabled or {})


def of_ranks() -> Report:
    """A report of four ranks, of which two did not end well."""
    found = dataclasses.replace(WARNED, ranks=(1, 2, 3)), FAILED
    endings = (
        Ending(1, "told to end (SIGTERM)", "train.py:31"),
        Ending(2, "exit status 1"),
        Ending(3, "told to end (SIGTERM)", "train.py:31"),
    )
    return dataclasses.replace(report(*found), ranks=4, endings=endings)


def stale(path: str, shift: float, stretch: float) -> Finding:
    """A finding of BN103."""
    return Finding(
        "BN103",
        Severity.WARNING,
        f"the running mean is off by {shift:.2g} ± 0.02 standard deviations, the running "
        f"standard deviation by ×{math.exp(stretch):.2g} (± 3%)",
        (path,),
        "torch.optim.swa_utils.update_bn(loader, model) before evaluating; then a larger momentum",
        numbers={"shift": shift, "shift_error": 0.02, "stretch": stretch, "stretch_error": 0.03},
        name="running statistics far from the data's",
    )


def measured(layers: int = 7) -> Report:
    """A watched run in which everything was measured, with waves for numbers."""
    profiles = tuple(_profile(i, layers) for i in range(layers))
    far = [p for p in profiles if p.distance is not None and p.distance.is_harmful]
    found = tuple(stale(p.path, p.distance.shift, p.distance.stretch) for p in far if p.distance)
    moved = Finding(
        "BN108",
        Severity.WARNING,
        f"{layers} layers moved their running statistics in 72 forward passes with gradients off: "
        "the model was in training mode",
        tuple(p.path for p in profiles),
        "call model.eval() before this line, and model.train() before training goes on",
        "examples/digits.py:69",
        {"layers": float(layers), "passes": 72.0},
        "statistics moved with gradients off",
    )
    one = Finding(
        "BN109",
        Severity.ERROR,
        f"an input of shape (1, {profiles[-1].channels}): its variance is 0, and the output is β",
        (profiles[-1].path,),
        "DataLoader(…, drop_last=True)",
        "examples/digits.py:61",
        name="one value per channel",
    )
    mode = ("train", "train without gradients", "eval")
    timeline = [Period("ResidualNetwork", mode[k % 2], 24 - 18 * (k % 2)) for k in range(16)]
    timeline += [Period("Averaged", mode[2], 6), Period("Averaged", mode[0], 3)]
    dead = Finding(
        "BN128",
        Severity.INFO,
        "3 of 112 channels have |γ| < 1e-5",
        (profiles[0].path,),
        "prune them, or train without weight decay on γ",
        numbers={"dead": 3.0, "channels": 112.0},
        name="channels switched off by γ",
    )
    return Report(
        (one, moved, *found, dead),
        layers,
        2352,
        ("BN103", "BN104", "BN108", "BN109", "BN128"),
        {"BN104": "KeyError: 'block'"},
        profiles=profiles,
        timeline=tuple(timeline),
    )


def _profile(i: int, layers: int) -> LayerProfile:
    t = i / max(1, layers - 1)
    channels = 16 * 2 ** (3 * i // layers)
    wave = math.sin(7 * t) ** 2
    block, part = divmod(i, 2)
    stretch = 0.05 + 0.5 * t**3
    middle = 1 - 0.4 * t
    spread = 0.15 + 0.25 * wave
    weight = tuple(middle + spread * z for z in (-2.4, -1.6, -0.6, 0.0, 0.7, 1.7, 2.9))
    gradients = tuple(
        GradientNorm(step, 10 ** (-1 - 1.6 * t + 0.25 * math.sin(step / 37 + 5 * t) - step / 900))
        for step in range(1, 880, 20)
    )
    return LayerProfile(
        f"ResidualNetwork.{block}.norm{part + 1}",
        channels,
        weight,
        3 if i == 0 else round(channels * 0.3 * max(0.0, wave - 0.8)),
        Distance(0.08 + 0.9 * wave * t, 0.03 + 0.02 * wave, stretch, 0.04),
        Noise(0.05 + 0.3 * t**2, 0.01 + 0.02 * t),
        gradients,
    )


def hostile() -> Report:
    """A report in which every string from outside is one of `HOSTILE`."""
    findings = tuple(
        Finding(
            "BN108",
            Severity.WARNING,
            f"message {odd}",
            (f"Net.{odd}",),
            f"fix {odd}",
            f"{odd}.py:1",
            {odd: math.nan},
            f"name {odd}",
        )
        for odd in HOSTILE
    )
    unknown = Finding(HOSTILE[0], Severity.INFO, HOSTILE[1], (), "", HOSTILE[2], {"x": -math.inf})
    profiles = tuple(
        LayerProfile(
            odd,
            4,
            (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, math.inf),
            1,
            Distance(math.nan, 0.0, math.inf, 0.0),
            Noise(0.1, 0.0),
            (GradientNorm(1, 0.0), GradientNorm(2, math.nan), GradientNorm(3, 1.0)),
        )
        for odd in HOSTILE
    )
    return Report(
        (*findings, unknown),
        len(HOSTILE),
        7,
        ("BN103", HOSTILE[0]),
        dict.fromkeys(HOSTILE, HOSTILE[0]) | {"BN103": HOSTILE[1]},
        "".join(HOSTILE),
        HOSTILE[0],
        profiles,
        tuple(Period(odd, odd, 3) for odd in HOSTILE),
        endings=tuple(Ending(rank, odd, odd) for rank, odd in enumerate(HOSTILE)),
    )
