"""A normalization layer in its place in a model: what each adapter says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from normkit._bundle import Arrays, Entry
from normkit._definition import Definition


class Slot(ABC):
    """A layer that can be read and written.

    Attributes:
        name: where it is, in the words of its framework; "" if it is the model itself.
        layer: the framework's layer.
        aliases: its other names.
        variables: of a Linen module, those of the whole model; None elsewhere.
    """

    variables: Any = None
    # What to do where it cannot take over a definition.
    remedy = "normkit's layers (convert) and new ones (port) can do more."

    def __init__(self, name: str, layer: Any, aliases: tuple[str, ...] = ()) -> None:
        self.name = name
        self.layer = layer
        self.aliases = aliases

    @property
    @abstractmethod
    def definition(self) -> Definition:
        """What the layer computes."""

    @property
    @abstractmethod
    def training(self) -> bool | None:
        """Whether it takes the statistics of its input; None if each call decides."""

    @abstractmethod
    def read(self) -> Arrays:
        """Copies of its parameters and state, with the shapes that the definition gives them."""

    @abstractmethod
    def write(self, arrays: Arrays) -> None:
        """Give it the values of ``arrays``, of those that it has."""

    @abstractmethod
    def configure(self, definition: Definition) -> None:
        """Make ``definition`` its own, as far as the framework allows that; see what came of it."""

    def entry(self) -> Entry:
        """The layer as a value."""
        return Entry(self.definition, self.read(), self.training, self.aliases)
