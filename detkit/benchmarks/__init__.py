"""What ``detkit benchmark task=NAME`` measures, a file a task."""
