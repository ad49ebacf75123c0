"""What worker processes that make batches need: open files, plain errors, peace from Ctrl-C."""

import os
import re
import resource
import signal
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, Dataset


def batches_from_workers(
    dataset: Dataset, keys: Iterator[list], collate: Callable[[list], list], num_workers: int
) -> Iterator[list[dict]]:
    """What `collate` makes of the rows of each list of keys, made in worker processes."""
    allow_open_files(8192)  # each tensor that a worker hands over holds two
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=num_workers, collate_fn=collate,
                        worker_init_fn=leave_the_group)  # fmt: skip
    return with_plain_errors(iter(loader))


def allow_open_files(wanted: int) -> None:
    """Raises this process's limit of open files to `wanted`, or as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def with_plain_errors(stream: Iterator[list[dict]]) -> Iterator[list[dict]]:
    """The same batches. An error in a worker process arrives with its traceback as text: raises
    ValueError with the last line alone."""
    try:
        yield from stream
    except (ValueError, OSError) as error:
        *_, line = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(re.sub(r"^\w+Error: ", "", line)) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError("a process that makes batches has died, perhaps for lack of memory; with "
                         "num_workers=0 there are none") from None  # fmt: skip


def leave_the_group(worker: int) -> None:
    """In a process that makes batches: Ctrl-C, and what else is sent to the whole group, is for the
    process that trains."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
