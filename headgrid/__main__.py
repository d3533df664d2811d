"""`python -m headgrid` is the command `headgrid`."""

from headgrid.cli import main

if __name__ == "__main__":
    main()
