"""Parts of a detector by name: which learn, and how fast."""

from collections.abc import Iterable, Mapping

from torch import nn

from detkit.errors import DetkitError, nearest

NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, synchronised ones too


def freeze(model: nn.Module, names: Iterable[str]) -> int:
    """Stop the named modules from learning (``backbone``, ``backbone.stages.0``); return how many numbers that are.

    Their batch norms keep their statistics, too, as long as ``train_mode`` is what puts the model in train mode.

    Raises:
        DetkitError: there is no such module, or nothing is left that learns.
    """
    stopped = 0
    for name in names:
        for parameter in find_module(model, name, "trainer.freeze").parameters():
            stopped += parameter.numel() * parameter.requires_grad
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise DetkitError("trainer.freeze leaves nothing that learns: take a part out of it")
    return stopped


def train_mode(model: nn.Module) -> None:
    """Put a model in train mode, but the batch norms that do not learn in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS) and module.affine and not module.weight.requires_grad:
            module.eval()


def learning_rate_factors(
    model: nn.Module, by_part: Mapping[str, float] | None = None, layer_decay: float | None = None
) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by, by the parameter's name.

    That is the product of three: the factor of the longest name in ``by_part`` that the parameter is under; for the
    l-th of the backbone's n layers (from 0, see ``backbone_layers``) ``layer_decay ** (n - l)``, as in arXiv
    2003.10555, the neck and the head having 1; and the attribute ``lr_factor`` of the module that owns it.

    Raises:
        DetkitError: there is no such part.
    """
    by_part = by_part or {}
    for part in by_part:
        find_module(model, part, "optim.lr_factors")
    by_depth: dict[int, float] = {}
    if layer_decay is not None:
        layers = backbone_layers(model.get_submodule("backbone"))
        by_depth = {id(p): layer_decay ** (len(layers) - k) for k, layer in enumerate(layers) for p in layer}
    factors = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            parts = [part for part in by_part if full.startswith(f"{part}.")]
            factor = getattr(module, "lr_factor", 1.0) * (by_part[max(parts, key=len)] if parts else 1.0)
            factors[full] = factor * by_depth.get(id(parameter), 1.0)
    return factors


def backbone_layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Split a backbone's parameters into layers, in the order in which its modules were made, the input's first.

    A layer is a child of the backbone; a ModuleList, a ModuleDict and an only child are not themselves a layer, but
    their children are. One without a kernel or matrix (a norm) belongs to the layer before it, and what the backbone
    owns directly to the first. CSPDarknet has 5: its stem and its stages; RevCol its stem and its columns.
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
    """Return the module called ``name``; ``key`` is where the name was given.

    Raises:
        DetkitError: there is none; names the nearest.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise DetkitError(f"{key}: the model has no part '{name}'{nearest(name, modules)}")
    return modules[name]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
