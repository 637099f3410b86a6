"""Progress bars for people, silence for pipes."""

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether a person is watching: both output streams are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(items: Iterable, what: str, unit: str) -> tqdm:
    """`items` behind a bar on standard error, which leaves no trace when done and does not show in a pipe."""
    return tqdm(items, what, unit=f" {unit}", **_looks())


def byte_bar(total: int, what: str) -> tqdm:
    """The same for work on so many bytes: `update` tells it of those that are done."""
    return tqdm(None, what, total, unit="B", unit_scale=True, **_looks())


def _looks() -> dict[str, Any]:
    width, height = shutil.get_terminal_size()  # 80 × 24 where the terminal does not say: tqdm would show nothing
    return {"ncols": width, "nrows": height, "leave": False, "disable": not on_terminal()}
