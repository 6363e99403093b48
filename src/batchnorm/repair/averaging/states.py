"""Models as what can be averaged: tensors by name, whatever wrapper is around them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.repair.table import listed

__all__ = ["ModelOrState", "State", "checked_states"]

ModelOrState: TypeAlias = nn.Module | Mapping[str, Any]

# DataParallel, DistributedDataParallel and AveragedModel; torch.compile
_WRAPPERS = ("module.", "_orig_mod.")


class State(NamedTuple):
    """A model's tensors by name, without what a wrapper around it puts before the names.

    - `prefix`: what it puts there.
    - `n_averaged`: an AveragedModel's count.
    """

    tensors: dict[str, Tensor]
    prefix: str
    n_averaged: Tensor | None

    @classmethod
    def of(cls, model: ModelOrState, what: str) -> State:
        """The tensors of a model's state_dict; `what` names the model in errors."""
        if isinstance(model, nn.Module):
            held: Mapping[str, Any] = model.state_dict(keep_vars=True)
        elif isinstance(model, Mapping):
            held = model
        else:
            raise TypeError(f"{what} must be a module or a state_dict, got {type(model).__name__}")
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError(f"{what} has no tensors; a state_dict holds them by name, flat")
        for name, tensor in tensors.items():
            if is_lazy(tensor) or tensor.is_meta:
                raise ValueError(
                    f"{what} has no values for {name!r} yet, which is lazy or on the meta device; "
                    "run a batch through the model or load its weights first"
                )
        return _unwrapped(tensors)

    def everything(self) -> list[Tensor]:
        """All tensors, the count of an AveragedModel among them."""
        counts = [] if self.n_averaged is None else [self.n_averaged]
        return [*self.tensors.values(), *counts]

    def copied(self) -> State:
        """The same with tensors of its own."""
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        count = None if self.n_averaged is None else self.n_averaged.clone()
        return State(copies, self.prefix, count)

    def is_same(self, other: State) -> bool:
        """Whether all of the tensors are another model's; some may be, of a common backbone."""
        return all(_share(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    @property
    def stands_for(self) -> int:
        """How many models this one is the average of."""
        return 1 if self.n_averaged is None else max(int(self.n_averaged), 1)

    def statistics(self) -> list[str]:
        """What is before the names of running statistics, with its dot: "1.norm.", or ""."""
        means = [name for name in self.tensors if name.rpartition(".")[2] == "running_mean"]
        before = [name.removesuffix("running_mean") for name in means]
        return [each for each in before if each + "running_var" in self.tensors]


def checked_states(models: Iterable[ModelOrState], like: State) -> list[State]:
    """The models' tensors, with the names and shapes of `like`; at least one model, none twice.

    What comes out of a generator is copied at once, since it may load the next into the same model.
    """
    if isinstance(models, (nn.Module, Mapping)):  # its layers, or its names
        raise TypeError(
            f"models must be several models or state_dicts, got one {type(models).__name__}; "
            "put it in a list"
        )
    states: list[State] = []
    for place, model in enumerate(models):
        state = State.of(model, f"models[{place}]")
        _check_alike(like.tensors, state.tensors, f"models[{place}]")
        if isinstance(models, Collection):
            _check_apart(state, states)
        states.append(state if isinstance(models, Collection) else state.copied())
    if not states:
        raise ValueError("average needs at least one model, got none")
    return states


def _unwrapped(tensors: dict[str, Tensor]) -> State:
    prefix, n_averaged = "", None
    while True:
        names = [name for name in tensors if name != "n_averaged"]
        found = [w for w in _WRAPPERS if names and all(name.startswith(w) for name in names)]
        if not found:
            return State(tensors, prefix, n_averaged)
        n_averaged = tensors.get("n_averaged", n_averaged)
        prefix += found[0]
        tensors = {name.removeprefix(found[0]): tensors[name] for name in names}


def _check_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    lacking, more = (sorted(names) for names in (ours.keys() - theirs, theirs.keys() - ours))
    for names, has in ((lacking, "lacks"), (more, "has")):
        if names:
            raise ValueError(
                f"{what} {has} {listed(names)}, unlike the model that receives the average; "
                "average models of one architecture"
            )
    odd = [
        f"{name} of shape {tuple(theirs[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if theirs[name].shape != tensor.shape
    ]
    if odd:
        raise ValueError(f"{what} has {listed(odd)}; average models of one architecture")


def _check_apart(state: State, others: Sequence[State]) -> None:
    """Refuse a model that is there already: of one that was loaded again only the last is left."""
    for place, other in enumerate(others):
        if state.is_same(other):
            raise ValueError(
                f"models[{len(others)}] is models[{place}]: they share all their tensors, as the "
                "state_dicts of one network do; pass copies (copy.deepcopy), or a generator that "
                "loads one after the other; to count a model twice, weigh it with weights="
            )


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie in the same memory."""
    return one is other or one.data_ptr() == other.data_ptr() != 0
