"""Losses: ``(DenseOutput, Batch) -> {term: weighted scalar}``, in float32, without a host synchronisation.

With several ranks a term is this rank's share of the whole batch's: it divides by what
``ops.ranks.sum_over_ranks`` says, and the shares add up.
"""

from detkit.models.losses import task_aligned, yolov5  # noqa: F401
