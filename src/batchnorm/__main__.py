"""`python -m batchnorm`: the same as the `batchnorm` command."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
