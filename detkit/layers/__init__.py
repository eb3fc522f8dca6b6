"""Blocks that backbones, necks and heads are made of; importing this package registers them all."""

from detkit.layers import conv, csp, pooling  # noqa: F401
