"""`simclr-dist doctor`: what works here and what does not. The same as `python -m simclr_dist.doctor`."""

from __future__ import annotations

from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.doctor import command


def register(commands: Commands) -> None:
    command.add_arguments(
        add_command(
            commands,
            "doctor",
            command.run,
            help="what works here, what does not, and what to do about it",
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
        )
    )
