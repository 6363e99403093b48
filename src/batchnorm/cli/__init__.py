"""The `batchnorm` command."""

from batchnorm.cli.app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    app(prog_name="batchnorm")
