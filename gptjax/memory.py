"""How much memory the machine has."""

import os


def physical_memory() -> int:
    """Bytes of memory, whoever uses them now."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
