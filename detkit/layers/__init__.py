"""Building blocks of backbones, necks and heads; importing this package registers them."""

from detkit.layers import akconv, conv, csp, dynamic, pooling  # noqa: F401
