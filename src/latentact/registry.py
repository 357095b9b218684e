"""Registries of named entries: `LAMS.get("lapo")`.

To add an entry, add a file to the registry's folder that calls `register`. An external package declares an
entry point in the registry's group (for example `latentact.lams`) whose module calls `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points

from latentact.errors import UserError, did_you_mean


class Registry[T]:
    """Entries of one kind, discovered on first use from the modules of `package` and from entry points.

    Args:
        kind: name of the kind in messages ("lam", "format").
        package: dotted name of the package whose modules register the entries.
        group: entry-point group of external packages; `package` by default.
        contract: class of the entries; those that do not subclass it get its defaults.
    """

    def __init__(
        self, kind: str, package: str, group: str | None = None, contract: type | None = None
    ) -> None:
        self.kind, self.package, self.group = kind, package, group or package
        self._defaults = _defaults(contract) if contract else {}
        self._items: dict[str, T] = {}
        self._discovered = False

    def register[U](self, name: str) -> Callable[[U], U]:
        """Return a decorator that registers its argument as `name`."""

        def add(item: U) -> U:
            if self._items.setdefault(name, item) is not item:  # type: ignore[comparison-overlap,arg-type]
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            known = {*dir(item), *getattr(item, "__dataclass_fields__", ())}
            for member in self._defaults.keys() - known:
                setattr(item, member, self._defaults[member])
            return item

        return add

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        self._discover()
        return sorted(self._items)

    def get(self, name: str) -> T:
        """Return the entry registered as `name`.

        Raises:
            UserError: the name is unknown; the message suggests the closest known name.
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


def _defaults(contract: type) -> dict[str, object]:
    """Return the public members of a class that have a default: all but annotations and abstract methods."""
    abstract: frozenset[str] = getattr(contract, "__abstractmethods__", frozenset())
    return {k: v for k, v in vars(contract).items() if not k.startswith("_") and k not in abstract}
