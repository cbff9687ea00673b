"""Interface of evaluators, which are run after epochs and by `safeclip evaluate`.

To add one: a class in a module of this package, and an entry in REGISTRY (__init__.py); `evaluation.evaluators` in a
config names it.
"""

from abc import ABC, abstractmethod

from pipeline.evaluation.held_out import Embedded, HeldOut


class Evaluator(ABC):
    """name: in evaluation.evaluators. needs: the data that it cannot do without, and the keys that name them."""

    name = needs = ""

    def __init__(self, data: HeldOut):
        """`data`: such that `possible(data)`. Raises UserError where they do not fit."""
        self.data = data

    @classmethod
    @abstractmethod
    def possible(cls, data: HeldOut) -> bool:
        """Whether `data` has what it needs."""

    @abstractmethod
    def __call__(self, embedded: Embedded) -> dict:
        """Its figures {NAME: JSON value}, the same on every rank; fractions are of 1, None is for what is not known.
        All ranks call. Mappings of several evaluators under one name are merged."""

    @abstractmethod
    def line(self, figures: dict) -> str:
        """Its figures in a few words, for the log. figures: of all evaluators."""
