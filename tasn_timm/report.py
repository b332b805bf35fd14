"""What an evaluation found: everything as numbers, the essence as text, and tables of pictures and classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .data.decoding import undecoded
from .measures import calibration_error, confused_pairs, wilson_interval
from .tables import counted, short, table

if TYPE_CHECKING:
    import datasets

    from .training.evaluation import Scores

INTERVAL = "95 % interval"
LOWEST, PAIRS = 10, 10  # classes and pairs of classes in the text; the files have all


def summarize(scores: Scores, names: list[str], labels: list[str], families: dict[str, str] | None) -> dict:
    """Everything measured, as --json has it. Shares are in percent, intervals are of 95 %.

    Args:
        scores: Of probabilities.
        names: Of the data's classes.
        labels: Of the models' classes, in order; the data's are among them.
        families: Class -> super-class, where the data has them.
    """
    classes = {
        name: dict(correct=correct, images=images)
        for name, correct, images in zip(labels, scores.correct.tolist(), scores.counts.tolist())
        if name in set(names)
    }
    in_top5 = None if scores.top5 is None else wilson_interval(int(scores.in_top5.sum()), scores.images)
    return dict(
        matched_by_name=None if labels == names else dict(classes=len(names), of=len(labels)),
        images=scores.images,
        top1=scores.top1,
        top1_interval=wilson_interval(int(scores.right.sum()), scores.images),
        top5=scores.top5,
        top5_interval=in_top5,
        calibration_error=calibration_error(scores.values[:, 0], scores.right),
        seconds=scores.seconds,
        images_per_second=scores.images / scores.seconds,
        classes=classes,
        super_classes=families and by_super_class(classes, families),
        confusions=[
            dict(label=labels[label], prediction=labels[other], images=images, of=classes[labels[label]]["images"])
            for label, other, images in confused_pairs(scores.labels, scores.best[:, 0])
        ],
    )


def by_super_class(classes: dict[str, dict[str, int]], families: dict[str, str]) -> dict[str, dict]:
    """Sum up classes by their super-class, those of the most classes first, as in Table 10.

    Args:
        classes: Name -> "correct" and "images".
        families: Class -> super-class.

    Returns:
        Super-class -> "classes" and "images", their numbers, "top1" in percent and its "interval".
    """
    result = {}
    for family in dict.fromkeys(families.values()):
        members = [classes[name] for name, above in families.items() if above == family]
        correct, images = (sum(member[key] for member in members) for key in ("correct", "images"))
        interval = wilson_interval(correct, images)
        result[family] = dict(classes=len(members), images=images, top1=100 * correct / images, interval=interval)
    return dict(sorted(result.items(), key=lambda item: -item[1]["classes"]))


def report(result: dict) -> str:
    """The essence as text.

    Args:
        result: Of `summarize`, with "models", "data", "split", "flip", "resolution", "device" and "processes".
    """
    parts = [_head(result), _measures(result), _super_classes(result), _lowest_classes(result), _most_confused(result)]
    return "\n\n".join(part for part in parts if part)


def _head(result: dict) -> str:
    models = " + ".join(result["models"]) + (" (image and mirror image)" if result["flip"] else "")
    at = f" at {result['resolution']} pixels" if result["resolution"] else ""
    matched = result["matched_by_name"]
    by_name = f"\nclasses matched by name: {matched['classes']} of the model's {matched['of']}" if matched else ""
    size = f"{counted(result['images'], 'image')} of {counted(len(result['classes']), 'class')}"
    return f"{models}{at} on {result['data']}, split {result['split']}: {size}{by_name}"


def _measures(result: dict) -> str:
    rows = [("", "", INTERVAL), ("top-1", _percent(result["top1"]), _interval(result["top1_interval"]))]
    if result["top5"] is not None:
        rows.append(("top-5", _percent(result["top5"]), _interval(result["top5_interval"])))
    rows.append(("calibration error", _percent(result["calibration_error"]), "15 bins"))
    where = f"{counted(result['processes'], 'process')} on {result['device']}, loading included"
    rows.append(("images a second", f"{result['images_per_second']:.1f}", where))
    return table(rows, "<><")


def _super_classes(result: dict) -> str:
    if not result["super_classes"]:
        return ""
    total = dict(images=result["images"], top1=result["top1"], interval=result["top1_interval"])
    total["classes"] = sum(family["classes"] for family in result["super_classes"].values())
    rows = [
        (name, f"{one['classes']:,}", f"{one['images']:,}", f"{one['top1']:.2f}", _interval(one["interval"]))
        for name, one in (result["super_classes"] | {"Total": total}).items()
    ]
    return table([("Super Class", "# Class", "images", "accuracy", INTERVAL), *rows], "<>>><")


def _lowest_classes(result: dict) -> str:
    seen = [(name, one) for name, one in result["classes"].items() if one["images"]]
    lowest = sorted(seen, key=lambda item: item[1]["correct"] / item[1]["images"])[:LOWEST]
    rows = [
        (
            short(name, 50),
            f"{one['images']:,}",
            f"{100 * one['correct'] / one['images']:.2f}",
            _interval(wilson_interval(one["correct"], one["images"])),
        )
        for name, one in lowest
    ]
    title = "class" if len(seen) <= LOWEST else f"lowest {LOWEST} of {len(seen):,} classes"
    return table([(title, "images", "accuracy", INTERVAL), *rows], "<>><")


def _most_confused(result: dict) -> str:
    rows = [
        (short(pair["label"], 50), short(pair["prediction"], 50), f"{pair['images']:,} of {pair['of']:,}")
        for pair in result["confusions"][:PAIRS]
    ]
    return table([("most confused", "taken for", "images"), *rows], "<<>") if rows else ""


def _percent(share: float) -> str:
    return f"{share:.2f} %"


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def picture_rows(scores: Scores, split: datasets.Dataset, labels: list[str]) -> Iterator[list]:
    """A header and a row for each picture of a split, as --csv has them.

    Args:
        scores: Of the split.
        split: As it was evaluated.
        labels: Names of the classes.
    """
    yield ["row", "image", "label", "prediction", "probability", "correct", "in_top5"]
    columns = (scores.labels, scores.best[:, 0], scores.values[:, 0], scores.right, scores.in_top5)
    for row, (name, cells) in enumerate(zip(_image_names(split), zip(*(column.tolist() for column in columns)))):
        label, prediction, probability, right, in_top5 = cells
        top5 = None if scores.top5 is None else int(in_top5)
        yield [row, name, labels[label], labels[prediction], probability, int(right), top5]


def _image_names(split: datasets.Dataset) -> Iterator[str | None]:
    """The data's image_id, or else the name of the picture's file, where it has one."""
    if "image_id" in split.column_names:
        yield from map(str, split["image_id"][:])
        return
    tables = undecoded(split).select_columns(["image"]).with_format("arrow")  # no picture becomes a Python object
    for rows in tables.iter(batch_size=1000):
        for chunk in rows["image"].chunks:
            yield from chunk.field("path").to_pylist()


def class_rows(result: dict, families: dict[str, str] | None) -> Iterator[list]:
    """A header and a row for each class, as --class-csv has them.

    Args:
        result: Of `summarize`.
        families: Class -> super-class, where the data has them.
    """
    yield ["class", "super_class", "images", "correct", "top1", "low", "high", "most_taken_for", "taken"]
    most: dict[str, dict] = {}
    for pair in result["confusions"]:
        most.setdefault(pair["label"], pair)
    for name, one in result["classes"].items():
        top1 = 100 * one["correct"] / one["images"] if one["images"] else None
        bounds = wilson_interval(one["correct"], one["images"]) if one["images"] else (None, None)
        other = most.get(name, {})
        above = families.get(name) if families else None
        counts = [one["images"], one["correct"], top1, *bounds]
        yield [name, above, *counts, other.get("prediction"), other.get("images")]
