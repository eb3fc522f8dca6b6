"""Blocks that backbones, necks and heads are made of; importing this package registers them all."""

from detkit.layers import akconv, conv, csp, dynamic, pooling  # noqa: F401
