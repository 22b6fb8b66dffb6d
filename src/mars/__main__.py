"""`python -m mars`: the command line, as torchrun starts it."""

from mars.cli import main

if __name__ == "__main__":
    main()
