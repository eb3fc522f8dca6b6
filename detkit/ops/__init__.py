"""Stateless functions on boxes, points, images, files and processes."""
