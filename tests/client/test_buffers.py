"""Buffers are used again only when no server can touch them, and no process leaves its shared memory behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from groundglass_client import buffers as module
from groundglass_client.buffers import MASK_BYTES, PREFIX, SHARED_MEMORY, Buffer, Buffers, remove_abandoned
from own_memory import regions

SIZE = 3 * (16 * 16 * 2 + MASK_BYTES)


def test_pixels_and_masks_of_a_buffer_do_not_overlap() -> None:
    """The pixels start a buffer, the masks end it, and both are views of it."""
    buffer = Buffer(np.zeros(SIZE, dtype=np.uint8))
    buffer.hu(3, 16, 16)[:] = -1
    buffer.masks(3)[:] = 7
    assert (buffer.hu(3, 16, 16) == -1).all()
    assert buffer.masks(2).shape == (2, 512, 64)
    assert buffer.mask_offset(3) >= buffer.hu(3, 16, 16).nbytes


@pytest.mark.parametrize("shared", [True, False])
def test_an_answered_buffer_is_used_again(shared: bool) -> None:
    """What was answered comes back from the next take, and two buffers in use are never the same memory."""
    pool = Buffers(shared=shared)
    first, second = pool.take(SIZE), pool.take(SIZE)
    first.memory[:], second.memory[:] = 1, 2
    assert (first.memory == 1).all()
    pool.give_back(first, answered=True)
    assert pool.take(SIZE) is first
    assert (first.region is not None) == shared
    pool.close()


def test_an_unanswered_buffer_is_never_used_again() -> None:
    """A server may still write to it: another region takes its place, and its file is gone at once."""
    before = regions(PREFIX)
    pool = Buffers(shared=True)
    lost = pool.take(SIZE)
    pool.give_back(lost, answered=False)
    assert regions(PREFIX) == before
    again = pool.take(SIZE)
    again.memory[:] = 5
    assert again.memory.ctypes.data != lost.memory.ctypes.data
    pool.close()
    assert regions(PREFIX) == before


def test_buffers_of_another_size_do_not_pile_up() -> None:
    """A study of another chunk size takes new regions, and those of the study before go."""
    before = regions(PREFIX)
    pool = Buffers(shared=True)
    pool.give_back(pool.take(SIZE), answered=True)
    pool.take(2 * SIZE)
    assert len(regions(PREFIX) - before) == 1
    pool.close()
    assert regions(PREFIX) == before


def test_a_region_is_asked_back_until_its_servers_have_let_go() -> None:
    """Closing asks a server again that still uses a region, and forgets it once the server agrees."""
    pool = Buffers(shared=True)
    region = pool.take(SIZE).region
    assert region is not None
    answers = iter([False, False, True])
    region.holders[1] = lambda name: next(answers)
    pool.close()
    assert next(answers, "all were asked") == "all were asked"


def test_too_many_condemned_regions_send_chunks_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a server holds on to what it was sent, no more shared memory is handed to it."""
    monkeypatch.setattr(module, "_MOST_CONDEMNED", 2)
    pool = Buffers(shared=True)
    held = True
    for _ in range(2):
        buffer = pool.take(SIZE)
        assert buffer.region is not None
        buffer.region.holders[1] = lambda name: not held
        pool.give_back(buffer, answered=False)
    assert pool.take(SIZE).region is None
    held = False
    assert pool.take(SIZE).region is not None
    pool.close()


def test_a_full_shared_memory_is_no_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where /dev/shm has no room, memory of this process serves, and the log says so once."""
    before = regions(PREFIX)

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    pool = Buffers(shared=True)
    assert [pool.take(SIZE).region for _ in range(3)] == [None, None, None]
    assert caplog.text.count("No space left on device") == 1
    assert "shm_size" in caplog.text
    assert regions(PREFIX) == before


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 the next client removes the regions; those of a living process stay."""
    program = f"""
import time
from groundglass_client.buffers import Buffers
print(Buffers(shared=True).take({SIZE}).region.name, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        names = [process.stdout.readline().strip() for process in processes if process.stdout]
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        remove_abandoned()
        assert all((SHARED_MEMORY / name).exists() for name in names)  # too young to be judged
        monkeypatch.setattr(module, "_ABANDONED_S", -1.0)
        remove_abandoned()
        assert [(SHARED_MEMORY / name).exists() for name in names] == [False, True]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        (SHARED_MEMORY / names[1]).unlink(missing_ok=True)
