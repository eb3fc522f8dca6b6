"""Backbones, necks, heads and losses, and the detector composed of them; importing this package registers them."""

from detkit.models import backbones, heads, losses, necks  # noqa: F401
