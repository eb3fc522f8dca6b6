"""Readers and writers of dataset formats; importing this package imports its modules, which register them."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
