"""List the recipes, and what the paper and we measured with them."""

import argparse

SUMMARY = "list the recipes and what the paper and we measured"
EXAMPLES = """example:
  python -m tasn_timm recipes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from ..recipe_cards import recipe_cards, recipes_table

    print(recipes_table(recipe_cards()))
