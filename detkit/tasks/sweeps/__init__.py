"""Sweeps of Hydra (``-m``) and the search space of ``tune``."""
