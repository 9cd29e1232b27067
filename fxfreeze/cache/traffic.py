"""Where an epoch's samples came from."""

from dataclasses import dataclass, field

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """samples: by origin, "forward" (the data set), "disk", "ram" or "device"; bytes, seconds: of reading stores.

    cold: whether it was the first epoch that read its stores, from a disk that may have had to be read.
    """

    samples: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    cold: bool = False

    def count(self, origin: str, samples: int) -> None:
        if samples:
            self.samples[origin] = self.samples.get(origin, 0) + samples

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds else None
