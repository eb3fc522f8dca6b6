"""Backbones of the timm library that return a feature pyramid.

timm is imported lazily, since importing it would slow down every command.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detkit.errors import DetkitError, nearest, shorten
from detkit.ops.files import sha256_of
from detkit.registry import BACKBONES
from detkit.weights.source import read_source

PROBE = (64, 96)  # height, width: not square, and no model's default


@BACKBONES.register("timm")
class TimmBackbone(nn.Module):
    """A timm model truncated after the last stage needed; stages are selected by stride.

    Images are normalized as the model's published weights expect. Batch norms keep the model's own eps and momentum.

    Args:
        model: timm's name, such as resnet18 or convnext_atto.
        pretrained: start from the published weights, which timm downloads on first use.
        weights: start from the weights in this file instead: a state dict of the classifier or of its backbone, with
            timm's names, or with other names in the same order.
        out_strides: strides of the features to return, ascending; derived by the builder.

    Attributes:
        loaded: message about what was loaded from ``weights``; None without.

    Raises:
        DetkitError: the model is unknown, has no features at these strides (as a plain ViT) or takes a fixed image
            size only, or the weights cannot be downloaded or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "resnet18",
        pretrained: bool = False,
        weights: str | Path | None = None,
        out_strides: Sequence[int] = (8, 16, 32),
    ) -> None:
        import timm
        from timm.layers import Format

        super().__init__()
        if pretrained and weights is not None:
            raise DetkitError(
                "backbone.pretrained=true and backbone.weights=FILE exclude each other: remove one of them"
            )
        arguments, strides = _inspect(model)
        missing = [stride for stride in out_strides if stride not in strides]
        if missing:
            raise DetkitError(
                f"timm model '{model}' has features at strides {sorted(set(strides))}, the neck takes "
                f"{list(out_strides)}: use one with a feature pyramid, such as resnet18, convnext_atto or swin_tiny"
            )
        stages = [len(strides) - 1 - strides[::-1].index(stride) for stride in out_strides]  # the last at each stride
        try:
            body = timm.create_model(model, pretrained, features_only=True, out_indices=stages, **arguments)
            self.body = cast("Any", body)  # one of several classes, all with feature_info
        except Exception as error:  # a download may raise anything
            if not pretrained:
                raise
            raise DetkitError(
                f"cannot download the weights of timm model '{model}' ({str(error).splitlines()[0]}): "
                "connect to the internet, or set backbone.pretrained=false"
            ) from None
        published = timm.get_pretrained_cfg(model)
        assert published is not None  # timm has the model
        self.loaded = None
        if weights is not None:
            loaded = _load_file(self.body, model, Path(weights))
            self.loaded = f"{loaded}; images are normalized by mean {published.mean} and std {published.std}"
        self.strides = tuple(out_strides)
        self.out_channels = tuple(self.body.feature_info.channels())
        self.channels_first = getattr(self.body, "output_fmt", None) is not Format.NHWC
        self.register_buffer("mean", torch.tensor(published.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(published.std).view(-1, 1, 1), persistent=False)
        self._probe(model)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) in 0..1 to feature maps (B, out_channels[i], H / strides[i], W / strides[i])."""
        features = self.body((x - self.mean) / self.std)
        return tuple(features) if self.channels_first else tuple(f.permute(0, 3, 1, 2) for f in features)

    @torch.enable_grad()
    def _probe(self, model: str) -> None:
        """Run a small image, since some models take one size only and a few declare wrong feature shapes.

        Parameters that no feature depends on (HRNet has some) are frozen, as they would get no gradient.

        Raises:
            DetkitError: the model does not take the image, or its features are not as declared.
        """
        self.eval()
        try:
            features = self(self.mean.new_zeros(1, 3, *PROBE))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DetkitError(f"timm model '{model}' does not take images of any size ({reason})") from None
        finally:
            self.train()
        found = [tuple(f.shape[1:]) for f in features]
        expected = [(c, PROBE[0] // s, PROBE[1] // s) for c, s in zip(self.out_channels, self.strides, strict=True)]
        if found != expected:
            raise DetkitError(f"timm model '{model}' returns features {found} for a {PROBE} image, declared {expected}")
        parameters = [p for p in self.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(f.sum() for f in features), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def _load_file(body: nn.Module, model: str, path: Path) -> str:
    """Load the tensors of a file into ``body``, matched by name or else by order; return a message about it.

    Raises:
        DetkitError: the file does not exist or does not fit.
    """
    target = {name: tensor for name, tensor in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    source = read_source(path, "backbone.weights").tensors
    source = {name: tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")}
    found, how = _match_by_name(target, source), "by name"
    if not found:
        found, how = _match_by_order(target, source, model, path), "in order"
    body.load_state_dict(found, strict=False)
    return (
        f"backbone: all {len(target)} tensors of timm's {model} are loaded {how} from the {len(source)} of {path} "
        f"(sha256 {sha256_of(path)})"
    )


def _match_by_name(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match the file's tensors to the model's by name; return nothing if one is missing or has another shape.

    timm's features-only models join parts of names by ``_`` where the classifier has dots; the file's names may have a
    common prefix, such as ``backbone.``.
    """
    flat = {name.replace(".", "_"): tensor for name, tensor in source.items()}
    suffixes = {name: name.removeprefix("model.").replace(".", "_") for name in target}
    first = next(iter(suffixes.values()))
    for prefix in {name.removesuffix(first) for name in flat if name.endswith(first)}:
        found = {name: flat[key] for name, suffix in suffixes.items() if (key := f"{prefix}{suffix}") in flat}
        if len(found) == len(target) and all(tensor.shape == target[name].shape for name, tensor in found.items()):
            return found
    return {}


def _match_by_order(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], model: str, path: Path
) -> dict[str, Tensor]:
    """Match the file's tensors to the model's by order.

    This requires that the file has as many tensors as the whole model, with or without its classifier, and that the
    kind (weight, bias, ...) and shape of each of the backbone's tensors agree.

    Raises:
        DetkitError: the tensors do not match.
    """
    import timm

    with torch.device("meta"):
        whole = [name for name in timm.create_model(model).state_dict() if not name.endswith("num_batches_tracked")]
    published = timm.get_pretrained_cfg(model)
    assert published is not None  # timm has the model
    layers = published.classifier
    classifiers = (layers,) if isinstance(layers, str) else tuple(layers or ())
    headless = [name for name in whole if name.rpartition(".")[0] not in classifiers]
    start = f"backbone.weights={path} does not fit timm model '{model}', neither by name nor in order"
    if len(source) not in (len(whole), len(headless)):
        raise DetkitError(f"{start}: it has {len(source)} tensors, the model has {len(whole)}")
    found = {}
    for (name, tensor), (source_name, source_tensor) in zip(target.items(), source.items(), strict=False):
        kind, source_kind = name.rpartition(".")[2], source_name.rpartition(".")[2]
        if kind != source_kind or tensor.shape != source_tensor.shape:
            raise DetkitError(
                f"{start}: it has {shorten(source_name)!r} {list(source_tensor.shape)} where "
                f"the model has '{name}' {list(tensor.shape)}"
            )
        found[name] = source_tensor
    return found


def _inspect(model: str) -> tuple[dict[str, Any], list[int]]:
    """Return the arguments that allow any image size for a timm model, and the strides of its stages.

    Raises:
        DetkitError: the model is unknown or has no feature pyramid.
    """
    import timm

    if not timm.is_model(model):
        raise DetkitError(f"timm has no model '{model}'{nearest(model, timm.list_models())}")
    attempts: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {})  # Swin's; other models do not take it
    for arguments in attempts:
        try:
            with torch.device("meta"):
                body: Any = timm.create_model(model, features_only=True, **arguments)
            return arguments, list(body.feature_info.reduction())
        except TypeError:
            continue
        except (RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
            raise DetkitError(f"timm model '{model}' has no features ({str(error).splitlines()[0]})") from None
    raise DetkitError(f"timm model '{model}' has no features: use another, such as resnet18")
