"""hub_configs/: strictly read, one file for every checkpoint of the paper, each the model that its recipe trains."""

import dataclasses
import hashlib
import inspect
import json

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import _registry

from tasn_timm.attention_net import AttentionNet, attention_layout
from tasn_timm.data import synthbirds
from tasn_timm.hub_config import HUB_CONFIGS, HubConfig, Training
from tasn_timm.recipe import load_recipe
from tasn_timm.recipe_cards import recipe_cards
from tasn_timm.tasn import TASN
from tasn_timm.training.build import build_model, crop_share
from tasn_timm.zoo import CONFIGS, _default_cfgs, default_cfg

SHIPPED = "tasn_tiny.synthbirds"
STARTS = [
    *(f"tasn_{name}.in1k" for name in "resnet18 resnet50 resnet101 vgg19 vgg19_bn convnext_tiny".split()),
    *(f"tasn_lite_{name}.in1k" for name in "resnet50 resnet101 convnext_tiny".split()),
]
CHECKPOINTS = [
    *(f"tasn_resnet50.cub200_{size}" for size in (224, 280, 336, 392)),
    "tasn_resnet50.cub200_336_isqrt",
    "tasn_resnet50.cars196_336",
    "tasn_vgg19.cub200_336",
    "tasn_vgg19.cars196_336",
    "tasn_resnet101.inat2017_224",
]
TRAINED = [SHIPPED, *CHECKPOINTS]
ON_HUB = [name for name in CHECKPOINTS if CONFIGS[name].tasn.repo_id]
UNPUBLISHED = [name for name in CHECKPOINTS if name not in ON_HUB]
COMMIT, SHA256 = "0" * 40, "a" * 64
TASN_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(TASN).parameters.items()}
NET_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(AttentionNet).parameters.items()}
PUBLISHED = dict(repo_id="me/birds", commit=COMMIT, sha256=SHA256)


def plain(value):
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def create(name: str, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def arguments_of(model: TASN) -> dict:
    """Every argument of a model but num_classes, with its attention net's layout instead of what leads to it."""
    arguments = TASN_DEFAULTS | model._model_args
    layout = attention_layout(*(arguments.pop(f"attention_{name}") for name in ("net", "backbone", "args")))
    return plain(arguments | dict(num_classes=None, attention=NET_DEFAULTS | layout))


# Files


def test_there_is_a_file_for_every_checkpoint_and_no_other():
    assert set(CONFIGS) == {*STARTS, *TRAINED} == {path.stem for path in HUB_CONFIGS.glob("*.json")}
    assert [path.stem for path in HUB_CONFIGS.glob("*.safetensors")] == [SHIPPED]


def test_every_single_tasn_of_the_papers_comparisons_has_its_file():
    """Tables 2 and 3 and the text compare formulas and samplers; the best of them is in Table 4, too."""
    rows = [(card.name, row) for card in recipe_cards() for row in card.paper if isinstance(row.table, int)]
    expected = {name for name, row in rows if row.table > 3 and "TASN" in row.row and row.ensemble == 1}
    assert {CONFIGS[name].tasn.recipe for name in CHECKPOINTS} == expected
    assert next(name for name, row in rows if row.row == "our sampler, TASN") in expected


@pytest.mark.parametrize("path", sorted(HUB_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_is_written_as_it_was_read(path, tmp_path):
    config = HubConfig.read(path)
    assert config.name == path.stem
    config.write(tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_keys_are_in_a_fixed_order(tmp_path):
    path = tmp_path / f"{SHIPPED}.json"
    content = json.loads((HUB_CONFIGS / path.name).read_text())
    content = dict(reversed(content.items())) | dict(tasn=dict(reversed(content["tasn"].items())))
    path.write_text(json.dumps(content))
    HubConfig.read(path).write(path)
    assert path.read_bytes() == (HUB_CONFIGS / path.name).read_bytes()


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ((), dict(archtecture="x"), "unknown key in {file}: 'archtecture': did you mean 'architecture'?"),
        ((), dict(tag=...), "{file} has no 'tag': it needs architecture, tag, num_classes, model_args,"),
        ((), dict(tasn=...), "{file} has no 'tasn': it needs"),
        ((), dict(architecture="tasn_resnet50"), "{file}: architecture 'tasn_resnet50' and tag 'synthbirds' must be"),
        ((), dict(tag="birds"), "{file}: architecture 'tasn_tiny' and tag 'birds' must be those of the file name"),
        ((), dict(num_classes="24"), "{file}: num_classes must be a whole number, got '24'."),
        ((), dict(num_classes=True), "{file}: num_classes must be a whole number, got True."),
        ((), dict(num_classes=0), "{file}: num_classes must be at least 1, got 0."),
        ((), dict(model_args=None), "{file}: model_args must be {{key: value}}, got None."),
        ((), dict(tasn=[]), "{file}: tasn must be {{key: value}}, got []."),
        (("tasn",), dict(recip="x"), "unknown key in tasn block of {file}: 'recip': did you mean 'recipe'?"),
        (("tasn",), dict(sha256=...), "tasn block of {file} has no 'sha256': it needs recipe, dataset,"),
        (("tasn",), dict(recipe=3), "tasn block of {file}: recipe must be text or null, got 3."),
        (("tasn",), dict(paper_top1="87"), "tasn block of {file}: paper_top1 must be a number or null, got '87'."),
        (("tasn",), dict(measured_top1=870), "measured_top1 must be per cent, 0 to 100, or null, got 870."),
        (("tasn",), dict(measured_top1=float("nan")), "measured_top1 must be per cent, 0 to 100, or null, got nan."),
        (("tasn",), PUBLISHED | dict(commit="main"), "commit must be 40 hex digits or null, got 'main'."),
        (("tasn",), PUBLISHED | dict(commit="0" * 39), "commit must be 40 hex digits or null, got '000"),
        (("tasn",), dict(sha256="z" * 64), "sha256 must be 64 hex digits or null, got 'zzz"),
        (("tasn",), dict(sha256="a" * 65), "sha256 must be 64 hex digits or null, got 'aaa"),
        (("tasn",), PUBLISHED | dict(repo_id="birds"), "repo_id must be USER/NAME or null, got 'birds'."),
        (("tasn",), PUBLISHED | dict(repo_id="me/birds@main"), "repo_id must be USER/NAME or null, got 'me/birds@main"),
        (("tasn",), PUBLISHED | dict(commit=None), "{file}: repo_id needs commit, too: give all three, or null"),
        (("tasn",), PUBLISHED | dict(sha256=None), "{file}: repo_id needs sha256, too: give all three, or null"),
        (("tasn",), dict(commit=COMMIT), "{file}: commit is one of repo_id's, which is null: give both or neither."),
        (("pretrained_cfg",), dict(mena=[0]), "unknown key in pretrained_cfg of {file}: 'mena': did you mean 'mean'"),
        (("pretrained_cfg",), dict(tag="x"), "unknown key in pretrained_cfg of {file}: 'tag'"),
        (("pretrained_cfg",), dict(std=...), "pretrained_cfg of {file} has no 'std': it needs input_size, crop_pct,"),
        (("pretrained_cfg",), dict(crop_pct="1"), "pretrained_cfg of {file}: crop_pct must be a number, got '1'."),
        (("pretrained_cfg",), dict(label_names=["wren"]), "label_names must be a list of as many names as num_classes"),
    ],
)
def test_what_a_file_must_not_say(tmp_path, where, change, message):
    path = tmp_path / f"{SHIPPED}.json"
    content = json.loads((HUB_CONFIGS / path.name).read_text())
    part = content
    for key in where:
        part = part[key]
    part |= change
    for key, value in change.items():
        if value is ...:
            del part[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
        HubConfig.read(path)
    assert message.format(file=path.name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / f"{SHIPPED}.json"
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read: .*No such file"):
        HubConfig.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"^{path.name} cannot be read: Expecting property name [^\n]*$"):
        HubConfig.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{path.name} must be {{key: value}}, got \[\].$"):
        HubConfig.read(path)


def test_nothing_is_written_that_would_not_be_read(tmp_path):
    config = dataclasses.replace(CONFIGS[SHIPPED], tasn=Training(repo_id="me/birds"))
    with pytest.raises(ValueError, match="repo_id needs commit and sha256, too"):
        config.write(tmp_path / f"{SHIPPED}.json")
    with pytest.raises(ValueError, match="must be those of the file name"):
        CONFIGS[SHIPPED].write(tmp_path / "tasn_tiny.other.json")
    assert not list(tmp_path.iterdir())


# Models


@pytest.mark.parametrize("name", TRAINED)
def test_a_tag_is_the_model_that_its_recipe_trains(name):
    config = CONFIGS[name]
    recipe = load_recipe(config.tasn.recipe, dict(pretrained=False))
    assert (recipe.data, recipe.model) == (config.tasn.dataset, config.architecture)
    assert recipe.num_classes in (config.num_classes, None)
    with torch.device("meta"):
        trained = build_model(recipe, config.num_classes)
    model = create(name)
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (trained, model)]
    assert shapes[0] == shapes[1]
    assert repr(trained) == repr(model)
    assert arguments_of(trained) == arguments_of(model)
    expected = resolve_model_data_config(trained) | dict(  # as in train_accelerate.py
        input_size=(3, recipe.img_size, recipe.img_size),
        interpolation="bicubic",
        crop_pct=crop_share(recipe.img_size, recipe.resize or recipe.img_size),
    )
    assert resolve_model_data_config(model) == expected
    assert str(create_transform(**resolve_model_data_config(model))) == str(create_transform(**expected))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_figure_is_the_papers_for_one_model(name):
    (card,) = [card for card in recipe_cards() if card.name == CONFIGS[name].tasn.recipe]
    assert {row.top1 for row in card.paper if row.ensemble == 1} == {CONFIGS[name].tasn.paper_top1}
    assert name in ON_HUB or CONFIGS[name].tasn.measured_top1 is None, "nobody has trained it"


def test_what_a_tag_says_of_the_model_goes_into_its_config():
    """timm notes only what it was given; a model trained from a tag has to be built again from its own folder."""
    arguments = create("tasn_resnet50.cub200_336_isqrt")._model_args
    assert arguments["global_pool"] == "isqrt_cov" and arguments["backbone_args"] == dict(output_stride=16)
    assert create("tasn_tiny")._model_args["attention_args"] == CONFIGS[SHIPPED].model_args["attention_args"]
    chosen = create("tasn_resnet50.cub200_336_isqrt", backbone_args=dict(output_stride=8))
    assert chosen._model_args["backbone_args"] == dict(output_stride=8)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(model_name="tasn_resnet50.cub200_280"),
        dict(model_name="tasn_resnet50", pretrained_cfg="cub200_280"),
        dict(model_name="tasn_resnet50", pretrained_cfg=timm.models.get_pretrained_cfg("tasn_resnet50.cub200_280")),
        timm.models.resolve_model_input_args("tasn_resnet50.cub200_280"),  # of timm's scripts
    ],
    ids=["name", "pretrained_cfg", "cfg", "timm's scripts"],
)
def test_the_arguments_of_a_tag_apply_however_it_is_named(arguments):
    with torch.device("meta"):
        model = timm.create_model(**arguments)
    assert (model.sample_size, model.num_classes) == ((280, 280), 200)
    assert model.pretrained_cfg["tag"] == "cub200_280"


def test_arguments_that_are_given_win():
    model = create("tasn_resnet50.cub200_280", sample_size=128, num_classes=3)
    assert (model.sample_size, model.num_classes) == ((128, 128), 3)
    model = create("tasn_resnet50.cub200_336_isqrt", global_pool="avg", backbone_args={})
    assert isinstance(model.pool, torch.nn.Identity) and model.feature_info[-1]["reduction"] == 32
    assert create("tasn_tiny", relation_scale=5.0).trilinear_attention.relation_scale == 5.0
    assert CONFIGS[SHIPPED].model_args["relation_scale"] == 10.0


@pytest.mark.parametrize(
    "arguments",
    [
        dict(attention_net="lite"),
        dict(attention_backbone="test_resnet"),
        dict(attention_args=dict(backbone="test_resnet", channels=8, out_indices=(1, 2))),
        dict(part_net=False),
        dict(global_pool="isqrt_cov", pool_args=dict(channels=8)),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_depends_on_another_argument_goes_with_it(arguments):
    """The shipped checkpoint's arguments are complete; a layout, say, is none for another attention net."""
    cfg = {key: value for key, value in default_cfg(CONFIGS[SHIPPED]).items() if key not in ("tag", "file")}
    expected = create("tasn_tiny", pretrained_cfg=cfg, **arguments)  # without a tag
    assert repr(create("tasn_tiny", **arguments)) == repr(expected)


def test_another_attention_net_gets_pictures_normalised_for_itself(monkeypatch):
    config = CONFIGS[SHIPPED]
    affine = [[2.0] * 3, [0.0] * 3]  # of the published net's own backbone, as `publish` notes it
    published = dataclasses.replace(config, model_args=config.model_args | dict(attention_affine=affine))
    monkeypatch.setitem(CONFIGS, SHIPPED, published)
    assert create("tasn_tiny").attention_net.input_affine == affine
    # Whose mean and standard deviation are those of the pictures.
    assert create("tasn_tiny", attention_backbone="resnet18.a1_in1k").attention_net.input_affine is None


def test_the_shipped_checkpoint_depends_on_no_default():
    config, defaults = CONFIGS[SHIPPED].model_args, TASN_DEFAULTS
    elsewhere = {"num_classes", "in_chans", "device", "dtype"}  # the file's own, or pretrained_cfg's
    assert set(config) == set(defaults) - elsewhere - {"backbone"}  # the architecture's
    layout = inspect.signature(AttentionNet).parameters.keys() - elsewhere - {"input_affine"}
    assert set(config["attention_args"]) == layout
    # Made from what the model is without the file:
    entry = {key: value for key, value in default_cfg(CONFIGS[SHIPPED]).items() if key not in ("tag", "file")}
    model = create("tasn_tiny", pretrained_cfg=entry)
    known = defaults | model._model_args
    assert {key: value for key, value in config.items() if key != "attention_args"} == {
        key: plain(known[key]) for key in config if key != "attention_args"
    }
    assert config["attention_args"] == {key: plain((NET_DEFAULTS | attention_layout("tiny"))[key]) for key in layout}


def test_a_later_preset_does_not_change_the_shipped_checkpoint(monkeypatch):
    before = repr(create("tasn_tiny"))
    monkeypatch.setitem(
        attention_layout.__globals__["PRESETS"], "tiny", dict(backbone="resnet10t", input_size=64, separable_tail=True)
    )
    assert repr(create("tasn_tiny")) == before


# Weights


@pytest.mark.parametrize("name", UNPUBLISHED)
@pytest.mark.parametrize("how", ["name", "pretrained_cfg"])
def test_unpublished_weights_are_refused_before_anything_is_built(no_network, monkeypatch, name, how):
    monkeypatch.setattr("tasn_timm.zoo._build", lambda *args, **kwargs: pytest.fail("built"))
    architecture, tag = name.split(".")
    arguments = dict(model_name=name) if how == "name" else dict(model_name=architecture, pretrained_cfg=tag)
    recipe = CONFIGS[name].tasn.recipe
    with pytest.raises(ValueError) as raised:
        timm.create_model(pretrained=True, **arguments)
    assert str(raised.value) == (
        f"nobody has published weights for {name}. Recipe {recipe} makes them: `accelerate launch train_accelerate.py "
        f"--recipe {recipe}`, then `python -m tasn_timm publish runs/{recipe} --repo USER/{recipe}`. {architecture} "
        f"with pretrained=True starts from ImageNet weights."
    )


def test_an_overlay_brings_weights_to_an_unpublished_tag(monkeypatch, tmp_path):
    monkeypatch.setitem(CONFIGS, "tasn_tiny.mine", dataclasses.replace(CONFIGS[SHIPPED], tag="mine"))
    source = timm.create_model("tasn_tiny", pretrained=True)
    cfg = dataclasses.replace(timm.models.get_pretrained_cfg("tasn_tiny"), tag="mine", file=None)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "tasn_tiny.mine", cfg)
    with pytest.raises(ValueError, match="nobody has published weights for tasn_tiny.mine"):
        timm.create_model("tasn_tiny.mine", pretrained=True)
    overlay = dict(file=str(HUB_CONFIGS / f"{SHIPPED}.safetensors"))
    model = timm.create_model("tasn_tiny.mine", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.heads.shared.weight, source.heads.shared.weight)


def test_published_weights_come_from_their_commit(hub_cache, no_network, monkeypatch):
    torch.manual_seed(0)
    source = timm.create_model("tasn_tiny", num_classes=3, relation_scale=5.0)
    cache = hub_cache("birds", source)
    (weights,) = cache.glob("models--timm--birds/snapshots/*/model.safetensors")
    published = dict(
        repo_id="timm/birds", commit=weights.parent.name, sha256=hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    config = HubConfig(
        "tasn_tiny",
        "mine",
        num_classes=3,
        model_args=CONFIGS[SHIPPED].model_args | dict(relation_scale=5.0),
        pretrained_cfg={key: value for key, value in CONFIGS[SHIPPED].pretrained_cfg.items() if key != "label_names"},
        tasn=Training(**published),
    )
    cfgs = _default_cfgs([config, *CONFIGS.values()])["tasn_tiny"]
    assert cfgs.default_with_tag[0] == "synthbirds" and cfgs.cfgs["mine"].hf_hub_id == f"timm/birds@{'0' * 40}"
    monkeypatch.setitem(CONFIGS, config.name, config)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, config.name, cfgs.cfgs["mine"])
    model = timm.create_model("tasn_tiny.mine", pretrained=True, cache_dir=cache)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.trilinear_attention.relation_scale == 5.0


def test_default_tags_stay_when_others_are_published():
    configs = [
        dataclasses.replace(config, tasn=dataclasses.replace(config.tasn, **PUBLISHED))
        if name in CHECKPOINTS
        else config
        for name, config in CONFIGS.items()
    ]
    for cfgs in (_default_cfgs(CONFIGS.values()), _default_cfgs(configs)):
        defaults = {architecture: cfg.default_with_tag[0] for architecture, cfg in cfgs.items()}
        assert defaults.pop("tasn_tiny") == "synthbirds"
        assert {f"{architecture}.{tag}" for architecture, tag in defaults.items()} == set(STARTS)
    assert cfgs["tasn_vgg19"].cfgs["cub200_336"].hf_hub_id == f"me/birds@{COMMIT}"
    assert timm.models.get_pretrained_cfg("tasn_resnet50").tag == "in1k"
    assert timm.models.get_pretrained_cfg("tasn_tiny").tag == "synthbirds"


def test_only_what_has_weights_is_listed_as_pretrained():
    assert set(timm.list_models("tasn*", pretrained=True)) == {*STARTS, SHIPPED, *ON_HUB}
    assert {*TRAINED, *STARTS} <= set(timm.list_models("tasn*", include_tags=True))


def test_label_names_are_known_where_somebody_has_trained():
    named = {name for name, config in CONFIGS.items() if config.pretrained_cfg.get("label_names")}
    assert named == {SHIPPED, *ON_HUB}


def test_a_file_without_weights_names_its_recipe():
    for name, config in CONFIGS.items():
        assert config.tasn.recipe or timm.models.get_pretrained_cfg(name).has_weights


@pytest.mark.slow
def test_the_shipped_checkpoint_knows_all_the_birds(no_network):
    config = CONFIGS[SHIPPED]
    weights = HUB_CONFIGS / f"{SHIPPED}.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == config.tasn.sha256
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == synthbirds.CLASS_NAMES
    transform = create_transform(**resolve_model_data_config(model), use_prefetcher=True)  # pixels of uint8
    right = 0
    with torch.inference_mode():
        for start in range(0, 960, 32):
            images = [Image.fromarray(synthbirds.draw("test", index)) for index in range(start, start + 32)]
            labels = torch.arange(start, start + 32) % 24
            pixels = torch.stack([transform(image) for image in images])
            right += int((model(pixels).argmax(1) == labels).sum())
    assert round(100 * right / 960, 2) == config.tasn.measured_top1
