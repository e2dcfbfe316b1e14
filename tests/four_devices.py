"""Runs a script in a process of its own with four simulated devices: how many there are is fixed when jax starts."""

import json
import os
import subprocess
import sys


def run_script(script, *folders):
    """What the script's last printed line says, as JSON; the folders are its arguments."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
