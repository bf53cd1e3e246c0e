"""Work in threads whose results are wanted as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, as_completed
from typing import TypeVar

T = TypeVar("T")


def as_finished(futures: Mapping[Future[T], int]) -> Iterator[tuple[int, T]]:
    """(place, result) of every future, in the order in which they end.

    When one fails, those not begun are cancelled, those under way still come, and then its error is raised.
    """
    failure: BaseException | None = None
    try:
        for future in as_completed(futures):
            if future.cancelled():
                continue
            if (error := future.exception()) is None:
                yield futures[future], future.result()
                continue
            failure = failure or error
            for other in futures:
                other.cancel()
    finally:  # also where the one who iterates goes away
        for future in futures:
            future.cancel()
    if failure is not None:
        raise failure
