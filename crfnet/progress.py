"""Bars of progress, where tqdm is installed and somebody watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def bar(title: str) -> Callable[..., Iterator[Any]]:
    """Puts steps behind a bar of this title.

    ``for step in bar("search")(steps)``:
    The function takes the steps, and their number where they have no length. Without tqdm, or where the output is a
    file, the steps come without a bar.
    """

    def behind(steps: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        try:
            from tqdm import tqdm
        except ImportError:  # a comfort, not a need
            return iter(steps)
        return iter(tqdm(steps, title, total, leave=False, disable=None, mininterval=1))

    return behind
