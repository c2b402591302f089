"""What made a result: versions, git revision, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "matplotlib")


def environment() -> dict[str, Any]:
    """Plain types throughout; None for what cannot be found out, as the revision outside a git checkout."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "revision": revision(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cores": available_cores(),
    }


def revision() -> str | None:
    """The checkout's commit, and whether files differ from it; None outside of a git checkout."""
    head = _git("rev-parse", "HEAD")
    return f"{head} with local changes" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout, or no git


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
