"""``python -m kdlib`` is the command ``kdlib``."""

from kdlib.cli import main

if __name__ == "__main__":
    main()
