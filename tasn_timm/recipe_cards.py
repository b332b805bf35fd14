"""Which recipe is for which figure of the paper, what was measured, and the commands to run it."""

import math
from typing import NamedTuple

from .recipe import RECIPES, PaperRow, read_recipe_file

TITLES = {
    2: "Table 2. Attention maps: part net alone, CUB-200-2011",
    3: "Table 3. Samplers, CUB-200-2011",
    4: "Table 4. Distillation at several sizes, CUB-200-2011",
    5: "Table 5. Against sampling-based methods, CUB-200-2011",
    6: "Table 6. Against part-based methods, CUB-200-2011",
    7: "Table 7. With second-order pooling, CUB-200-2011",
    8: "Table 8. Components, Stanford Cars",
    9: "Table 9. Against part-based methods, Stanford Cars",
    10: "Table 10. iNaturalist 2017",
}


class RecipeCard(NamedTuple):
    """What is to know about a recipe of the package."""

    name: str
    about: str
    paper: list[PaperRow]
    measured: float | str | None

    def commands(self, row: PaperRow) -> list[str]:
        """Command lines that train the recipe and test it as a row of the paper says."""
        train = f"accelerate launch train_accelerate.py --recipe {self.name}"
        evaluate, flip = "python -m tasn_timm evaluate", " --flip" * row.flip
        if row.ensemble > 1:  # each seed in a folder of its own, whatever was trained before
            folders = [f"runs/seed{seed}" for seed in range(row.ensemble)]
            trainings = [f"{train} --seed {seed} --output {folder}" for seed, folder in enumerate(folders)]
            models = " ".join(f"{folder}/{self.name}" for folder in folders)
            return [*trainings, f"{evaluate} --ensemble {models}{flip}"]
        return [train, f"{evaluate} runs/{self.name}{flip}"] if row.flip or row.super_classes else [train]


def recipe_cards() -> list[RecipeCard]:
    """The package's recipes, by name."""
    cards = []
    for path in sorted(RECIPES.glob("*.yaml")):
        file = read_recipe_file(path)
        about = path.read_text().splitlines()[0].removeprefix("#").strip()
        cards.append(RecipeCard(path.stem, about, file.paper, file.measured))
    return cards


def recipes_table(cards: list[RecipeCard]) -> str:
    """Text for a terminal: every table of the paper with our recipe for each row, then the other recipes.

    Below each row are its commands. Accuracies are top-1 in per cent. A measured one is the recipe's own, of single
    models and crops, so rows of ensembles and mirrored images have none.
    """
    width = max(len(card.name) for card in cards)
    tables = sorted(
        {row.table for card in cards for row in card.paper}, key=lambda table: (isinstance(table, str), table)
    )
    blocks = [_block(TITLES.get(table, f"Section {table}"), _paper_rows(cards, table, width)) for table in tables]
    others = [_lines(card, PaperRow(0, card.about), width) for card in cards if not card.paper]
    return "\n\n".join([*blocks, *([_block("Not in the paper", others)] if others else [])])


def _block(title: str, rows: list[str]) -> str:
    return "\n".join([title, "-" * len(title), "paper  measured  recipe", *rows])


def _paper_rows(cards: list[RecipeCard], table: int | str, width: int) -> list[str]:
    """Lines of a table's rows, from the lowest accuracy to the highest."""
    rows = [(row, card) for card in cards for row in card.paper if row.table == table]
    rows.sort(key=lambda pair: pair[0].top1 or math.inf)
    return [_lines(card, row, width) for row, card in rows]


def _lines(card: RecipeCard, row: PaperRow, width: int) -> str:
    measured = None if row.ensemble > 1 or row.flip else card.measured
    first = f"{_percent(row.top1):>5}  {_percent(measured):>8}  {card.name:{width}}  {row.row}"
    return "\n".join([first, *(f"    {command}" for command in card.commands(row))])


def _percent(top1: float | str | None) -> str:
    return "-" if top1 is None else top1 if isinstance(top1, str) else f"{top1:.1f}"
