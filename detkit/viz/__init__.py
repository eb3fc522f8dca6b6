"""Plots, images with boxes, and console tables."""
