"""The `batchnorm` command."""

from batchnorm.cli.commands import app

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    app(prog_name="batchnorm")
