"""`python -m nsattn` is the `nsattn` command."""

from nsattn.cli import main

main()
