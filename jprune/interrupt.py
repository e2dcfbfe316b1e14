"""What Ctrl-C does to the program `jprune` before its work begins, also while its libraries are being imported."""

import os
import signal
from typing import Any


def stop(*_: Any) -> None:
    """End at once, with one line and status 130.

    Not by an exception: the import of a native library may swallow it, or leave the library half made.
    """
    os.write(2, b"interrupted before the work began\n")
    os._exit(130)


def obey_ctrl_c() -> None:
    """Have Ctrl-C call `stop`, unless it is ignored, as it is in jobs that a shell script starts in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
