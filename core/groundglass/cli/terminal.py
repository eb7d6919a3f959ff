"""What every command shares: progress on stderr, and the name of the extra that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from groundglass.errors import MissingExtra


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing optional package into the error that names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or name, name) from error


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown only on a terminal; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def increments(advance: Callable[[int], None]) -> Callable[[int], None]:
    """For those who tell how far they are, in place of how much is new."""
    done = 0

    def progress(total: int) -> None:
        nonlocal done
        advance(total - done)
        done = total

    return progress
