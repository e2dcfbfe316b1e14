"""Runs a script on the four simulated devices that tests/conftest.py asks for, or in a process of its own."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from unittest import mock

import jax


def run_script(script, *folders):
    """What the script's last printed line says, as JSON; the folders are its arguments."""
    assert jax.device_count() >= 4, "the caller asks for fewer devices than these tests need"
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["script", *map(str, folders)]),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(printed),
    ):
        exec(compile(script, "script", "exec"), {"__name__": "script"})
    return json.loads(printed.getvalue().splitlines()[-1])


def run_script_alone(script):
    """The same in a process of its own, for a script that changes the configuration of jax."""
    four = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": four},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def most_moved(compiled):
    """The most entries that one collective of a compiled program takes from other devices, but for sums over devices."""
    sizes = [0]
    for line in compiled.as_text().splitlines():
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            results = line.split("(", 1)[0] if "= (" not in line else line.split(") ", 1)[0]
            for found in re.findall(r"\w+\[([\d,]*)\]", results):
                sizes.append(math.prod(int(n) for n in found.split(",") if n))
    return max(sizes)
