"""Recipes: every file loads, unknown and ill-typed options are refused, the command line overrides."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2

from tasn_timm.errors import UserError
from tasn_timm.recipe import BASES, RECIPES, PaperRow, Recipe, load_recipe, parse_args, read_recipe_file, save_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    if recipe.compare:
        load_recipe(recipe.compare)


@pytest.mark.parametrize("name", ["synthbirds", "synthbirds_plain"])
def test_the_models_of_the_embedded_dataset_build(name):
    recipe = load_recipe(name)
    assert timm.create_model(recipe.model, num_classes=3, **recipe.model_kwargs).num_classes == 3


def test_every_base_has_a_recipe():
    used = {read_recipe_file(path).base for path in RECIPES.glob("**/*.yaml")}
    assert {path.stem for path in BASES.glob("*.yaml")} <= used


def test_the_published_training_reaches_the_recipes():
    recipe = load_recipe("cub200_resnet50_336")
    assert recipe.model_kwargs == dict(sample_size=336) and recipe.detach_teacher is False
    assert (recipe.data, recipe.num_classes, recipe.val_split, recipe.pca_noise) == ("cub200", 200, None, 0.1)
    assert (recipe.opt, recipe.momentum, recipe.weight_decay, recipe.lr) == ("momentum", 0, 0, 0.1)
    (parameter,) = torch.nn.Linear(1, 1, bias=False).parameters()
    optimizer = create_optimizer_v2([parameter], recipe.opt, recipe.lr, recipe.weight_decay, recipe.momentum)
    before = parameter.item()
    for _ in range(2):
        parameter.grad = torch.ones(1, 1)
        optimizer.step()
    assert parameter.item() == pytest.approx(before - 0.2), "plain gradient descent"


def test_the_readmes_commands_are_accepted(tmp_path, monkeypatch):
    text = Path(__file__).parents[1].joinpath("README.md").read_text().replace("\\\n", " ")
    ((name, content),) = re.findall(r"^cat > (\S+) <<END\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("accelerate launch")]
    started = [parse_args(shlex.split(command.partition("train_accelerate.py")[2]))[:2] for command in commands]
    recipe = dict(started)["mine"]
    modern = load_recipe(
        "cub200_resnet50_modern", dict(data="photos/", num_classes=None, val_split="validation", workers=8)
    )
    assert recipe == modern


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
    name, recipe, _ = parse_args([*arguments.split(), "--model-kwargs", "stem_width=16"])
    assert name == "synthbirds_plain"
    assert (recipe.epochs, recipe.lr, recipe.val_split, recipe.channels_last, recipe.batch_size) == (
        3,
        4e-3,
        None,
        False,
        8,
    )
    assert recipe.model_kwargs == {"channels": [24, 48, 72, 96], "stem_width": 16}, "the other keys stay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "[1"], "argument --epochs: cannot be read from '[1': write it as in a recipe: see "),
        (["--lr"], "argument --lr: expected one argument: see "),
    ],
)
def test_mistakes_of_the_command_line_get_one_line(capsys, arguments, message):
    with pytest.raises(UserError) as raised:
        parse_args(arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value) and not capsys.readouterr().err


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
        (dict(epochs="many"), "epochs must be a whole number, got 'many'"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(seed=-1), "seed must be 0 to 4294967295, got -1"),
        (dict(warmup_epochs=-1), "warmup_epochs must be 0 or more, got -1"),
        (dict(temperature=0), "temperature must be more than 0, got 0"),
        (dict(lr="fast"), "lr must be a number, got 'fast'"),
        (dict(cpu="yes please"), "cpu must be true or false"),
        (dict(hflip=2), "hflip must be between 0 and 1"),
        (dict(mixed_precision="bf61"), "did you mean 'bf16'"),
        (dict(resize=100, img_size=192), "resize .100. must be at least img_size .192."),
        (dict(model_kwargs=[1]), "model_kwargs must be .key: value."),
        (dict(pca_noise=-0.1), "pca_noise must be 0 or more, got -0.1"),
        (dict(layer_decay=1), "layer_decay must be more than 0 and less than 1, got 1.0"),
        (dict(model_ema_decay=0), "model_ema_decay must be more than 0 and less than 1, got 0.0; null: none"),
        (dict(master_weight=1.5), "master_weight must be between 0 and 1, got 1.5"),
        (dict(shared_part_weight=-1), "shared_part_weight must be 0 or more"),
        (
            dict(sched="multistep", decay_milestones=[1], min_lr=0),
            "min_lr=0.0 has no effect with sched='multistep': leave out one of them .*min_lr=4e-05",
        ),
        (dict(sched="poly"), "unknown sched in recipe: 'poly'"),
        (dict(sched="multistep", decay_milestones=[1], decay_rate=-1), "decay_rate must be more than 0"),
        (dict(opt="adahessian"), "opt adahessian needs second derivatives"),
        (dict(clip_grad=0), "clip_grad must be more than 0, got 0.0; null: no clipping"),
        (dict(overfit_batches=1, decoder="simplejpeg"), "decoder='simplejpeg' has no effect with overfit_batches"),
        *(
            (
                dict(sched="multistep", decay_milestones=milestones),
                "decay_milestones must be numbers of epochs in ascending order, got",
            )
            for milestones in (["1e2"], [2, 1], [1, 1], [-1], [True])
        ),
        (dict(sched="cosine", decay_rate=0.5), "decay_rate=0.5 has no effect with sched='cosine'"),
        (dict(warmup_epochs=0, warmup_lr=0), "warmup_lr=0.0 has no effect with warmup_epochs=0.0"),
        (dict(opt="adamw", momentum=0), "momentum=0.0 has no effect with opt='adamw'"),
        (dict(base="cub20"), "unknown base in recipe 'mine.yaml': 'cub20': did you mean 'cub200'"),
        (dict(base=3), "base must be the name of a recipe, got 3"),
        (dict(base="nowhere.yaml"), "no recipe file '.*nowhere.yaml'"),
        (dict(base="mine.yaml"), "'mine.yaml' is its own base: mine.yaml -> mine.yaml"),
        (dict(measured=[1]), "measured must be a number or text, got .1."),
        (dict(paper="Table 2"), "paper must be a list of rows, got 'Table 2'"),
        (dict(paper=["Table 2"]), "a row of paper must be {table: ..., row: ..., top1: ...}, got 'Table 2'"),
        (dict(paper=[dict(table=2)]), "a row of paper must be"),
        (dict(paper=[dict(table=4.2, row="a")]), "table must be a whole number or text such as '4.2', got 4.2"),
        (dict(paper=[dict(table=2, row="a", top1="high")]), "top1 must be a number, got 'high'"),
        (dict(paper=[dict(table=2, row="a", top5=90)]), "row of paper: 'top5': did you mean 'top1'"),
        (dict(paper=[dict(table=2, row="a", ensemble=0)]), "ensemble must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def write(path: Path, **options) -> str:
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_a_recipe_takes_the_place_of_its_bases(tmp_path):
    write(tmp_path / "first.yaml", model="resnet18", model_kwargs=dict(drop_rate=0.1, in_chans=3), lr=1.0, epochs=30)
    write(tmp_path / "second.yaml", base="first.yaml", model_kwargs=dict(drop_rate=0.2), lr=2.0)
    third = write(tmp_path / "third.yaml", base="second.yaml", lr=3.0, measured=91.7)
    recipe = load_recipe(third)
    assert (recipe.model, recipe.lr, recipe.epochs) == ("resnet18", 3.0, 30)
    assert recipe.model_kwargs == dict(drop_rate=0.2, in_chans=3)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert read_recipe_file(tmp_path / "saved.yaml") == (dataclasses.asdict(recipe), None, [], None), "all resolved"
    other = write(tmp_path / "other.yaml", base="second.yaml", model="resnet34")
    assert load_recipe(other).model_kwargs == {}


def test_bases_are_the_packages_or_files(tmp_path):
    assert load_recipe(write(tmp_path / "mine.yaml", base="published", lr=0.2)).epochs == 300
    assert load_recipe(write(tmp_path / "mine.yaml", base="synthbirds", lr=0.2)).epochs == 16


def test_a_cycle_of_bases_is_refused(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    path = write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(ValueError, match="'b.yaml' is its own base: b.yaml -> a.yaml -> b.yaml"):
        load_recipe(path)


def test_what_loses_its_effect_is_dropped_unless_it_is_asked_for(tmp_path):
    path = write(tmp_path / "mine.yaml", min_lr=1.0, warmup_lr=2.0, opt="nesterov", momentum=0.5)
    recipe = load_recipe(path, dict(sched="multistep", decay_milestones=[3], warmup_epochs=0, opt="adamw"))
    default = Recipe()
    assert (recipe.min_lr, recipe.warmup_lr, recipe.momentum) == (default.min_lr, default.warmup_lr, default.momentum)
    assert load_recipe("cub200_resnet50_224", dict(sched="cosine")).decay_milestones == []
    with pytest.raises(ValueError, match="momentum=0.4 has no effect with opt='adamw'"):
        load_recipe(path, dict(opt="adamw", momentum=0.4))


def test_what_is_not_an_option_is_read_with_its_types(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'measured: "91.7, 8 GPUs"\npaper:\n  - {table: 6, row: a, top1: 87, ensemble: 3}\n'
        '  - {table: "4.2", row: b, flip: true}\n'
    )
    file = read_recipe_file(path)
    assert file.paper == [PaperRow(6, "a", 87.0, ensemble=3), PaperRow("4.2", "b", None, flip=True)]
    assert (file.options, file.measured) == ({}, "91.7, 8 GPUs")
    assert load_recipe(str(path)) == Recipe()


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
    uniform = "cub200_resnet50_224_uniform"
    with pytest.raises(ValueError, match=r"'tasn_resnet101' takes the place of 'tasn_resnet50'.*'uniform'"):
        load_recipe(uniform, dict(model="tasn_resnet101"))
    other = load_recipe(uniform, dict(model="tasn_resnet101", model_kwargs=dict(sampler="saliency")))
    assert other.model_kwargs == dict(sampler="saliency")


def test_names_on_the_command_line_are_text():
    _, recipe, _ = parse_args(["--data", "2024", "--train-split", "no", "--val-split", "null"])
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
