"""`python -m fastattn.cli`."""

from fastattn.cli import main

main()
