"""Run the command as ``python -m epsledger``."""

from epsledger.cli import main

if __name__ == "__main__":
    main()
