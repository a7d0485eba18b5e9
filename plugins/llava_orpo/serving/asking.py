"""Many requests to one server at a time, until it has answered them or has failed too often."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from .client import EndpointUnusable, RequestFailed

Item = TypeVar("Item")
Answer = TypeVar("Answer")

GIVE_UP = 10  # after so many failures in a row the endpoint is taken for broken


async def ask_each(
    items: Iterable[Item], ask: Callable[[Item], Awaitable[Answer]], concurrency: int
) -> AsyncGenerator[tuple[Item, Answer | RequestFailed], None]:
    """(item, what `ask` gave for it, or why it failed) in the order of the answers, `concurrency` at a time.

    Close it (`contextlib.aclosing`) to cancel what is still asked.

    Raises EndpointUnusable, and the same after GIVE_UP failures in a row; other errors of `ask` as they are.
    """
    running: dict[asyncio.Task, Item] = {}
    todo, failures = iter(items), 0
    try:
        while True:
            for item in itertools.islice(todo, concurrency - len(running)):
                running[asyncio.create_task(ask(item))] = item
            if not running:
                return
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                item = running.pop(task)
                try:
                    answer = task.result()
                except RequestFailed as error:
                    answer = error
                    failures += 1
                    if failures >= GIVE_UP:
                        raise EndpointUnusable(f"{failures} requests in a row failed; the last: {error}") from None
                else:
                    failures = 0
                yield item, answer
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
