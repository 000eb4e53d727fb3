"""What a model looked like when something was made of it, compared before each use of what was made.

A decode step asks every time, so a check is one pass over flat lists in the interpreter's own loops: some 60 ns for a
module or tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# transformers leaves hooks on the blocks of every model that was once asked for hidden states; they do nothing until it
# is asked again.
_IDLE = "transformers.utils.output_capturing"


class Holds:
    """That modules hold these very objects: (module, `_modules`, `_parameters` or `_buffers`, name, object)."""

    def __init__(self, entries: Iterable[tuple[nn.Module, str, str, Any]]) -> None:
        self.entries = list(entries)
        self._flat: tuple[list[Any], list[str], list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the dictionaries of their modules are others."""
        return self.__dict__ | {"_flat": None}

    def __call__(self) -> bool:
        if self._flat is None:
            holders = [getattr(module, kind) for module, kind, _, _ in self.entries]
            self._flat = holders, [entry[2] for entry in self.entries], [entry[3] for entry in self.entries]
        holders, names, objects = self._flat
        return all(map(is_, map(dict.get, holders, names), objects))


class Snapshot:
    """The children `names` of a module and all beneath them: whether they are still the same, and whether torch would
    call more than their classes' forward."""

    def __init__(self, parent: nn.Module, *names: str) -> None:
        held = [(parent, "_modules", name, parent.get_submodule(name)) for name in names]
        self.modules = [module for *_, root in held for module in root.modules()]
        children = [(module, "_modules", *child) for module in self.modules for child in module._modules.items()]
        self._held, self._children = Holds(held), Holds(children)
        self._flat: tuple[list[Any], list[Any], list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_flat": None}

    def _dictionaries(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Of each module: its children, its attributes; and its two kinds of hooks."""
        if self._flat is None:
            hooks = [hooks for module in self.modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
            self._flat = [module._modules for module in self.modules], [vars(module) for module in self.modules], hooks
        return self._flat

    def same(self) -> bool:
        """Whether no module was exchanged, added or removed."""
        return (
            self._held() and self._children() and sum(map(len, self._dictionaries()[0])) == len(self._children.entries)
        )

    def touched(self) -> bool:
        """Whether a module has a hook, or a forward that is not its class's."""
        _, attributes, hooks = self._dictionaries()
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        if any(hooks) and any(getattr(hook, "__module__", None) != _IDLE for found in hooks for hook in found.values()):
            return True
        if not any(map(dict.get, attributes, repeat("forward"))):
            return False
        own = ((vars(module).get("forward"), type(module).forward) for module in self.modules)
        return any(forward is not None and getattr(forward, "__func__", None) is not usual for forward, usual in own)
