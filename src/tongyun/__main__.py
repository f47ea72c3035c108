"""`python -m tongyun` is the `tongyun` command."""

from tongyun.cli import main

main()
