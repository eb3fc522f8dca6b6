"""Backbones, necks, heads and losses, and the detector they compose; importing this package registers them."""

from detkit.models import backbones, heads, losses, necks  # noqa: F401
