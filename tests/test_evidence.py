"""Evidence: plan, statistics against SciPy's own test, and what RESULTS.md says of results."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from scipy import stats

from tasn_timm.commands.reproduce import EXAMPLES
from tasn_timm.data import synthbirds
from tasn_timm.evidence import (
    Contender,
    Plan,
    Result,
    Row,
    Table,
    Target,
    difference,
    read_plan,
    read_results,
    what_counts,
    write_result,
)
from tasn_timm.evidence_figure import evidence_figure
from tasn_timm.evidence_report import report
from tasn_timm.recipe import load_recipe

ENVIRONMENT = dict(
    commits=["0123456789abcdef+"], versions=dict(torch="2", timm="1", accelerate="1"), machine="x86_64", cpu="AVX2",
    device="cpu", mixed_precision="bf16", gpu=None,
)  # fmt: skip


def result(contender: str, seed: int, top1: float, **changes) -> Result:
    values = dict(
        contender=contender,
        seed=seed,
        recipe="synthbirds",
        options=what_counts(load_recipe("synthbirds", dict(seed=seed))),
        start=None,
        start_weights=None,
        weights=f"{contender} {seed}",
        top1=top1,
        images=960,
        validation=[10.0, 50.0, 80.0, 81.0],
        train_loss=[3.0, 2.0, 1.0, 0.5],
        views=None,
        mflops=15.4,
        parameters=1000,
        steps=100,
        images_per_second=200.0,
        environment=ENVIRONMENT,
    )
    return Result(**values | changes)


def results(**accuracies: list[float]) -> dict[str, list[Result]]:
    return {name: [result(name, seed, top1) for seed, top1 in enumerate(each)] for name, each in accuracies.items()}


def plan(*rows: tuple[str, float | None], **about) -> Plan:
    table = Table("one", "Title", [Row(name, f"row {name}", paper) for name, paper in rows], **about)
    return Plan({name: Contender(name, "synthbirds", {}) for name, _ in rows}, {"one": table})


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(90, 1, 5), rng.normal(88, 1, 5)
    gap = difference((results(a=list(one))["a"], results(b=list(other))["b"]))
    test = stats.ttest_rel(one, other)
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose([gap.mean - gap.half, gap.mean + gap.half], [low, high])
    assert (gap.sign != 0) == (test.pvalue < 0.05)


def test_differences_are_paired_by_seed():
    one = [result("a", seed, top1) for seed, top1 in ((0, 90.0), (2, 80.0), (5, 1.0))]
    other = [result("b", seed, top1) for seed, top1 in ((2, 70.0), (0, 85.0), (7, 99.0))]
    gap = difference((one, other))
    assert (gap.mean, gap.seeds) == (7.5, 2)
    assert difference((one, other[2:])) is None
    single = difference((one[:1], other))
    assert single.mean == 5 and single.half is None and single.sign == 0 and single.told(1) == "+5.0 (1 seed)"


def test_of_several_pairs_a_seed_is_one_sample():
    rng = np.random.default_rng(0)
    one, other = rng.normal(90, 1, (2, 4)), rng.normal(88, 1, (2, 4))
    pairs = [(results(a=list(a))["a"], results(b=list(b))["b"]) for a, b in zip(one, other)]
    pairs[1][0].append(result("a", 9, 1.0))  # which the first pair does not have
    gap = difference(*pairs)
    low, high = stats.ttest_rel(one.mean(0), other.mean(0)).confidence_interval(0.95)
    np.testing.assert_allclose([gap.mean - gap.half, gap.mean + gap.half, gap.seeds], [low, high, 4])


def test_a_row_with_fewer_seeds_than_its_table_is_told():
    rows = plan(("a", None), ("b", None), ("c", None), seeds=[0, 1, 2, 3])
    found = results(a=[80.0, 81.0, 80.5, 83.0, 99.0], b=[70.0, 71.0, 71.5], c=[60.0, 61.0, 61.5, 62.5])
    text = report(rows, found)
    assert "| row a (`a`) | 81.1 ± 1.3 | 80.0, 81.0, 80.5, 83.0 |  |" in text, "of seeds that the table has"
    assert "| -9.7 (-11.1 to -8.2, 3 seeds) |" in text and "| -10.0 (-10.0 to -10.0, 3 seeds) |" in text
    (axes,) = (axes for part in evidence_figure(rows, found).subfigs for axes in part.axes)
    assert len(axes.lines[0].get_xdata()) == 4


def test_two_seeds_decide_nothing():
    gap = difference((results(a=[90.0, 91.0])["a"], results(b=[80.0, 81.0])["b"]))
    assert gap.half == 0 and gap.sign == 0 and gap.told(2) == "+10.0 (+10.0 to +10.0, 2 seeds)"


@pytest.mark.parametrize(
    ("upper", "said"),
    [
        ([90.0, 91.0, 90.5], "Seen as in the paper: row b over row a."),
        ([70.0, 71.0, 70.5], "Contradicted: row b over row a."),
        ([80.1, 81.5, 79.0], "Undecided: row b over row a."),
    ],
)
def test_the_paper_s_steps_are_seen_contradicted_or_undecided(upper, said):
    text = report(plan(("a", 84.0), ("b", 85.0)), results(a=[80.0, 81.0, 80.5], b=upper))
    assert said in text and sum(word in text for word in ("Seen as", "Contradicted:", "Undecided:")) == 1


@pytest.mark.parametrize(
    ("accuracies", "word"), [((80.0, 90.0), "Contradicted"), ((90.0, 80.0), "Seen as in the paper")]
)
def test_where_the_paper_s_order_falls_its_better_row_is_named_first(accuracies, word):
    first, second = ([accuracy, accuracy + 1, accuracy] for accuracy in accuracies)
    text = report(plan(("a", 88.1), ("b", 87.9)), results(a=first, b=second))
    assert f"{word}: row a over row b." in text


def test_steps_that_the_paper_does_not_make_are_not_judged():
    text = report(plan(("a", 84.0), ("b", 84.0), ("c", None)), results(a=[1.0, 2.0], b=[3.0, 4.0], c=[5.0, 6.0]))
    assert not any(word in text for word in ("Seen as", "Contradicted:", "Undecided:"))


def test_the_report_has_every_figure():
    views = dict(master_on_structure=80.0, part_on_detail=60.0)
    found = results(a=[80.0, 81.0, 82.0], b=[90.0, 91.0, 92.0])
    found["b"] = [replace(each, views=views) for each in found["b"]]
    text = report(plan(("a", 84.0), ("b", 85.1), ("c", None), views=True, about="Before.", finding="After."), found)
    assert "| row a (`a`) | 84.0 | 81.0 ± 1.0 | 80.0, 81.0, 82.0 |  | 15.4 | +1.0 |" in text
    assert "| row b (`b`) | 85.1 | 91.0 ± 1.0 | 90.0, 91.0, 92.0 | +10.0 (+10.0 to +10.0) | 15.4 | +1.0 |" in text
    assert "| row c (`c`) |  | not run |" in text
    assert "| row b | 80.0 | 60.0 |" in text and "master on structure | part on detail" in text
    assert text.index("Before.") < text.index("| row a") < text.index("After.")
    assert "of 6 runs" in text
    assert "Made by x86_64 cpu AVX2, bf16, torch 2, timm 1, accelerate 1: 6 runs, of commits 0123456789+ (6)." in text
    assert "of the 1 different intervals" in text


def test_all_rows_can_be_compared_with_one():
    accuracies = dict(a=[80.0, 81.0, 82.0], b=[85.0, 86.0, 87.0], c=[90.0, 91.0, 92.0])
    text = report(plan(("a", None), ("b", None), ("c", None), against="c"), results(**accuracies))
    assert "| difference to row c |" in text and "-10.0 (-10.0 to -10.0)" in text and "-5.0 (-5.0 to -5.0)" in text
    assert "| row c (`c`) | 91.0 ± 1.0 | 90.0, 91.0, 92.0 |  |" in text


def test_tuning_shows_the_best_validation_accuracy_of_one_seed():
    found = results(a=[80.0, 81.0, 82.0], b=[90.0])
    found["b"][0].validation = [10.0, 70.0, 60.0]
    tuning = plan(("a", None), ("b", None), tuning=True, seeds=[0])
    text = report(tuning, found)
    assert "| validation top-1, best epoch |" in text
    assert "| row a (`a`) | 81.0 | 15.4 |" in text and "| row b (`b`) | 70.0 | 15.4 |" in text
    assert "of the 0 different intervals" in text
    assert not any(part.axes for part in evidence_figure(tuning, found).subfigs)


@pytest.mark.parametrize(
    ("upper", "mflops", "said"),
    [
        ([82.0, 83.1, 82.4], 8.0, "+2.0 (+1.8 to +2.2) | 3 | 0.80 | met |"),
        ([80.5, 81.4, 80.9], 8.0, "+0.4 (+0.3 to +0.6) | 3 | 0.80 | not met |"),
        ([80.5, 83.5, 81.5], 8.0, "+1.3 (-1.3 to +3.9) | 3 | 0.80 | undecided, by the mean met |"),
        ([80.5, 81.5, 79.5], 8.0, "+0.0 (-2.2 to +2.2) | 3 | 0.80 | undecided, by the mean not met |"),
        ([82.0], 8.0, "+2.0 (1 seed) | 1 | 0.80 | undecided, by the mean met |"),
        ([82.0, 83.1, 82.4], 9.5, "+2.0 (+1.8 to +2.2) | 3 | 0.95 | not met: too dear |"),
    ],
)
def test_targets_are_met_where_the_whole_interval_is_beyond_them(upper, mflops, said):
    found = results(a=[80.0, 81.0, 80.5], b=upper)
    found["a"] = [replace(each, mflops=10.0) for each in found["a"]]
    found["b"] = [replace(each, mflops=mflops) for each in found["b"]]
    target = Target("b a point above a", [("b", "a")], points=1.0, flops=0.9)
    twice = target._replace(target="twice", pairs=2 * target.pairs)
    text = report(plan(("a", None), ("b", None))._replace(targets=[target, twice]), found)
    assert f"| b a point above a | `b`, `a` | {said}" in text and f"| twice | `b`, `a`; `b`, `a` | {said}" in text


def test_the_intervals_of_targets_are_counted_once():
    found = results(a=[80.0, 81.0, 80.5], b=[82.0, 83.1, 82.4], c=[83.0, 83.0, 83.0])
    targets = [Target("in the table", [("b", "a")]), Target("not there", [("c", "a")])]
    text = report(plan(("a", None), ("b", None), ("c", None))._replace(targets=targets), found)
    assert "of the 3 different intervals" in text


def test_a_target_that_has_not_been_run_is_left_out():
    targeted = plan(("a", None), ("b", None), ("c", None))._replace(targets=[Target("c above a", [("c", "a")])])
    assert "Targets" not in report(targeted, results(a=[80.0], b=[81.0]))


def test_tables_of_fewer_than_two_rows_that_were_run_are_left_out():
    both = plan(("a", 84.0), ("b", 85.0))
    both.tables["two"] = Table("two", "Other", [Row("a", "row a"), Row("c", "row c")])
    text = report(both, results(a=[80.0], b=[81.0]))
    assert "## Title" in text and "Other" not in text


def test_the_figure_has_a_dot_for_each_run_and_the_mean():
    figure = evidence_figure(plan(("a", 84.0), ("b", 85.0), ("c", None)), results(a=[80.0, 82.0], b=[90.0]))
    (axes,) = (axes for part in figure.subfigs for axes in part.axes)
    drawn = [(list(line.get_xdata()), line.get_marker()) for line in axes.lines]
    assert drawn == [([80.0, 82.0], "o"), ([81.0, 81.0], "None"), ([90.0], "o"), ([90.0, 90.0], "None")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["row a", "row b"]


def test_results_come_back(tmp_path):
    for each in (result("a", 1, 80.0), result("a", 0, 79.0), result("b", 0, 90.0, views=dict(x=1.0))):
        write_result(tmp_path, each)
    (tmp_path / "RESULTS.md").write_text("beside them")
    back = read_results(tmp_path)
    assert [each.seed for each in back["a"]] == [0, 1]
    assert back["b"] == [result("b", 0, 90.0, views=dict(x=1.0))]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps(dict(contender="a"))])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "a.seed0.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.seed0\.json.*remove it"):
        read_results(tmp_path)


def test_every_contender_of_the_package_is_a_recipe_that_makes_a_model(tmp_path):
    ours = read_plan()
    made = {}
    for contender in ours.contenders.values():
        for seed in (0, 2):
            recipe = contender.recipe_of(seed)
            assert recipe.seed == seed and recipe.compare is None
            assert recipe.train_split in synthbirds.VARIANTS[recipe.data].splits
        made[str((recipe.model, recipe.model_kwargs))] = recipe
    assert {row.contender for table in ours.tables.values() for row in table.rows} | {"other"} == set(ours.contenders)
    for recipe in made.values():
        timm.create_model(recipe.model, num_classes=24, **recipe.model_kwargs)


def test_the_command_s_examples_name_tables():
    tables = re.findall(r"reproduce ([a-z_0-9 ]+)", EXAMPLES)
    assert tables and {name for each in tables for name in each.split()} <= set(read_plan().tables)


def test_no_two_contenders_are_the_same():
    contenders = [contender[1:] for contender in read_plan().contenders.values()]
    assert all(contenders.count(each) == 1 for each in contenders)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contenders: {a: {recipe: synthbirds}}", "no plan of contenders and tables"),
        ("contenders: {a: {}}\ntables: {}", "no plan of contenders and tables .*recipe"),
        ("[1]", "no plan"),
        (
            "contenders: {abc: {recipe: synthbirds}}\ntables: {one: {title: x, rows: [{contender: abd, row: x}]}}",
            "unknown contender in plan.yaml: 'abd': did you mean 'abc'",
        ),
        (
            "contenders: {abc: {recipe: synthbirds}}\ntables: {}\ntargets: [{target: x, pairs: [[abc, abd]]}]",
            "unknown contender in plan.yaml: 'abd': did you mean 'abc'",
        ),
        ("contenders: {abc: {recipe: synthbirds, start: abd}}\ntables: {}", "unknown contender.*'abd'"),
        ("contenders: {a: {recipe: synthbirds, start: a}}\ntables: {}", "'a' in plan.yaml is the start of another"),
        ("contenders: {a: {recipe: synthbirds, seed: 3}}\ntables: {}", "contender 'a' cannot set seed"),
        *(
            (
                f"contenders: {{a: {{recipe: synthbirds}}}}\ntables: {{one: {{title: x, rows: [], seeds: {seeds}}}}}",
                "seeds of table 'one' must be different whole numbers, such as .0, 1, 2., got",
            )
            for seeds in ("5", "'012'", "[a]", "[0, 0]", "[-1]", "[]", "[true]")
        ),
    ],
)
def test_damaged_plans_are_refused(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_result_of_other_options_is_not_a_contender_s():
    contender = Contender("a", "synthbirds", dict(train_split="train_{seed}"))
    options = what_counts(contender.recipe_of(1))
    assert options["train_split"] == "train_1"
    mine = result("a", 1, 80.0, options=options)
    assert contender.made(mine, None)
    assert not contender.made(replace(mine, options=options | dict(train_split="train_0")), None)
    assert not contender.made(replace(mine, options=options | dict(lr=1.0)), None)  # of the recipe itself
    assert not contender.made(replace(mine, recipe="synthbirds_lite"), None)


def test_an_option_that_is_newer_than_a_result_has_its_default():
    contender = Contender("a", "synthbirds", {})
    options = what_counts(contender.recipe_of(0))
    without = {name: value for name, value in options.items() if name != "reprob"}
    assert contender.made(result("a", 0, 80.0, options=without), None)
    assert not Contender("a", "synthbirds", dict(reprob=0.1)).made(result("a", 0, 80.0, options=without), None)


def test_a_result_from_another_start_is_not_a_contender_s():
    contender = Contender("a", "synthbirds", {}, start="b")
    mine = result("a", 0, 80.0, start="b", start_weights="these")
    assert contender.made(mine, "these") and not contender.made(mine, "others")


def test_a_contender_needs_its_splits():
    with pytest.raises(ValueError, match="contender 'a' needs a validation and a test split"):
        Contender("a", "cub200_resnet50_224", {}).recipe_of(0)


def test_a_copied_result_is_refused(tmp_path):
    write_result(tmp_path, result("a", 0, 80.0))
    (tmp_path / "a.seed1.json").write_text((tmp_path / "a.seed0.json").read_text())
    with pytest.raises(ValueError, match=r"a\.seed1\.json' is a copy"):
        read_results(tmp_path)


def test_the_report_in_the_repository_is_that_of_its_results():
    folder = Path(__file__).parents[1] / "hub_configs/results"
    assert (folder / "RESULTS.md").read_text() == report(read_plan(), read_results(folder))
