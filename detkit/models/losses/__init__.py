"""Losses: ``(DenseOutput, Batch) -> {term: weighted scalar}``, in float32, without host synchronization.

With several ranks a term is this rank's contribution to the term of the global batch: it is normalized by a sum over
all ranks (``distributed.collectives.all_reduce_sum``), and the contributions add up.
"""

from detkit.models.losses import task_aligned, yolov5  # noqa: F401
