"""Selecting the device."""

import torch

from detkit.errors import DetkitError


def pick_device(name: str) -> torch.device:
    """Return the device ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``, and make a CUDA device the current one.

    Raises:
        DetkitError: the name is invalid, or the CUDA device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DetkitError(f"device={name} is unknown: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DetkitError(
            "device=cuda, but torch sees no CUDA device: use device=cpu or install a CUDA build and driver"
        )
    if device.type == "cuda" and device.index is not None:
        devices = torch.cuda.device_count()
        if device.index >= devices:
            raise DetkitError(f"device={name}: torch sees {devices} CUDA devices, the last is cuda:{devices - 1}")
        torch.cuda.set_device(device)  # otherwise pinned memory, for example, would belong to the first
    return device
