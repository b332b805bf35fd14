"""The commands of `python -m tasn_timm`, one file each.

A command has a docstring, which --help shows, SUMMARY (a line), EXAMPLES, where needed USAGE, and two functions:
add_arguments(parser) and run(options).
"""

import argparse
from collections.abc import Callable
from functools import cache


@cache
def at_least(least: int) -> Callable[[str], int]:
    """Type of an option for argparse: a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
        return value

    return parse
