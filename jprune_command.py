"""The program `jprune`: Ctrl-C ends it with one line and status 130, also while its libraries are being imported."""

import os
import signal
from typing import Any


def stop(*_: Any) -> None:
    """What Ctrl-C does before work has begun: end at once.

    Not by an exception: the import of a native library may swallow it, or leave the library half made.
    """
    os.write(2, b"interrupted before the work began\n")
    os._exit(130)


def obey_ctrl_c() -> None:
    """Have Ctrl-C call `stop`, unless it is ignored, as it is in jobs that a shell script starts in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)


def main() -> None:
    """Import, then run the command line."""
    obey_ctrl_c()
    from jprune.cli import main as run

    run()


if __name__ == "__main__":
    main()
