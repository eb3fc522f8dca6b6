"""Checks for any combination of backbone, neck, head and loss; run by `detkit check` and the tests."""
