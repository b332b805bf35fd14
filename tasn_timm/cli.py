"""python -m tasn_timm COMMAND."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from .commands import check_data, demo, evaluate, export, prepare, publish, recipes, run, visualize
from .errors import UserError

COMMANDS = {
    "check-data": check_data,
    "demo": demo,
    "evaluate": evaluate,
    "export": export,
    "prepare": prepare,
    "publish": publish,
    "recipes": recipes,
    "run": run,
    "visualize": visualize,
}


class _Parser(argparse.ArgumentParser):
    """Tells mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What follows `python -m tasn_timm`; None for the process's own.

    Raises:
        UserError: Of any of the commands, or of their options.
    """
    parser = _Parser("python -m tasn_timm", description="Trained models and recipes.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            usage=getattr(module, "USAGE", None),
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    options.run(options)
