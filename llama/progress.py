"""Progress bars for people, silence for pipes."""

import shutil
import sys
from collections.abc import Iterable

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether a person is watching: both output streams are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(items: Iterable, what: str, unit: str) -> tqdm:
    """`items` behind a bar on standard error, which leaves no trace when done and does not show in a pipe."""
    width, height = shutil.get_terminal_size()  # 80 × 24 where the terminal does not say: tqdm would show nothing
    off = not on_terminal()
    return tqdm(items, what, unit=f" {unit}", ncols=width, nrows=height, leave=False, disable=off)
