"""What a model would take, found out before it is made: it is built without values, on torch's meta device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from detkit.errors import DetkitError
from detkit.ops.memory import free_memory, gib

Module = TypeVar("Module", bound=nn.Module)

MAX_MODULES = 30_000  # RevCol-XL and timm's largest have some 5,000


def sketch(make: Callable[[], Module], copies: int = 1) -> Module | None:
    """Return what ``make`` returns, on the meta device: shapes, and no memory.

    None: it cannot be made so, as a part looks at values, or is wrong: making it in earnest will tell.

    Args:
        copies: of the weights that are to be in memory; 0: none are.

    Raises:
        DetkitError: it has too many modules, or its weights would not fit into the free memory.
    """
    try:
        with _within_budget(copies), torch.device("meta"):
            return make()
    except TooLarge:
        raise
    except Exception:  # whatever a part does
        return None


class TooLarge(DetkitError):  # noqa: N818  (what it is, not that it is an error)
    """A model that this machine cannot hold."""


@contextmanager
def _within_budget(copies: int) -> Iterator[None]:
    """Count the modules and bytes of every module that is made in the block."""
    free = free_memory()
    modules = size = 0

    def add_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise TooLarge(
                f"the model has more than {MAX_MODULES:,} modules: lower model.depth, the repeats or columns of a part"
            )

    def add_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size
        size += copies * tensor.numel() * tensor.element_size() if tensor is not None else 0
        if size > free:
            times = f" ({copies} times, to train them)" if copies > 1 else ""
            raise TooLarge(
                f"the model's weights{times} take more than the {gib(free)} of free memory: lower model.width, or take "
                "a smaller model"
            )

    handles = [
        hooks.register_module_module_registration_hook(add_module),
        hooks.register_module_parameter_registration_hook(add_tensor),
        hooks.register_module_buffer_registration_hook(add_tensor),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
