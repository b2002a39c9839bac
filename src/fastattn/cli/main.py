"""`fastattn tune | explain | cache | doctor`: verdicts ahead of time, why a problem is served as it is, and what is stored.

Results go to stdout, as tables or with --json as data; progress goes to stderr.
"""

from __future__ import annotations

from typing import Any

import click

import fastattn
from fastattn.cli.cache import cache
from fastattn.cli.doctor.command import doctor
from fastattn.cli.encoding import never_refused
from fastattn.cli.explain import explain
from fastattn.cli.shape_words import Group
from fastattn.cli.tune import tune
from fastattn.environment.settings import current_settings

__all__ = ["main"]


class Fastattn(Group):
    """The command itself. Whatever it and its parts write, no terminal's encoding ends it."""

    def main(self, *args: Any, **how: Any) -> Any:
        with never_refused():
            return super().main(*args, **how)


@click.group(cls=Fastattn, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastattn.__version__, prog_name="fastattn")
@click.pass_context
def main(context: click.Context) -> None:
    """Attention by the fastest kernel on this machine that is right."""
    if context.invoked_subcommand == doctor.name:
        return  # it reports a bad variable among the rest
    try:
        current_settings()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


for command in (tune, explain, cache, doctor):
    main.add_command(command)
