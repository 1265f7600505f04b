"""What a report says about where it was made: versions, GPU, commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

import nsattn


def environment() -> dict[str, str]:
    """Versions and hardware, as a header for reports."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed: kernels cannot run, impl='reference' can"
    facts = {
        "nsattn": nsattn.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        # without what a vendor of machines puts behind the version of its kernel
        "platform": f"{platform.system()} {platform.release().split('-')[0]}, {platform.machine()}",
        "gpu": "none",
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
    return facts


@functools.cache
def commit() -> str:
    """Commit of the checkout, `-dirty` if the package has changes; results that a run writes beside it do not count.

    NSATTN_COMMIT, if set, wins: who copies a tree elsewhere knows better than a .git beside it.
    """
    if "NSATTN_COMMIT" in os.environ:
        return os.environ["NSATTN_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
