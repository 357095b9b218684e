"""Named choices: `LAMS.get("lapo")`, with did-you-mean, filled by import and by entry points.

A choice joins by one new file in the registry's folder that calls `register`; a package outside joins by an
entry point in the registry's group (for example `latentact.lams`) whose module does the same.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points

from latentact.errors import UserError, did_you_mean


class Registry[T]:
    """Choices of one kind, discovered on first use from the modules of `package` and its entry points.

    Args:
        kind: what a choice is called in messages ("lam", "format").
        package: dotted name of the folder whose modules register themselves.
        group: entry-point group of packages outside; `package` by default.
    """

    def __init__(self, kind: str, package: str, group: str | None = None) -> None:
        self.kind, self.package, self.group = kind, package, group or package
        self._items: dict[str, T] = {}
        self._discovered = False

    def register[U](self, name: str) -> Callable[[U], U]:
        """Return a decorator that files its argument under `name`."""

        def add(item: U) -> U:
            if self._items.setdefault(name, item) is not item:  # type: ignore[comparison-overlap,arg-type]
                raise ValueError(f"two choices of {self.kind} are called {name!r}")
            return item

        return add

    def names(self) -> list[str]:
        """Return every known name, sorted."""
        self._discover()
        return sorted(self._items)

    def get(self, name: str) -> T:
        """Return the choice called `name`.

        Raises:
            UserError: the name is unknown; the message lists the known ones and the nearest.
        """
        self._discover()
        if name not in self._items:
            raise UserError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._items)}")
        return self._items[name]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            point.load()
