"""`python -m fastattn.cli`."""

from fastattn.cli.main import main

main()
