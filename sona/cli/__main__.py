"""`python -m sona.cli`: the same as `sona`, for a process that starts another."""

from sona.cli import main

main()
