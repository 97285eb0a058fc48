"""How much memory this process may still take, as far as the system says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Where a container's limit and use stand, in the second and in the first version of cgroups.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available() -> int:
    """Bytes that can be had without swapping: of the machine, the container and the process."""
    found = [psutil.virtual_memory().available]
    for limit, used in _CGROUPS:
        with suppress(OSError, ValueError):  # "max" is no number: there is no limit
            found.append(int(limit.read_text()) - int(used.read_text()))
    if resource is not None:
        use = psutil.Process().memory_info()
        for name, taken in (("RLIMIT_AS", use.vms), ("RLIMIT_DATA", use.rss)):
            soft, _ = resource.getrlimit(getattr(resource, name))
            if soft != resource.RLIM_INFINITY:
                found.append(soft - taken)
    return max(0, min(found))
