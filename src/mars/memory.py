"""Whether weights will fit before they are read."""

from pathlib import Path

from mars.errors import ModelError


def available_memory() -> int | None:
    """Bytes that a program may still take without swapping; None where the system does not say (only Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    sizes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else None


def check_memory(needed: int, *, what: str) -> None:
    """Raises ModelError when `needed` bytes are more than there are."""
    free = available_memory()
    if free is not None and needed > free:
        raise ModelError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "open it with precision int8 or int4, or close other programs"
        )
