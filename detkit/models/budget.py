"""Checking a model's size before allocating it, by building it on the meta device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from detkit.errors import DetkitError
from detkit.ops.memory import free_memory, gib

Module = TypeVar("Module", bound=nn.Module)

MAX_MODULES = 30_000  # RevCol-XL and timm's largest models have about 5,000


def build_on_meta(make: Callable[[], Module], copies: int = 1) -> Module | None:
    """Build a module on the meta device, which takes no memory.

    Args:
        make: builds the module.
        copies: how many copies of the weights will be in memory; 0 skips the memory check.

    Returns:
        The module, or None if ``make`` fails on the meta device: it may depend on values, or be invalid, which
        building it on a real device shows.

    Raises:
        DetkitError: the module has too many submodules, or its weights would not fit into the free memory.
    """
    try:
        with _within_budget(copies), torch.device("meta"):
            return make()
    except TooLarge:
        raise
    except Exception:  # parts may raise anything
        return None


class TooLarge(DetkitError):  # noqa: N818  (named for its subject)
    """A model that exceeds this machine's memory or the limit of modules."""


@contextmanager
def _within_budget(copies: int) -> Iterator[None]:
    """Count the modules and bytes of everything built in the block.

    Raises:
        TooLarge: a limit is exceeded.
    """
    free = free_memory()
    modules = size = 0

    def add_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise TooLarge(
                f"the model has more than {MAX_MODULES:,} modules: lower model.depth, or a part's repeats or columns"
            )

    def add_tensor(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal size
        size += copies * tensor.numel() * tensor.element_size() if tensor is not None else 0
        if size > free:
            times = f" ({copies} copies for training)" if copies > 1 else ""
            raise TooLarge(
                f"the model's weights{times} take more than the {gib(free)} of free memory: lower model.width or use "
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
