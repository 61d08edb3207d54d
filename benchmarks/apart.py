"""Work in a process of its own, so that what hangs or crashes ends nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class ApartError(Exception):
    """The process gave no answer; says why."""


def run_apart(work: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """What `work(*arguments)` returns in a fork of this process, which has the imports, the slow part, done.

    Raises:
        ApartError: where there is no answer in `timeout` seconds, or the process died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise ApartError(f"not done after {timeout:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise ApartError(f"the process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(work(*arguments))
