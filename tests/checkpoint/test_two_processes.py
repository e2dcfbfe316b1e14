"""Checkpoints under jax.distributed: two processes write one folder, read it back, replace it, and fail together."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_write_read_replace_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "in").mkdir()
    started = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), str(port), str(tmp_path / "in" / "c")], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=150)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    for rank, (p, text) in enumerate(zip(started, said, strict=True)):
        assert p.returncode == 0 and f"done {rank}" in text, text[-3000:]
