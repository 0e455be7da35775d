"""`msd` and `python -m msdcli`."""

from msdcli.cli import main

if __name__ == "__main__":
    main()
