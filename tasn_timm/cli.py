"""python -m tasn_timm COMMAND."""

import argparse
import io
import sys
from collections.abc import Sequence

from .commands import (
    benchmark,
    check_data,
    demo,
    evaluate,
    export,
    predict,
    prepare,
    publish,
    recipes,
    reproduce,
    run,
    visualize,
)
from .errors import Parser

COMMANDS = {
    "benchmark": benchmark,
    "check-data": check_data,
    "demo": demo,
    "evaluate": evaluate,
    "export": export,
    "predict": predict,
    "prepare": prepare,
    "publish": publish,
    "recipes": recipes,
    "reproduce": reproduce,
    "run": run,
    "visualize": visualize,
}

EXAMPLES = """examples:
  python -m tasn_timm predict tasn_tiny bird.png
  python -m tasn_timm predict --help                # says everything of a command

exit codes: 0; 2 for your mistake, in one line; 3 for a numerical failure; 130 after Ctrl-C"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What follows `python -m tasn_timm`; None for the process's own.

    Raises:
        UserError: Of any of the commands, or of their options.
    """
    parser = Parser(
        "python -m tasn_timm",
        description="Trained models and recipes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
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
        command.set_defaults(run=module.run, parser=command)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error: names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = parser.parse_known_args(arguments)
    if strange := [each for each in unknown if each.startswith("-")]:
        options.parser.error(f"unrecognized arguments: {' '.join(strange)}")  # whose --help has the options
    if unknown:  # those after options, which argparse gathers for parsers without sub-parsers alone
        options = options.parser.parse_intermixed_args(arguments[1:])
    options.run(options)
