"""Any backbone of the timm library that gives a pyramid of features.

timm is imported where it is needed: every command would wait for it otherwise.
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

PROBE = (64, 96)  # height, width: neither square nor what any model was made for


@BACKBONES.register("timm")
class TimmBackbone(nn.Module):
    """A timm model cut after its last wanted stage; stages are picked by their stride.

    Images are normalised as the model's published weights expect. Batch norms keep the model's own eps and momentum.

    Args:
        model: timm's name, such as resnet18 or convnext_atto.
        pretrained: start from the published weights; timm downloads them on first use.
        weights: start from the weights of this file instead: a state dict of the classifier or of its backbone, with
            timm's names, or with others in the same order.
        out_strides: strides of the features to return, ascending; derived by the builder.

    Attributes:
        loaded: what was taken from ``weights``, in a sentence; None without.

    Raises:
        DetkitError: no such model, no features at these strides (a plain ViT), a model for one image size only, or
            weights that cannot be had or do not fit.
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
                "backbone.pretrained=true and backbone.weights=FILE are two origins: leave one of them out"
            )
        arguments, strides = _survey(model)
        missing = [stride for stride in out_strides if stride not in strides]
        if missing:
            raise DetkitError(
                f"timm model '{model}' has features at strides {sorted(set(strides))}, the neck asks for "
                f"{list(out_strides)}: take one with a pyramid, such as resnet18, convnext_atto or swin_tiny"
            )
        stages = [len(strides) - 1 - strides[::-1].index(stride) for stride in out_strides]  # the last at each stride
        try:
            body = timm.create_model(model, pretrained, features_only=True, out_indices=stages, **arguments)
            self.body = cast("Any", body)  # of many classes, each with a feature_info
        except Exception as error:  # whatever a download can raise
            if not pretrained:
                raise
            raise DetkitError(
                f"the weights of timm model '{model}' cannot be had ({str(error).splitlines()[0]}): "
                "connect to the internet, or set backbone.pretrained=false"
            ) from None
        published = timm.get_pretrained_cfg(model)
        assert published is not None  # as timm has the model
        self.loaded = None
        if weights is not None:
            how = _load_file(self.body, model, Path(weights))
            self.loaded = f"{how}; images are normalised by mean {published.mean} and std {published.std}"
        self.strides = tuple(out_strides)
        self.out_channels = tuple(self.body.feature_info.channels())
        self.channels_first = getattr(self.body, "output_fmt", None) is not Format.NHWC
        self.register_buffer("mean", torch.tensor(published.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(published.std).view(-1, 1, 1), persistent=False)
        self._probe(model)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) in 0..1 -> a feature map (B, out_channels[i], H / strides[i], W / strides[i]) for each i."""
        features = self.body((x - self.mean) / self.std)
        return tuple(features) if self.channels_first else tuple(f.permute(0, 3, 1, 2) for f in features)

    @torch.enable_grad()
    def _probe(self, model: str) -> None:
        """Run a small image through, as some models take one size only and a few declare other features.

        Parameters that no feature depends on (HRNet has some) are frozen: nothing could teach them.
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
            raise DetkitError(f"timm model '{model}' gives features {found} of a {PROBE} image, it declares {expected}")
        parameters = [p for p in self.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(f.sum() for f in features), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def _load_file(body: nn.Module, model: str, path: Path) -> str:
    """Give ``body`` the tensors of a file, matched by name or else by order; return what was done, in a sentence.

    Raises:
        DetkitError: no such file, or one that does not fit.
    """
    own = {name: tensor for name, tensor in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    theirs = read_source(path, "backbone.weights").tensors
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")}
    found, how = _by_name(own, theirs), "by name"
    if not found:
        found, how = _by_order(own, theirs, model, path), "in order"
    body.load_state_dict(found, strict=False)
    return (
        f"backbone: all {len(own)} tensors of timm's {model} are taken {how} from the {len(theirs)} of {path} "
        f"(sha256 {sha256_of(path)})"
    )


def _by_name(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensor for each of one's own, by name; nothing where one is missing or has another shape.

    timm joins steps of a features-only model's names by ``_`` where the classifier has dots; the file's may all stand
    below a prefix, such as ``backbone.``.
    """
    flat = {name.replace(".", "_"): tensor for name, tensor in theirs.items()}
    wanted = {name: name.removeprefix("model.").replace(".", "_") for name in own}
    first = next(iter(wanted.values()))
    for prefix in {name.removesuffix(first) for name in flat if name.endswith(first)}:
        found = {name: flat[key] for name, end in wanted.items() if (key := f"{prefix}{end}") in flat}
        if len(found) == len(own) and all(tensor.shape == own[name].shape for name, tensor in found.items()):
            return found
    return {}


def _by_order(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], model: str, path: Path) -> dict[str, Tensor]:
    """Return the file's tensor for each of one's own, both in the order of their modules.

    That of a file with other names than timm's is taken only where it has as many tensors as the whole model, with or
    without its classifier, and each of the backbone's has its kind (weight, bias, ...) and shape.

    Raises:
        DetkitError: it is not so.
    """
    import timm

    with torch.device("meta"):
        whole = [name for name in timm.create_model(model).state_dict() if not name.endswith("num_batches_tracked")]
    published = timm.get_pretrained_cfg(model)
    assert published is not None  # as timm has the model
    layers = published.classifier
    classifiers = (layers,) if isinstance(layers, str) else tuple(layers or ())
    headless = [name for name in whole if name.rpartition(".")[0] not in classifiers]
    start = f"backbone.weights={path} does not fit timm model '{model}', neither by its names nor in order"
    if len(theirs) not in (len(whole), len(headless)):
        raise DetkitError(f"{start}: it holds {len(theirs)} tensors where the model has {len(whole)}")
    found = {}
    for (name, tensor), (their_name, their_tensor) in zip(own.items(), theirs.items(), strict=False):
        kind, their_kind = name.rpartition(".")[2], their_name.rpartition(".")[2]
        if kind != their_kind or tensor.shape != their_tensor.shape:
            raise DetkitError(
                f"{start}: its {shorten(their_name)!r} {list(their_tensor.shape)} stands where "
                f"the model has '{name}' {list(tensor.shape)}"
            )
        found[name] = their_tensor
    return found


def _survey(model: str) -> tuple[dict[str, Any], list[int]]:
    """Return the arguments that free a timm model from a fixed image size, and the strides of its stages."""
    import timm

    if not timm.is_model(model):
        raise DetkitError(f"timm has no model '{model}'{nearest(model, timm.list_models())}")
    attempts: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {})  # Swin's, which other models do not know
    for arguments in attempts:
        try:
            with torch.device("meta"):
                body: Any = timm.create_model(model, features_only=True, **arguments)
            return arguments, list(body.feature_info.reduction())
        except TypeError:
            continue
        except (RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
            raise DetkitError(f"timm model '{model}' gives no features ({str(error).splitlines()[0]})") from None
    raise DetkitError(f"timm model '{model}' gives no features: take another, such as resnet18")
