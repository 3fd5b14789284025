"""``python -m npeff``: the same as the ``npeff`` command."""

from npeff.cli import main

if __name__ == "__main__":
    main()
