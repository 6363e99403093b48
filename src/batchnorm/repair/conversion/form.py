"""What makes a module a layer of its kind, and how it becomes one of another where it stands."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["COMMON", "Form", "become", "fresh", "is_still", "revert"]

COMMON = ("num_features", "eps", "momentum", "affine", "track_running_stats")
"""The settings that batch norms of every kind have; who changes them, means them to stay."""


@dataclass(frozen=True, eq=False)
class Form:
    """The class of a module and what that class holds: settings, tensors, modules.

    Hooks, the mode, and what its user put on it are no part of its form.

    - `settings`: plain attributes, such as `eps`.
    - `dtypes`: of the buffers, in a form that is only remembered and does not hold them.
    """

    kind: type[nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter | None] = field(default_factory=dict)
    buffers: dict[str, Tensor | None] = field(default_factory=dict)
    modules: dict[str, nn.Module | None] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, *like: Form) -> Form:
        """A module's form, as far as others have such attributes."""

        def held(now: dict[str, Any], names: list[dict[str, Any]]) -> dict[str, Any]:
            return {name: now[name] for each in names for name in each if name in now}

        return cls(
            type(module),
            held(vars(module), [form.settings for form in like]),
            held(module._parameters, [form.parameters for form in like]),
            held(module._buffers, [form.buffers for form in like]),
            held(module._modules, [form.modules for form in like]),
        )

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}

    @property
    def channels(self) -> int:
        """How many there are; pruning changes the tensors and leaves `num_features` behind."""
        known = [t for t in self.tensors.values() if t is not None and t.ndim == 1]
        return len(known[0]) if known else int(self.settings["num_features"])

    def remembered(self) -> Form:
        """The form without its tensors, which the layer that it becomes holds too."""
        return replace(
            self,
            parameters=dict.fromkeys(self.parameters),
            buffers=dict.fromkeys(self.buffers),
            dtypes={name: b.dtype for name, b in self.buffers.items() if b is not None},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Form:
        """A copy in the same ranks: a process group exists once, and cannot be copied."""
        group = self.settings.get("process_group")
        memo[id(group)] = group
        copy = Form(
            **{each.name: deepcopy(getattr(self, each.name), memo) for each in fields(self)}
        )
        memo[id(self)] = copy
        return copy

    def with_what(self, now: Form) -> Form:
        """The form with the tensors and the common settings that the module has now.

        A tensor that it has already takes the values; what is missing now stays as it was.
        """
        settings = {
            name: now.settings.get(name, value) if name in COMMON else value
            for name, value in self.settings.items()
        }
        held = now.tensors
        parameters = {n: _as_parameter(_latest(n, t, held)) for n, t in self.parameters.items()}
        buffers = {n: _as_buffer(_latest(n, t, held)) for n, t in self.buffers.items()}
        return replace(self, settings=settings, parameters=parameters, buffers=buffers)


def fresh(kind: type[nn.Module], *arguments: Any, **options: Any) -> Form:
    """The form of a new module; its tensors hold no memory."""
    with torch.device("meta"):
        module = kind(*arguments, **options)
    ordinary = vars(nn.Module())
    settings = {name: value for name, value in vars(module).items() if name not in ordinary}
    return Form(
        kind, settings, dict(module._parameters), dict(module._buffers), dict(module._modules)
    )


def become(module: nn.Module, now: Form, then: Form) -> None:
    """Give a module another form than the one it has now; it stays the same object."""
    attributes = vars(module)
    for name, held, new in (
        ("_parameters", now.parameters, then.parameters),
        ("_buffers", now.buffers, then.buffers),
        ("_modules", now.modules, then.modules),
    ):
        others = {key: v for key, v in attributes[name].items() if key not in {**held, **new}}
        # the form's own first, in the order that they have in a state_dict; at one stroke
        attributes[name] = type(attributes[name])({**new, **others})
    for name in now.settings.keys() - then.settings.keys():
        attributes.pop(name, None)
    attributes.update(then.settings)
    module.__class__ = then.kind


def is_still(module: nn.Module, then: Form) -> bool:
    """Whether a module has the form that it took, if frozen since, or told other common settings.

    A lazy layer becomes one of its class by its first batch.
    """
    if type(module) not in (then.kind, getattr(then.kind, "cls_to_become", None)):
        return False
    now, was = _own_settings(Form.of(module, then)), _own_settings(then)
    return all(now[name] == value for name, value in was.items() if name in now)


def _own_settings(form: Form) -> dict[str, Any]:
    """The settings of its kind alone, as they are while the layer is not frozen."""
    own = {name: value for name, value in form.settings.items() if name not in COMMON}
    if thawed := own.pop("_thawed", None):
        own["statistics"] = thawed[0]
    return own


def revert(module: nn.Module, was: Form, then: Form) -> None:
    """Take a module's former form again, with what its tensors have learned since."""
    now = Form.of(module, was, then)
    told = {
        n: v for n, v in now.settings.items() if n not in then.settings or v != then.settings[n]
    }
    become(module, then, was.with_what(replace(now, settings=told)))


def _latest(name: str, old: Tensor | None, held: dict[str, Tensor | None]) -> Tensor | None:
    """The values that a tensor has now, in the tensor that it was where that is there."""
    new, weight = held.get(name, old), held.get("weight")
    if old is None:
        return new
    if old is new or new is None:  # nobody held it meanwhile
        device = next((t.device for t in held.values() if t is not None), old.device)
        return old if old.device == device else _moved(old, device)
    if is_lazy(old) or is_lazy(new) or (old.shape, old.device) != (new.shape, new.device):
        return new
    if old.dtype != new.dtype and weight is not None and weight.dtype != old.dtype:
        return new  # the model has another dtype since
    with torch.no_grad():
        old.copy_(new)
    return old


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device: the same one where that can be, as `nn.Module.to` has it."""
    moved = tensor.detach().to(device)
    if not torch._has_compatible_shallow_copy_type(tensor, moved):
        return moved
    tensor.data = moved
    return tensor


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)


def _as_buffer(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
