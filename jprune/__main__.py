"""The program `jprune`, also as `python -m jprune`: takes Ctrl-C in hand first, then imports what it needs."""

from jprune.interrupt import obey_ctrl_c


def main() -> None:
    """Import, then run the command line."""
    obey_ctrl_c()
    from jprune.cli import main as run

    run()


if __name__ == "__main__":
    main()
