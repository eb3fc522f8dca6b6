"""Data sets, from files to batches; importing this package registers the formats."""

from detkit.data import formats  # noqa: F401
