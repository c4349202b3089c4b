"""`python -m lorary` is `lorary`."""

from lorary.cli import main

if __name__ == "__main__":
    main()
