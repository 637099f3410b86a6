"""Progress bars on terminals, silence in pipes."""

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether both output streams are terminals, so that someone may be watching."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(items: Iterable, what: str, unit: str) -> tqdm:
    """`items` with a progress bar on standard error, which disappears when done and is not shown in a pipe."""
    return tqdm(items, what, unit=f" {unit}", **_looks())


def byte_bar(total: int, what: str) -> tqdm:
    """The same for `total` bytes of work: call `update` with the number of bytes done."""
    return tqdm(None, what, total, unit="B", unit_scale=True, **_looks())


def _looks() -> dict[str, Any]:
    width, height = shutil.get_terminal_size()  # 80 × 24 if unknown, where tqdm would show nothing
    return {"ncols": width, "nrows": height, "leave": False, "disable": not on_terminal()}
