"""The classic mistakes with batch norm, made for real or not made, under the auditor's eyes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, freeze, recalibrate
from batchnorm.audit import Probe, audit, find_rule, watch
from batchnorm.lab.data import Examples, Split, batches
from batchnorm.lab.networks import Norm, Perceptron, PlainNetwork
from batchnorm.lab.training import evaluated, hits

__all__ = ["KINDS", "MISTAKES", "Made", "Mistake"]

BATCH, TINY, RATE = 32, 2, 0.1
PADDED = 24  # columns that a sequence is padded to

Made = tuple[float, bool]
"""Test accuracy in percent, and whether the auditor found what it should in the mistake."""


def network_for(data: Split, norm: Norm = nn.BatchNorm2d) -> PlainNetwork:
    """Five convolutions, where the data are."""
    return PlainNetwork(norm, depth=5).to(data.test.x.device)


def drawn(examples: Examples, size: int, steps: int, seed: int) -> Iterator[Examples]:
    """Shuffled batches."""
    return (examples[chosen] for chosen in islice(batches(len(examples), size, seed), steps))


def learn(
    network: nn.Module,
    stream: Iterable[Examples],
    *,
    rate: float = RATE,
    forward: Callable[[Tensor], Tensor] | None = None,
    accumulated: int = 1,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train on a stream of batches, `accumulated` of them a step; `after` each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    network.train()
    for i, part in enumerate(stream, start=1):
        value = F.cross_entropy((forward or network)(part.x), part.y)
        (value / accumulated).backward()
        if i % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
            after()


def percent(network: nn.Module, examples: Examples) -> float:
    """The accuracy in inference, in batches as a loader gives them."""
    return 100 * hits(evaluated(network, examples.x, batch=BATCH), examples.y)


def forgotten_eval(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """Images are answered one by one, in training mode."""
    network = network_for(data)
    learn(network, drawn(data.train, BATCH, steps, seed))
    network.train(is_wrong)
    with watch(network, rules=[find_rule("BN108")]) as probe, torch.no_grad():
        logits = torch.cat([network(image) for image in data.test.x.split(1)])
    return 100 * hits(logits, data.test.y), bool(probe.report().findings)


def missing_buffers(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """Parameters are saved without the buffers."""
    network = network_for(data)
    learn(network, drawn(data.train, BATCH, steps, seed))
    loaded = network_for(data)
    saved = dict(network.named_parameters()) if is_wrong else network.state_dict()
    loaded.load_state_dict(saved, strict=False)
    report = audit(loaded, rules=[find_rule("BN106")])
    return percent(loaded, data.test), bool(report.findings)


def stale_statistics(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """The momentum is another framework's way round: 0.001 of each batch is taken up."""
    network = network_for(data, partial(nn.BatchNorm2d, momentum=0.001 if is_wrong else 0.1))
    with watch(network, rules=[find_rule("BN103")]) as probe:
        learn(network, drawn(data.train, BATCH, steps, seed))
        reached = percent(network, data.test)
    return reached, bool(probe.report().findings)


def averaged_weights(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """The weights of all steps are averaged, the statistics are the last step's."""
    network = network_for(data)
    averaged = AveragedModel(network)
    with Probe(rules=[find_rule("BN105")]) as probe:
        learn(
            network,
            drawn(data.train, BATCH, steps, seed),
            after=lambda: averaged.update_parameters(network),
        )
        if not is_wrong:
            recalibrate(averaged.eval(), [data.train.x], progress=False)
        reached = percent(averaged, data.test)
    return reached, bool(probe.report().findings)


def half_frozen(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """The head learns inverted images on frozen features, and is then put back as it was."""
    network = network_for(data)
    learn(network, drawn(data.train, BATCH, steps, seed))
    old = copy.deepcopy(network.head)
    network.features.requires_grad_(False)
    if not is_wrong:
        freeze(network.features)
    inverted = Examples(1 - data.train.x, data.train.y)
    with watch(network, rules=[find_rule("BN102")]) as probe:
        learn(network, drawn(inverted, BATCH, steps // 2, seed + 1))
    network.head = old
    return percent(network, data.test), bool(probe.report().findings)


def tiny_batches(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """A perceptron sees as many samples in batches of 2, at a learning rate as much smaller."""
    network = Perceptron(nn.BatchNorm1d, inputs=64).to(data.test.x.device)
    size = TINY if is_wrong else BATCH
    stream = drawn(data.train, size, steps * BATCH // size, seed)
    with watch(network, rules=[find_rule("BN110")]) as probe:
        learn(network, stream, rate=RATE * size / BATCH)
        reached = percent(network, data.test)
    return reached, bool(probe.report().findings)


def sorted_batches(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """The images lie sorted by class, so that most batches have one or two; those are shuffled."""
    network = network_for(data)
    by_class = data.train[data.train.y.argsort(stable=True)]
    runs = torch.arange(len(by_class)).split(BATCH)[:-1]
    order = (int(i) for (i,) in batches(len(runs), 1, seed))
    stream = (
        (by_class[runs[i]] for i in islice(order, steps))
        if is_wrong
        else drawn(data.train, BATCH, steps, seed)
    )
    with watch(network, rules=[find_rule("BN124")]) as probe:
        learn(network, stream)
    return percent(network, data.test), bool(probe.report().findings)


def accumulated_gradients(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """Eight micro-batches of 4 take the place of a batch of 32."""
    network = network_for(data)
    parts = 8 if is_wrong else 1
    stream = drawn(data.train, BATCH // parts, steps * parts, seed)
    with watch(network, rules=[find_rule("BN122")]) as probe:
        learn(network, stream, accumulated=parts)
    return percent(network, data.test), bool(probe.report().findings)


class Columns(nn.Module):
    """Reads an image as a sequence of its columns of ink, padded; answers by their average."""

    def __init__(self, *, knows_padding: bool) -> None:
        super().__init__()
        self.knows_padding = knows_padding
        self.convolutions = nn.ModuleList(
            nn.Conv1d(c_in, 32, 3, padding=1, bias=False) for c_in in (8, 32, 32)
        )
        self.norms = nn.ModuleList(BatchNorm1d(32) for _ in self.convolutions)
        self.head = nn.Linear(32, 10)

    def forward(
        self, x: Float[Tensor, "n rows columns"], mask: Bool[Tensor, "n columns"]
    ) -> Float[Tensor, "n 10"]:
        """Logits."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x)
            x = norm(x, mask=mask) if self.knows_padding else norm(x)
            x = torch.relu(x) * mask[:, None]  # padding goes no further in either case
        return self.head(x.sum(2) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def columns_of(
    x: Float[Tensor, "n 1 rows width"], length: int
) -> tuple[Float[Tensor, "n rows {length}"], Bool[Tensor, "n {length}"]]:
    """Each image from its first column of ink to its last, then zeros; true where there is ink."""
    sequences, mask = x.new_zeros(len(x), x.shape[2], length), x.new_zeros(len(x), length).bool()
    for i, image in enumerate(x[:, 0]):
        inked = (image > image.min()).any(0).nonzero().flatten()
        part = image[:, int(inked[0]) : int(inked[-1]) + 1]
        sequences[i, :, : part.shape[1]], mask[i, : part.shape[1]] = part, True
    return sequences, mask


def padded_sequences(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """Sequences of 8 columns at most are padded to 24, and the norm does not know."""
    network = Columns(knows_padding=not is_wrong).to(data.test.x.device)
    x, mask = columns_of(data.train.x, PADDED)
    learn(
        network,
        drawn(Examples(torch.arange(len(x)).float(), data.train.y), BATCH, steps, seed),
        forward=lambda chosen: network(x[chosen.long()], mask[chosen.long()]),
    )
    shown = [(x[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, 10 * BATCH, BATCH)]
    report = audit(
        network,
        shown,
        forward=lambda model, batch: model(*batch),
        mask=lambda batch: batch[1],
        rules=[find_rule("BN125")],
    )
    network.eval()
    with torch.no_grad():
        logits = network(*columns_of(data.test.x, data.test.x.shape[3]))
    return 100 * hits(logits, data.test.y), bool(report.findings)


def half_precision(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """The model learns in bfloat16, its running statistics as well."""
    norm = nn.BatchNorm2d if is_wrong else BatchNorm2d
    network = network_for(data, norm).bfloat16()
    train, test = (Examples(part.x.bfloat16(), part.y) for part in (data.train, data.test))
    learn(network, drawn(train, BATCH, steps, seed))
    rule = find_rule("BN121")
    findings = audit(network, rules=[rule]).findings
    return percent(network, test), any("running" in finding.message for finding in findings)


def counted_twice(data: Split, steps: int, seed: int, *, is_wrong: bool) -> Made:
    """An activation checkpoint computes the layers again, and they count the batch again."""
    network = network_for(data, nn.BatchNorm2d if is_wrong else BatchNorm2d)

    def forward(x: Tensor) -> Tensor:
        inner: Tensor = checkpoint(network.features, x, use_reentrant=False)
        logits: Tensor = network.head(inner.mean((2, 3)))
        return logits

    with watch(network, rules=[find_rule("BN107")]) as probe:
        learn(network, drawn(data.train, BATCH, steps, seed), forward=forward)
    return percent(network, data.test), bool(probe.report().findings)


@dataclass(frozen=True)
class Mistake:
    """How it is made, and the rule that should find it.

    - `make(data, steps, seed, is_wrong=...)`: with the mistake or without it.
    - `kind`: one of `KINDS`.
    - `short`: what a figure calls it.
    """

    make: Callable[..., Made]
    code: str
    kind: str
    short: str


KINDS = {
    "inference": "inference with statistics not its own",
    "batches": "training on batches unlike the data",
    "buffers": "statistics kept badly",
}
MISTAKES = {
    "forgotten eval": Mistake(forgotten_eval, "BN108", "inference", "forgotten\neval()"),
    "missing buffers": Mistake(missing_buffers, "BN106", "inference", "missing\nbuffers"),
    "stale statistics": Mistake(stale_statistics, "BN103", "inference", "stale\nstatistics"),
    "averaged weights": Mistake(averaged_weights, "BN105", "inference", "averaged\nweights"),
    "half frozen": Mistake(half_frozen, "BN102", "inference", "half\nfrozen"),
    "tiny batches": Mistake(tiny_batches, "BN110", "batches", "batches\nof 2"),
    "sorted batches": Mistake(sorted_batches, "BN124", "batches", "sorted\nbatches"),
    "accumulated gradients": Mistake(accumulated_gradients, "BN122", "batches", "accumu-\nlated"),
    "padded sequences": Mistake(padded_sequences, "BN125", "batches", "padding"),
    "half precision": Mistake(half_precision, "BN121", "buffers", "half\nprecision"),
    "counted twice": Mistake(counted_twice, "BN107", "buffers", "counted\ntwice"),
}
