"""``python -m quantool`` and the console script."""

from quantool.cli import main

if __name__ == "__main__":
    main()
