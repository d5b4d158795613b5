"""Processes of their own that start in a tenth of a second: forked from a server that has imported all they need.

A fresh interpreter imports torch, transformers and the rest for ten seconds before it does anything. Use one only where the
import itself, or a command line, is what is tested.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.trainers", "peft"])


def start(
    function: Callable[..., object], *args: Any, environment: Mapping[str, str] | None = None, output: Path | None = None
) -> Any:
    """function(*args) in a new process, and in a session of its own, so that it can be killed with all that it starts.

    output: the file that gets what it prints, errors too. Returns a `multiprocessing.Process`, whose `exitcode` is negative
    after a signal.
    """
    process = CONTEXT.Process(target=_run, args=(function, args, dict(environment or {}), output))
    process.start()
    return process


def exit_code(function: Callable[..., object], *args: Any) -> int | None:
    """The exit code of a process that runs function(*args) to its end."""
    process = start(function, *args)
    process.join()
    code: int | None = process.exitcode
    return code


def forked(draw: Callable[[], bytes]) -> bytes:
    """What a fork of this very process, its copy, draws."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(write, "wb") as pipe:
            pipe.write(draw())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        given = pipe.read()
    os.waitpid(child, 0)
    return given


def begin(environment: Mapping[str, str]) -> None:
    """What every such process does first: one thread, these variables, and no garbage collection of what was imported."""
    gc.freeze()
    os.environ |= environment
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _run(function: Callable[..., object], args: tuple[Any, ...], environment: Mapping[str, str], output: Path | None) -> None:
    os.setsid()
    begin(environment)
    if output is not None:
        with output.open("wb") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    function(*args)
