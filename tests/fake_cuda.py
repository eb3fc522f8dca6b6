"""A pretended CUDA device: tensors with shape, type and place but no numbers, on a machine without a GPU."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
# Operators of which the result, or its size, is read by the host. Most have no fake form and raise by themselves.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal")
# With deterministic algorithms these sort their indices; in older releases of torch they wait for the device, too.
SORTING = ("scatter.src", "scatter_.src", "scatter_add", "scatter_add_", "scatter_reduce.sum", "scatter_reduce.mean")


class WaitError(AssertionError):
    """Something that would make the host wait for a GPU, or that mixes tensors of both."""


class Watch(TorchDispatchMode):
    """Raises WaitError at the first operator that touches a tensor on the CPU, or whose result the host must know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = f"{func}".removeprefix("aten.")
        if name.partition(".")[0] in WAITING or name.startswith(SORTING):
            raise WaitError(name)
        if name.startswith("index") and any(tensor.dtype is torch.bool for tensor in _tensors(args[1])):
            raise WaitError(f"{name} by a mask")
        out = func(*args, **(kwargs or {}))
        tensors = _tensors((args, kwargs, out))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            raise WaitError(f"{name} of {[(tensor.device.type, *tensor.shape) for tensor in tensors]}")
        return out


class _Mode(FakeTensorMode):
    """One for all: a deep copy of a fake tensor would copy it, too."""

    def __deepcopy__(self, memo: dict) -> "_Mode":
        return self


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Pretend that there is a GPU that computes in bf16; nothing may wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
        patch.setattr(Tensor, "backward", _backward)  # torch's own asks the driver for streams
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: None)  # has no fake form
        with _Mode(), Watch():
            yield


def move(module: nn.Module) -> nn.Module:
    """Give a module on the meta device parameters and buffers on the pretended one; what is neither stays behind."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                    tensors[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return module


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _backward(loss: Tensor) -> None:
    _run_backward(loss, torch.ones_like(loss))


def _grad(out: Tensor, inputs: Sequence[Tensor], grad: Tensor, allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    edges = [get_gradient_edge(tensor) for tensor in inputs]
    found = _run_backward(out, grad, {edge.node for edge in edges})
    return tuple(found[edge.node].get(edge.output_nr) for edge in edges)


@torch.no_grad()
def _run_backward(out: Tensor, grad: Tensor, wanted: set[Node] | None = None) -> Mapping[Node, dict[int, Tensor]]:
    """Call the nodes of a graph one after another, as the engine of autograd does, on this thread and without streams.

    Args:
        wanted: nodes of which the gradients are returned, by the number of their output, and not accumulated;
            None: accumulate into ``grad`` of the leaves.
    """
    root = get_gradient_edge(out)
    waiting_for: Counter[Node] = Counter()
    seen, stack = {root.node}, [root.node]
    while stack:
        for node, _ in stack.pop().next_functions:
            waiting_for[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    gradients: dict[Node, dict[int, Tensor]] = defaultdict(dict)
    gradients[root.node][root.output_nr] = grad
    ready, found = [root.node], defaultdict(dict)
    while ready:
        node = ready.pop()
        own = gradients.pop(node, {})
        if wanted is not None and node in wanted:
            found[node] = own
        results = _call(node, own, accumulate=wanted is None)
        for (after, slot), result in zip(node.next_functions, results, strict=True):
            if after is None:
                continue
            if result is not None:
                before = gradients[after].get(slot)
                gradients[after][slot] = result if before is None else before + result
            waiting_for[after] -= 1
            if not waiting_for[after]:
                ready.append(after)
    return found


def _call(node: Node, gradients: Mapping[int, Tensor], accumulate: bool) -> Sequence[Any]:
    """Return what a node makes of the gradients of its outputs."""
    if not gradients:
        return (None,) * len(node.next_functions)
    arguments = []
    for slot, wanted in enumerate(node._input_metadata):
        grad = gradients.get(slot)
        arguments.append(None if grad is None else grad.to(wanted.dtype).sum_to_size(wanted.shape))
    if hasattr(node, "variable"):  # a leaf
        if accumulate:
            leaf, grad = node.variable, arguments[0]
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
        return ()
    if callable(node):
        results = node(*arguments)
        return results if isinstance(results, tuple) else (results,)
    # A function written in Python returns something for every argument, tensor or not.
    results = zip(node.apply(*arguments), node.needs_input_grad, strict=True)
    wanted = iter([result for result, is_wanted in results if is_wanted])
    return [None if after is None else next(wanted) for after, _ in node.next_functions]
