"""Answers from several processes at once, for models that are too small to keep the cores of one process busy.

A row depends on nothing but its own keys, so rows can be dealt to processes in any way. Each process is a fork of this
one and computes on one thread; what it writes comes back as token ids. Nothing else does: an intervention that records
what it sees would record it in the other process, which is why sampling uses one process unless it is asked for more.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from mechmisalign import models

from .flight import Requests

Answers = list[tuple[int, list[int]]]
"""Number and token ids of finished answers."""

_MOST_PARAMETERS = 30_000_000
"""Of a larger model the matrix products keep all cores of one process busy."""


def useful_workers(model: models.Model) -> int:
    """How many processes sample faster than one: as many as threads for a small model on a Linux CPU, otherwise 1."""
    forks = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if not forks or models.device_of(model).type != "cpu" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 1
    size = sum(parameter.numel() for parameter in model.parameters())
    return torch.get_num_threads() if size <= _MOST_PARAMETERS else 1


def shares(requests: Requests, order: Sequence[int], workers: int) -> list[list[int]]:
    """The order dealt to workers; requests with the same prompt stay together, so that it is read once."""
    worker_of = {prompt: turn % workers for turn, prompt in enumerate(dict.fromkeys(requests.asked[order].tolist()))}
    owner = np.array([worker_of[prompt] for prompt in requests.asked[order].tolist()])
    return [np.array(order)[owner == worker].tolist() for worker in range(workers) if (owner == worker).any()]


def forked(answers: Callable[[Sequence[int]], Iterator[Answers]], orders: Sequence[Sequence[int]]) -> Iterator[Answers]:
    """What ``answers(order)`` yields for each order, each in a process of its own, as it comes.

    Raises:
        ValueError, RuntimeError: As raised in a process; RuntimeError also where one ended without a word.
    """
    context: Any = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        reading: dict[Connection, Any] = {}
        for order in orders:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, answers, order), daemon=True)
            with warnings.catch_warnings():  # of threads in this process: the fork uses none of them
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            sender.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            stack.callback(receiver.close)
            reading[receiver] = process
        while reading:
            for receiver in wait(list(reading)):
                yield from _received(receiver, reading)  # type: ignore[arg-type]


def _received(receiver: Connection, reading: dict[Connection, Any]) -> Iterator[Answers]:
    try:
        message = receiver.recv()
    except EOFError:
        process = reading.pop(receiver)
        process.join()
        raise RuntimeError(
            f"a sampling process ended with exit code {process.exitcode}, perhaps for lack of memory; use workers=1"
        ) from None
    if isinstance(message, Exception):
        raise message
    if message is None:
        del reading[receiver]
    else:
        yield message


def _work(sender: Connection, answers: Callable[[Sequence[int]], Iterator[Answers]], order: Sequence[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    torch.set_num_threads(1)  # before anything else: threads of the parent do not exist here
    try:
        for part in answers(order):
            sender.send(part)
        sender.send(None)
    except (ValueError, RuntimeError) as error:
        sender.send(error)
