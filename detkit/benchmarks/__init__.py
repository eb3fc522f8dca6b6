"""Benchmarks of ``detkit benchmark task=NAME``, one module per task."""
