"""Exporting detectors to other runtimes, checking the files against PyTorch, and running them."""
