"""The machine that something runs on: named in reports, and part of what a measured time depends on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["chip", "environment"]


def environment(device: torch.device) -> dict[str, str]:
    """Where and with what something ran."""
    return {
        "device": chip(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "fxfreeze": version("fxfreeze"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def chip(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = []
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
