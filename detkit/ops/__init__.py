"""Arithmetic on boxes, points and images: no state, no parameters."""
