"""Recipes: every file loads, unknown and ill-typed options are refused, the command line overrides."""

import dataclasses

import pytest
import timm
import yaml

from tasn_timm.recipe import RECIPES, Recipe, load_recipe, parse_args, save_recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_model_builds(path):
    recipe = load_recipe(path.stem)
    assert timm.create_model(recipe.model, num_classes=3, **recipe.model_kwargs).num_classes == 3
    if recipe.compare:
        load_recipe(recipe.compare)


def test_a_comparison_differs_in_the_model_and_its_input_only():
    first, second = load_recipe("synthbirds"), load_recipe("synthbirds_plain")
    different = {
        field.name for field in dataclasses.fields(Recipe) if getattr(first, field.name) != getattr(second, field.name)
    }
    assert different == {"model", "model_kwargs", "img_size", "crop_padding", "compare"}
    assert first.crop_padding / first.img_size == second.crop_padding / second.img_size


def test_a_saved_recipe_loads_as_the_same(tmp_path):
    recipe = load_recipe("synthbirds", dict(lr=1e-5, model_kwargs=dict(heads="shared")))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_the_command_line_overrides_the_file():
    arguments = "--recipe synthbirds_plain --epochs 3 --lr 4e-3 --val-split null --no-channels-last --batch_size 8"
    name, recipe = parse_args([*arguments.split(), "--model-kwargs", "stem_width=16"])
    assert name == "synthbirds_plain"
    assert (recipe.epochs, recipe.lr, recipe.val_split, recipe.channels_last, recipe.batch_size) == (
        3,
        4e-3,
        None,
        False,
        8,
    )
    assert recipe.model_kwargs == {"channels": [24, 48, 72, 96], "stem_width": 16}, "the other keys stay"


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(Recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(leraning_rate=1), "'leraning_rate'"),
        (dict(epoch=1), "did you mean 'epochs'"),
        (dict(epochs="many"), "epochs must be int, got 'many'"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(lr="fast"), "lr must be float, got 'fast'"),
        (dict(cpu="yes please"), "cpu must be bool"),
        (dict(hflip=2), "hflip must be between 0 and 1"),
        (dict(mixed_precision="bf61"), "did you mean 'bf16'"),
        (dict(resize=100, img_size=192), "resize .100. must be at least img_size .192."),
        (dict(model_kwargs=[1]), "model_kwargs must be dict"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "hello", "a:\tb: [", ""])
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml' (cannot be read|must have lines)") as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def test_only_another_model_drops_the_files_model_kwargs():
    assert load_recipe("synthbirds_plain", dict(model="resnet10t")).model_kwargs["stem_width"] == 12
    assert load_recipe("synthbirds_plain", dict(model="resnet18")).model_kwargs == {}


def test_names_on_the_command_line_are_text():
    _, recipe = parse_args(["--data", "2024", "--train-split", "no", "--val-split", "null"])
    assert (recipe.data, recipe.train_split, recipe.val_split) == ("2024", "no", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "synthbird"], "did you mean 'synthbirds'"),
        (["--recipe", "nowhere/mine.yaml"], "no recipe file 'nowhere/mine.yaml'"),
        (["--epoch", "3"], "did you mean '--epochs'"),
        (["--learning-rate", "3"], "unknown argument '--learning-rate'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_args(arguments)


def test_yaml_no_and_numbers_as_text_mean_what_people_mean(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mixed_precision: no\nlr: 4e-3\nweight_decay: 0\n")
    recipe = load_recipe(str(path))
    assert (recipe.mixed_precision, recipe.lr, recipe.weight_decay) == ("no", 0.004, 0.0)
