"""What can be wrong with a store. Each error can be made from its message alone, so that workers can hand it on."""
# ruff: noqa: N818 (a name says what is wrong, and that is an error)

__all__ = [
    "BY_SAMPLE",
    "CacheError",
    "CacheFull",
    "CacheLocked",
    "CacheRefusal",
    "CorruptCache",
    "MissingCache",
    "MissingRow",
    "StaleCache",
]


BY_SAMPLE = (
    "Activations are stored by sample, as the loader yields it: change single samples in the data set or in the model, mix "
    "samples in the part of the model that still trains, or train without the cache"
)


class CacheError(Exception):
    """The cache can't be used; the message says what is wrong, where, and what to do."""


class MissingCache(CacheError):
    """There is no store in the folder."""


class StaleCache(CacheError):
    """The store holds something else than what is asked for; `field` names the first thing that differs."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class CorruptCache(CacheError):
    """What is on disk is not what was written; drop the store and fill it anew."""


class MissingRow(CacheError):
    """A sample was asked for that the store does not hold; `holds()` tells beforehand."""


class CacheFull(CacheError):
    """No space left. The store is as it was last committed; rows appended since are gone."""


class CacheLocked(CacheError):
    """Another writer has the store."""


class CacheRefusal(CacheError, ValueError):
    """What can't be cached with right results; the message says why, and what to do."""
