"""Figures, drawn boxes and console tables."""
