"""One layer for several distributions: a set of statistics for each."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.layers.base import BatchNorm

__all__ = ["DomainBatchNorm", "domain"]


@dataclass
class _Route:
    domain: str | None = None


# One for the process, not a ContextVar: torch.compile guards on a plain attribute, and the
# threads of a backward pass or of DataParallel must see it.
_route = _Route()


@contextmanager
def domain(name: str) -> Iterator[None]:
    """Route every `DomainBatchNorm` called inside through the statistics of domain `name`.

    ```python
    with domain("target"):
        logits = model(images)
    ```

    It holds for the whole process. Where threads work on different domains at once, a
    checkpointed region is computed again after the block has ended, or torch.compile, which
    compiles once per name, reaches its limit of recompilations, pass `domain=` instead.
    """
    before = _route.domain
    _route.domain = name
    try:
        yield
    finally:
        _route.domain = before


class DomainBatchNorm(nn.Module):
    """A batch norm with its own statistics for each named domain.

    Real and generated images, clean and adversarial ones, source and target: batches of
    different distributions do not share a mean, and one running mean between them serves none.

    ```python
    norm = DomainBatchNorm(BatchNorm2d(64), ["clean", "adversarial"])
    norm(x, domain="clean")                     # (n, 64, h, w)
    with domain("adversarial"):                 # around the whole model
        norm(x)
    ```

    - `layer`: any layer of this library; each domain gets a copy of it.
    - `domains`: their names.
    - `separate_affine`: whether γ and β are kept per domain too. By default they are shared.

    With a layer that shares statistics with other ranks, `statistics=Sync()`, all ranks are to be
    in the same domain at a time, with any number of samples each; a rank that is in another makes
    all raise `SyncError`.

    Raises `ValueError` for no, repeated or unusable names, `TypeError` for another kind of layer.

    Source: Chang et al. 2019, "Domain-specific batch normalization", section 3.1 (separate γ
    and β there); Xie et al. 2020, "Adversarial examples improve image recognition", section 3.
    """

    def __init__(
        self, layer: BatchNorm, domains: Iterable[str], *, separate_affine: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(layer, BatchNorm) or isinstance(layer, LazyModuleMixin):
            raise TypeError(
                "DomainBatchNorm copies a layer of this library that knows its channels, such as "
                f"BatchNorm2d(64), got {type(layer).__name__}"
            )
        names = [domains] if isinstance(domains, str) else list(domains)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"domains must be names, such as ['clean', 'noisy'], got {names}")
        unusable = [n for n in names if not n or "." in n or hasattr(nn.ModuleDict(), n)]
        if not names or len(set(names)) < len(names) or unusable:
            raise ValueError(
                "domains must be at least one name, each once, not empty, without a dot and no "
                "attribute of a module, since they become keys of the state_dict; "
                f"got {names}"
            )
        self.separate_affine = separate_affine
        self.layers = nn.ModuleDict({name: copy.deepcopy(layer) for name in names})
        if not separate_affine:
            first = self.layers[names[0]]
            for other in self.layers.values():
                other.weight, other.bias = first.weight, first.bias

    def forward(
        self,
        input: Float[Tensor, "n c *positions"],
        *,
        domain: str | None = None,
        residual: Float[Tensor, "n c *positions"] | None = None,
        mask: Bool[Tensor, "n *positions"] | None = None,
    ) -> Float[Tensor, "n c *positions"]:
        """Normalize `input` as a batch of `domain`, or of the domain of the context around.

        Raises `ValueError` where neither names a domain that this layer knows.
        """
        name = _route.domain if domain is None else domain
        if name is None or name not in self.layers:
            raise ValueError(
                f"DomainBatchNorm has the domains {list(self.layers)}, got {name!r}; pass "
                "domain=..., or call the model inside `with batchnorm.domain(...)`"
            )
        layer = self.layers[name]
        output: Tensor = layer(input, residual=residual, mask=mask)
        return output

    def freeze(
        self,
        *,
        statistics: Literal["running", "batch"] = "running",
        updates: bool = False,
        learns: bool = False,
    ) -> DomainBatchNorm:
        """Freeze every domain's layer; see `BatchNorm.freeze`."""
        for layer in self._domains():
            layer.freeze(statistics=statistics, updates=updates, learns=learns)
        return self

    def unfreeze(self) -> DomainBatchNorm:
        """Undo `freeze`."""
        for layer in self._domains():
            layer.unfreeze()
        return self

    def _domains(self) -> list[BatchNorm]:
        return [layer for layer in self.layers.values() if isinstance(layer, BatchNorm)]

    def extra_repr(self) -> str:
        """What the domains share."""
        return f"separate_affine={self.separate_affine}"
