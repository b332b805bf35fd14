"""Decode every image of every split, and report what cannot be read, what is there twice and what the images are like.

The exit code is 0 when all images can be read and 2 when one cannot. Duplicates are files of the same bytes that are in
several splits, which spoils a test, or in one split under several labels.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from ..errors import UserError
from ..files import STDOUT, check_writable, write_text
from ..tables import counted, short, table
from . import at_least

SUMMARY = "find unreadable and duplicate images of a dataset"
EXAMPLES = """examples:
  python -m tasn_timm check-data photos/
  python -m tasn_timm check-data user/name --workers 8 --json problems.json"""

LISTED = 20  # lines of a kind on the terminal; --json has all
NAMED = 5  # classes in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="a built-in dataset, a folder, a CSV file, or user/name or user/name@revision on the Hub",
    )
    add(
        "--workers",
        type=at_least(0),
        metavar="N",
        default=2,
        help="processes that decode images; 0: none (default: %(default)s)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything found, also each class, to this file; -: to standard output, without the report",
    )
    add("--input-key", metavar="KEY", help="column of the images, where there are several")
    add("--target-key", metavar="KEY", help="column of the labels, where there are several")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from ..data.checking import check_splits
    from ..data.splits import load_splits

    check_writable(options.json, "--json")
    splits = load_splits(options.data, input_key=options.input_key, target_key=options.target_key)
    result = dict(data=options.data) | check_splits(splits, options.workers)

    text = report(result)
    write_text(options.json, json.dumps(result, indent=2, default=str) + "\n", "--json")
    if options.json != STDOUT:
        print(text)
    if result["unreadable"]:
        raise UserError(verdict(result))


def verdict(result: dict) -> str:
    """What to do about images that cannot be read, in one line."""
    from ..data.split_names import find_split

    bad = len(result["unreadable"])
    them = "it" if bad == 1 else "them"
    way_out = f", or train with --max-bad-images {bad}."
    train = find_split(result["splits"], "train")
    if any(place["split"] != train for place in result["unreadable"]):
        way_out = ". Training can pass over images (--max-bad-images), evaluation cannot."
    return f"{bad:,} of {result['images']:,} images cannot be read: replace or remove {them}{way_out}"


def report(result: dict) -> str:
    """What was found as text, the problems last.

    Args:
        result: Of `check_splits`, and "data", the dataset's name.
    """
    splits = result["splits"]
    head = f"{counted(result['images'], 'image')} of {counted(result['classes'], 'class')} in "
    parts = [f"{result['data']}: {head}{counted(len(splits), 'split')}", _classes_table(result), _sizes_table(splits)]
    parts += [_kinds(splits), _class_problems(splits), _unreadable(result), _duplicates(result)]
    return "\n\n".join(part for part in parts if part)


def _classes_table(result: dict) -> str:
    rows = [("split", "images", "classes", "images per class")]
    for name, split in result["splits"].items():
        present = sorted((count, label) for label, count in split["classes"].items() if count)
        text = "-"
        if present:
            (fewest, rare), (most, common) = present[0], present[-1]
            text = f"{most:,}" if fewest == most else f"{fewest:,} ({short(rare)}) to {most:,} ({short(common)})"
        rows.append((name, f"{split['images']:,}", f"{len(present):,} of {result['classes']:,}", text))
    return table(rows, "<>><")


def _sizes_table(splits: dict[str, dict]) -> str:
    from ..data.checking import SHORT_SIDE

    rows = [("pixels", "width: min", "median", "max", "height: min", "median", "max", f"short side < {SHORT_SIDE}")]
    for name, split in splits.items():
        if split["width"]:
            sizes = [f"{split[side][key]:,.0f}" for side in ("width", "height") for key in ("min", "median", "max")]
            rows.append((name, *sizes, f"{split['small']:,}"))
    return table(rows, "<>>>>>>>")


def _kinds(splits: dict[str, dict]) -> str:
    rows = []
    for title in ("formats", "converted"):
        counts = sum((Counter(split[title]) for split in splits.values()), Counter())
        rows.append((title, ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common()) or "none"))
    return table(rows, "<<")


def _class_problems(splits: dict[str, dict]) -> str:
    lines = []
    for name, split in splits.items():
        if split["unlabelled"]:
            lines.append(f"{name} has {counted(split['unlabelled'], 'image')} without the label of a class")
        if split.get("missing"):
            number = counted(len(split["missing"]), "class")
            lines.append(f"{name} lacks {number} of the training split: {_some(split['missing'])}")
        if split.get("untrained"):
            number = counted(len(split["untrained"]), "class")
            lines.append(f"{name} has {number} that the training split has no image of: {_some(split['untrained'])}")
    return _section("classes", "\n".join(lines)) if lines else ""


def _unreadable(result: dict) -> str:
    found = result["unreadable"]
    rows = [(*_where(place, result["data"]), place["reason"]) for place in found[:LISTED]]
    title = f"unreadable: {counted(len(found), 'image') if found else 'none'}"
    return _section(title, table(rows, "<><<<"), len(found) - LISTED)


def _duplicates(result: dict) -> str:
    """Two lines for each duplicate: where it is first, and the first other place that makes it a problem."""
    found = result["duplicates"]
    across = sum(one["across_splits"] for one in found)
    kinds = {"in several splits (spoils tests)": across, "in one split under several labels": len(found) - across}
    rows = []
    for number, one in enumerate(found[: LISTED // 2], start=1):
        first, *others = one["places"]
        key = "split" if one["across_splits"] else "label"
        other = next(place for place in others if place[key] != first[key])
        notes = [] if one["labels_agree"] else ["labels differ"]
        notes += [f"{counted(len(others) - 1, 'more place')}"] if len(others) > 1 else []
        rows += [
            (f"{number}", *_where(first, result["data"]), first["label"] or "no label", ""),
            ("", *_where(other, result["data"]), other["label"] or "no label", ", ".join(notes)),
        ]
    title = ", ".join(f"{counted(number, 'file')} {kind}" for kind, number in kinds.items() if number) or "none"
    return _section(f"duplicates: {title}", table(rows, "><><<<<"), len(found) - LISTED // 2)


def _where(place: dict, data: str) -> tuple[str, ...]:
    """Split, row, image_id and file; a file in the folder of the data without the folder."""
    file = Path(place["file"] or "")
    folder = Path(data).expanduser().resolve()
    file = file.relative_to(folder) if file.is_relative_to(folder) else file
    image_id = place.get("image_id")
    image_id = "" if image_id is None else str(image_id)
    return place["split"], f"row {place['row']}", image_id, str(file) if place["file"] else ""


def _section(title: str, lines: str, unlisted: int = 0) -> str:
    more = [f"... and {unlisted:,} more (--json FILE has all)"] if unlisted > 0 else []
    return "\n".join([title, *(f"  {line}" for line in [*lines.splitlines(), *more])])


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
