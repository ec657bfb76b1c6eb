"""`python -m jobs VERB ...` is `topiq VERB ...`."""

from jobs.cli import main

main()
