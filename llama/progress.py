"""Progress bars for people, silence for pipes."""

import sys
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether a person is watching: both output streams are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(items: Iterable, what: str, unit: str, **options: Any) -> tqdm:
    """`items` behind a bar on standard error, which leaves no trace when done and does not show in a pipe."""
    total = options.pop("total", len(items) if isinstance(items, Sized) else None)
    return tqdm(items, desc=what, unit=f" {unit}", total=total, leave=False, disable=not on_terminal(), **options)
