"""Activations on disk: what a frozen prefix computed once, kept so that it is not run again."""

from fxfreeze.cache.columns import Blob, Column
from fxfreeze.cache.drop import drop
from fxfreeze.cache.errors import (
    CacheError,
    CacheFull,
    CacheLocked,
    CacheRefusal,
    CorruptCache,
    MissingCache,
    MissingRow,
    StaleCache,
)
from fxfreeze.cache.store import Store, verify
from fxfreeze.cache.writer import StoreWriter

__all__ = [
    "Blob",
    "CacheError",
    "CacheFull",
    "CacheLocked",
    "CacheRefusal",
    "Column",
    "CorruptCache",
    "MissingCache",
    "MissingRow",
    "StaleCache",
    "Store",
    "StoreWriter",
    "drop",
    "verify",
]
