"""The figures in the recipes are the paper's, every figure of ours has a recipe, and the commands can be run."""

import re

import pytest

from tasn_timm.data.prepare import PREPARED
from tasn_timm.data.splits import BUILT_IN
from tasn_timm.recipe import PaperRow, parse_args
from tasn_timm.recipe_cards import TITLES, RecipeCard, recipe_cards, recipes_table

# The paper's text tables; "*" marks the rows that are other people's methods, with other people's code.
PAPER = {
    2: """
        X | 83.5
        X X^T X | 84.9
        N(X) X^T X | 85.2
        N(X) N(X)^T X | 84.3
        N(X X^T X) | 84.5
        N(X X^T) X | 85.0
        N(N(X) X^T) X | 85.3
    """,
    3: """
        Resnet-50 | 81.6
        uniformed sampler, master-net | 84.1
        uniformed sampler, TASN | 85.8
        sampler in SSN, master-net | 84.8
        sampler in SSN, TASN | 85.3
        our sampler, master-net | 85.5
        our sampler, TASN | 87.0
    """,
    4: """
        Resnet-50, 224 | 81.6
        Resnet-50, 280 | 83.3
        Resnet-50, 336 | 85.0
        Resnet-50, 392 | 85.6
        master-net, 224 | 85.5
        master-net, 280 | 86.6
        master-net, 336 | 87.0
        master-net, 392 | 86.8
        TASN, 224 | 87.0
        TASN, 280 | 87.3
        TASN, 336 | 87.9
        TASN, 392 | 87.9
    """,
    5: """
        Resnet-50, 224 | 81.6
        Resnet-50, 448 | 85.6
        *DT-RAM, 224 | 82.8
        *SSN, 227 | 84.5
        TASN, 224 | 87.0
    """,
    6: """
        *MG-CNN, 3xVGG-16 | 81.7
        *ST-CNN, 3xInception-v2 | 84.1
        *RA-CNN, 3xVGG-19 | 85.3
        *MA-CNN, 3xVGG-19 | 85.4
        TASN, 1xVGG-19 | 86.1
        TASN, 3xVGG-19 | 87.1
        *MAMC, 1xResnet-50 | 86.5
        *NTSN, 3xResnet-50 | 87.3
        TASN, 1xResnet-50 | 87.9
    """,
    7: """
        iSQRT-COV, 8k | 87.3
        iSQRT-COV, 32k | 88.1
        TASN, 2k | 87.9
        TASN + iSQRT-COV, 32k | 89.1
    """,
    8: """
        Baseline, 1xVGG-19 | 88.6
        master-net, 1xVGG-19 | 90.3
        TASN, 1xVGG-19 | 92.4
        TASN (ensemble), 2xVGG-19 | 93.1
        TASN (ensemble), 3xVGG-19 | 93.2
    """,
    9: """
        *FCAN, 3xVGG-16 | 91.3
        *MDTP, 3xVGG-16 | 92.5
        *RA-CNN, 3xVGG-19 | 92.5
        *MA-CNN, 3xVGG-19 | 92.6
        TASN, 1xVGG-19 | 92.4
        TASN, 3xVGG-19 | 93.2
        *MAMC, 1xResnet-50 | 92.8
        *NTSN, 3xResnet-50 | 93.7
        TASN, 1xResnet-50 | 93.8
    """,
    10: """
        Total, Resnet | 59.6
        Total, SSN | 65.2
        Total, TASN | 68.2
    """,
    # The text: "the recognition performance dropped from 87.0% to 86.8%"; "the result is the same as distilling one
    # part each time"; "can outperform self-attention module with 0.7% points".
    "4.2": """
        ranking selection | 86.8
        two parts in each iteration | 87.0
        self-attention | 84.6
    """,
}


def figures() -> dict[tuple[int | str, str], float]:
    """(table, row) -> accuracy."""
    lines = [(table, *line.strip().split(" | ")) for table, text in PAPER.items() for line in text.strip().splitlines()]
    return {(table, row): float(top1) for table, row, top1 in lines}


def test_the_recipes_figures_are_the_papers_and_none_of_ours_is_missing():
    rows = [row for card in recipe_cards() for row in card.paper if row.top1 is not None]
    expected = {key: top1 for key, top1 in figures().items() if not key[1].startswith("*")}
    assert {(row.table, row.row): row.top1 for row in rows} == expected
    assert len(rows) == len(expected), "one recipe a row"
    assert expected[2, "N(N(X) X^T) X"] - expected["4.2", "self-attention"] == pytest.approx(0.7)


def test_ensembles_and_mirrored_images_are_marked():
    for card in recipe_cards():
        for row in card.paper:
            backbones = re.search(r"(\d)x", row.row)
            assert row.ensemble == (int(backbones[1]) if backbones else 1)
            assert row.flip == (row.table == 7) and row.super_classes == (row.table == 10)


@pytest.mark.parametrize("card", recipe_cards(), ids=lambda card: card.name)
def test_a_card_says_what_its_recipe_is_and_its_command_loads_it(card):
    assert card.about.endswith(".") and len(card.about) < 120
    (command,) = card.commands(PaperRow(4, "one model"))
    name, recipe, _ = parse_args(command.removeprefix("accelerate launch train_accelerate.py ").split())
    assert name == card.name
    assert recipe.data in BUILT_IN
    if recipe.data in PREPARED:
        assert recipe.num_classes == PREPARED[recipe.data].classes and recipe.val_split is None


def test_commands_of_rows_that_take_an_evaluation():
    card = RecipeCard("mine", "Mine.", [], None)
    train = "accelerate launch train_accelerate.py --recipe mine"
    assert card.commands(PaperRow(7, "row", flip=True)) == [train, "python -m tasn_timm evaluate runs/mine --flip"]
    assert card.commands(PaperRow(10, "row", super_classes=True)) == [
        train,
        "python -m tasn_timm evaluate runs/mine",
    ]
    assert card.commands(PaperRow(6, "row", ensemble=3)) == [
        f"{train} --seed 0 --output runs/seed0",
        f"{train} --seed 1 --output runs/seed1",
        f"{train} --seed 2 --output runs/seed2",
        "python -m tasn_timm evaluate --ensemble runs/seed0/mine runs/seed1/mine runs/seed2/mine",
    ]


def test_the_table_is_in_the_papers_order_with_commands():
    rows = [
        PaperRow(10, "all", 68.2),
        PaperRow("4.2", "text"),
        PaperRow(3, "two", 87, ensemble=2),
        PaperRow(3, "one", 85),
    ]
    cards = [
        RecipeCard("mine", "Mine.", rows, 84.04),
        RecipeCard("synthetic", "Drawn.", [], "about 90"),
    ]
    train = "    accelerate launch train_accelerate.py --recipe"
    assert recipes_table(cards).splitlines() == [
        TITLES[3],
        "-" * len(TITLES[3]),
        "paper  measured  recipe",
        " 85.0      84.0  mine       one",
        f"{train} mine",
        " 87.0         -  mine       two",
        f"{train} mine --seed 0 --output runs/seed0",
        f"{train} mine --seed 1 --output runs/seed1",
        "    python -m tasn_timm evaluate --ensemble runs/seed0/mine runs/seed1/mine",
        "",
        TITLES[10],
        "-" * len(TITLES[10]),
        "paper  measured  recipe",
        " 68.2      84.0  mine       all",
        f"{train} mine",
        "",
        "Section 4.2",
        "-----------",
        "paper  measured  recipe",
        "    -      84.0  mine       text",
        f"{train} mine",
        "",
        "Not in the paper",
        "----------------",
        "paper  measured  recipe",
        "    -  about 90  synthetic  Drawn.",
        f"{train} synthetic",
    ]
    every = recipes_table(recipe_cards())
    assert all(title in every for title in TITLES.values())
    assert all(f" {card.name} " in every for card in recipe_cards())
