"""Attacks on training data. Each is a class in a module of this package with @attack above it, each trigger one with
@trigger; nothing else names them.

Their modules import nothing of pipeline/ but settings, so that training, guards and evaluation may read the manifests
that are written here. An optimised trigger is fitted in surrogate.py, which is imported only then.
"""

import importlib
import pkgutil

from pipeline.attacks.base import ATTACKS, TRIGGERS, Attack, Backdoor, Trigger, load_trigger

__all__ = ["ATTACKS", "TRIGGERS", "Attack", "Backdoor", "Trigger", "load_trigger"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
