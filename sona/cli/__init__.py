"""`sona`: one command per file, each importing what it needs when it runs."""

from sona.cli.commands import main

__all__ = ["main"]
