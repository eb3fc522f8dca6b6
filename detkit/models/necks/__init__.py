"""Necks: they mix a backbone's levels and hand the head one feature map a stride."""

from detkit.models.necks import pafpn, repgd  # noqa: F401
