"""`python -m latentact` is `latentact`."""

from latentact.cli import main

main()
