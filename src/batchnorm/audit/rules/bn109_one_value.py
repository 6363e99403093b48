"""BN109: one value per channel."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.audit.call import Call
from batchnorm.audit.finding import Finding, Severity
from batchnorm.audit.place import calling_place
from batchnorm.audit.rule import Rule, repair

__all__ = ["OneValuePerChannel"]


class OneValuePerChannel(Rule):
    """## What it finds

    A batch norm layer that is asked to normalize a single value per channel: one sample with
    one position, or a ghost slice of one.

    ## Why it hurts

    One value is its own mean. Its variance is 0, every output is β whatever the input was, and
    an unbiased variance does not exist. PyTorch raises `Expected more than 1 value per channel
    when training`, often hours into a run, when the last batch of an epoch has one sample left.

    ## Example

        loader = DataLoader(data, batch_size=32)        # 1,025 samples: the last batch is one
        for x, y in loader:
            model(x)                                    # raises in the last step of the epoch

    ## Fix

    `DataLoader(..., drop_last=True)`; larger batches; for batches of one by design, another
    normalization (`torch.nn.GroupNorm`), or frozen statistics (`layer.freeze()`).

    ## When it is fine

    Never in training. In eval mode a layer with running statistics takes single samples.

    ## Evidence

    pytorch/pytorch#7716, pytorch/pytorch#4534, open-mmlab/mmsegmentation#272
    """

    code = "BN109"
    name = "one value per channel"
    looks_at = "run"

    def __init__(self) -> None:
        self._seen: dict[tuple[str, tuple[int, ...]], str | None] = {}

    def before(self, call: Call) -> None:
        """Look at the shape before PyTorch's own error ends the run."""
        x = call.input
        if x is None or x.ndim < 2 or x.numel() > x.shape[0] * x.shape[1]:  # many positions
            return
        if call.smallest_slice == 1 and call.normalizes_with_batch:
            key = (call.path, tuple(x.shape))
            if key not in self._seen:
                self._seen[key] = calling_place()
                call.notes[self.code] = key

    def after(self, call: Call) -> None:
        """Take it back where nothing was raised: a subclass had another way out."""
        self._seen.pop(call.notes.get(self.code, ("", ())), None)

    def findings(self) -> Iterator[Finding]:
        """One for each layer and shape."""
        for (path, shape), place in self._seen.items():
            yield self.found(
                Severity.ERROR,
                f"an input of shape {shape} leaves one value per channel, which has no variance",
                modules=(path,),
                place=place,
                fix="DataLoader(..., drop_last=True), larger batches, or "
                + repair("freeze(model)"),
                values_per_channel=1.0,
            )
