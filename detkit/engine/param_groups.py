"""Frozen modules and learning-rate multipliers by module name."""

from collections.abc import Iterable, Mapping

from torch import nn

from detkit.errors import DetkitError, nearest

NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, including synchronized ones


def freeze(model: nn.Module, names: Iterable[str]) -> int:
    """Freeze the named modules (``backbone``, ``backbone.stages.0``); return the number of frozen parameters.

    Their batch norms keep their statistics, provided that ``train_mode`` is used to put the model in train mode.

    Raises:
        DetkitError: there is no such module, or no trainable parameter is left.
    """
    frozen = 0
    for name in names:
        for parameter in find_module(model, name, "trainer.freeze").parameters():
            frozen += parameter.numel() * parameter.requires_grad
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise DetkitError("trainer.freeze leaves no trainable parameter: remove a module from it")
    return frozen


def train_mode(model: nn.Module) -> None:
    """Put a model in train mode, except for frozen batch norms, which are put in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS) and module.affine and not module.weight.requires_grad:
            module.eval()


def learning_rate_factors(
    model: nn.Module, by_module: Mapping[str, float] | None = None, layer_decay: float | None = None
) -> dict[str, float]:
    """Return the learning-rate multiplier of each parameter by name.

    It is the product of the factor of the longest matching module name in ``by_module``; of ``layer_decay ** (n - l)``
    for layer l of the backbone's n layers (from 0, see ``backbone_layers``), as in arXiv 2003.10555, and 1 in neck and
    head; and of the attribute ``lr_factor`` of the module that owns the parameter.

    Raises:
        DetkitError: there is no such module.
    """
    by_module = by_module or {}
    for name in by_module:
        find_module(model, name, "optim.lr_factors")
    by_depth: dict[int, float] = {}
    if layer_decay is not None:
        layers = backbone_layers(model.get_submodule("backbone"))
        by_depth = {id(p): layer_decay ** (len(layers) - k) for k, layer in enumerate(layers) for p in layer}
    factors = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            matching = [prefix for prefix in by_module if full.startswith(f"{prefix}.")]
            factor = getattr(module, "lr_factor", 1.0) * (by_module[max(matching, key=len)] if matching else 1.0)
            factors[full] = factor * by_depth.get(id(parameter), 1.0)
    return factors


def backbone_layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Split a backbone's parameters into layers, in the order of registration, from the input on.

    Each child of the backbone is a layer; a ModuleList, a ModuleDict or an only child is replaced by its children. A
    module without a kernel or matrix (a norm) joins the layer before it, and parameters of the backbone itself join the
    first. CSPDarknet has 5 layers, the stem and the stages; RevCol has the stem and the columns.
    """
    children = list(backbone.children())
    while len(children) == 1:
        children = list(children[0].children())
    opened = [c for child in children for c in (child.children() if _is_list(child) else (child,))]
    layers: list[list[nn.Parameter]] = []
    for module in opened:
        parameters = list(module.parameters())
        if not layers or any(p.ndim > 1 for p in parameters):
            layers.append(parameters)
        else:
            layers[-1] += parameters
    inside = {id(p) for layer in layers for p in layer}
    rest = [p for p in backbone.parameters() if id(p) not in inside]
    return [rest + layers[0], *layers[1:]] if layers else [rest]


def find_module(model: nn.Module, name: str, key: str) -> nn.Module:
    """Return the module called ``name``; ``key`` is the config key that names it, for the error message.

    Raises:
        DetkitError: there is no such module.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise DetkitError(f"{key}: the model has no module '{name}'{nearest(name, modules)}")
    return modules[name]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
