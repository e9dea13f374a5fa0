"""`python -m hfquant.cli`."""

from hfquant.cli import app

app()
