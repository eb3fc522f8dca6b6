"""Checks that hold for every composition of backbone, neck, head and loss: `detkit check` and the tests run them."""
