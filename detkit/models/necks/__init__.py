"""Necks, which fuse a backbone's levels and return one feature map per stride for the head."""

from detkit.models.necks import pafpn, repgd  # noqa: F401
