"""`python -m latentact` is `latentact`."""

from latentact.cli.app import main

main()
