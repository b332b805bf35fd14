"""A finished run goes to a Hub on this machine through the real client, with its card, and comes back the same."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from loopback_hub import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub, connect, environment
from PIL import Image
from safetensors.torch import load_file
from training_runs import SMALL, train_accelerate, tree

import tasn_timm
from tasn_timm import cli, publish
from tasn_timm.data import synthbirds
from tasn_timm.data.decoding import ORIENTATION
from tasn_timm.errors import UserError, run_command
from tasn_timm.finished_run import read_run
from tasn_timm.hub import load_model, save_folder, trained_on
from tasn_timm.hub_config import HUB_CONFIGS, HubConfig
from tasn_timm.recipe import load_recipe, save_recipe

FILES = {"config.json", "model.safetensors", "README.md", "recipe.yaml", "eval_results.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder) -> Path:
    """The folder of a run, to be left as it is."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "small.yaml"
    recipe.write_text(SMALL + f"data: {image_folder}\noutput: {folder / 'runs'}\n")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_accelerate.py", "--recipe", str(recipe), "--epochs", "1"])
        assert run_command(train_accelerate.main) == 0
    return folder / "runs/small"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "runs/small")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = LoopbackHub()
    connect(monkeypatch, hub, tmp_path / "cache")
    yield hub
    hub.stop()


@pytest.fixture
def command(capsys):
    """Run the command: exit code, standard output and error."""

    def start(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command(lambda: cli.main(["publish", *map(str, arguments)]))
        return code, *capsys.readouterr()

    return start


@pytest.fixture
def birds(tmp_path) -> Path:
    """A run as the recipe synthbirds leaves it, with the weights that ship with the package."""
    folder = tmp_path / "runs/synthbirds"
    model = timm.create_model("tasn_tiny", pretrained=True)
    names = list(model.pretrained_cfg["label_names"])
    config = timm.data.resolve_model_data_config(model)
    folder.mkdir(parents=True)
    save_folder(
        model, folder / "best", label_names=names, data_config=config, recipe="synthbirds", dataset="synthbirds"
    )
    save_recipe(load_recipe("synthbirds", {}), folder / "recipe.yaml")
    end(folder)
    return folder


def end(run: Path, **how) -> None:
    """Write the last line of a run."""
    line = dict(step=1440, planned_steps=1440, inexact=[], test=dict(top1=91.67, top5=99.48, images=960))
    (run / "metrics.jsonl").write_text(json.dumps(line | how) + "\n")


def the_line(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def test_a_run_is_published_in_one_commit_and_loads_as_it_was(hub, command, run):
    code, out, err = command(run, "--repo", "me/birds")
    assert code == 0, err
    repo = hub.repo("me/birds", "model")
    assert len(repo.commits) == 2, "the Hub's own first one, and ours"
    assert set(repo.find().files) - {".gitattributes"} == FILES
    assert repo.tags == dict(v1=repo.find().id) and not repo.private
    assert f"published v1 (commit {repo.find().id}): {hub.url}/me/birds" in out
    scope = {}
    exec(next(line for line in out.splitlines() if line.startswith("load it:")).removeprefix("load it:").strip(), scope)
    local = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(scope["model"](image), local(image))
    assert scope["model"].pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert repo.find().files["model.safetensors"] == (run / "best/model.safetensors").read_bytes()


def test_nothing_private_is_published(hub, command, run, image_folder, tmp_path):
    assert command(run, "--repo", "me/birds", "--private")[0] == 0
    repo = hub.repo("me/birds", "model")
    assert repo.private
    for name, content in repo.find().files.items():
        for secret in (str(tmp_path), str(image_folder), str(image_folder.parent), WRITE_TOKEN, str(run.parent)):
            assert secret.encode() not in content, name
    config = json.loads(repo.find().files["config.json"])
    assert config["tasn"]["dataset"] is None and trained_on("hf-hub:me/birds") is None
    assert b"data: photos" in repo.find().files["recipe.yaml"]


def retold(run: Path, **options) -> None:
    """Let a run say that it was trained with other options."""
    recipe = load_recipe(str(run / "recipe.yaml"), {})
    save_recipe(dataclasses.replace(recipe, **options), run / "recipe.yaml")


@pytest.mark.parametrize("path", ["client/photos", "../client/photos", "client/photos@2024", "client", "me/client.csv"])
def test_a_relative_path_is_no_dataset_of_the_hub_wherever_it_is_published_from(
    hub, command, run, tmp_path, monkeypatch, path
):
    retold(run, data=path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command(run, "--repo", "me/birds")[0] == 0
    files = hub.repo("me/birds", "model").find().files
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets is None and card.data.eval_results[0].dataset_type == Path(path).name
    assert json.loads(files["config.json"])["tasn"]["dataset"] is None
    if "/" in path:
        assert all(path.encode() not in content for content in files.values())


def test_a_built_in_name_is_the_dataset_whatever_folders_there_are(hub, command, birds, tmp_path, monkeypatch):
    (tmp_path / "synthbirds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert command(birds, "--repo", "me/birds")[0] == 0
    config = json.loads(hub.repo("me/birds", "model").find().files["config.json"])
    assert config["tasn"]["dataset"] == "synthbirds"


def test_the_recipe_is_published_without_other_paths_of_this_machine(hub, command, run):
    retold(run, model="local-dir:/home/me/start", compare="/home/me/other.yaml")
    assert command(run, "--repo", "me/birds")[0] == 0
    text = hub.repo("me/birds", "model").find().files["recipe.yaml"].decode()
    assert "/home" not in text and "model: local-dir:start\n" in text


def test_the_card_tells_machines_and_people_what_was_measured(hub, command, run, tmp_path):
    Image.new("RGB", (60, 50), "red").save(tmp_path / "bird.png")
    code, _, err = command(run, "--repo", "me/birds", "--license", "mit", "--example", tmp_path / "bird.png")
    assert code == 0, err
    files = hub.repo("me/birds", "model").find().files
    card = ModelCard(files["README.md"].decode())
    test = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_split) == (round(test["top1"], 2), "test")
    assert result.dataset_type.startswith("photos")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "timm",
        "image-classification",
    )
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit", "for those who start from it"
    assert f"| test | 21 | top1 {test['top1']:.2f} % |" in card.text and "licence of these weights is mit" in card.text
    assert "](attention.png)" in card.text and files["attention.png"].startswith(b"\x89PNG")
    results = json.loads(files["eval_results.json"])
    assert results["top1"] == test["top1"] and results["images"] == 21
    code = card.text.split("```python")[1].split("```")[0]
    scope = dict(image=Image.new("RGB", (80, 100)))
    exec(code, scope)
    assert scope["logits"].shape == (1, 3)


def test_the_papers_figure_is_beside_ours_and_other_options_are_named(hub, command, birds):
    recipe = dataclasses.replace(load_recipe("cub200_resnet50_224", {}), lr=0.2)
    save_recipe(recipe, birds / "recipe.yaml")
    config = json.loads((birds / "best/config.json").read_text())
    config["tasn"] |= dict(recipe="cub200_resnet50_224", dataset="cub200")
    (birds / "best/config.json").write_text(json.dumps(config))
    code, out, err = command(birds, "--repo", "me/birds")
    assert code == 0, err
    text = hub.repo("me/birds", "model").find().files["README.md"].decode()
    rows = "Table 4, TASN, 224; Table 3, our sampler, TASN; Table 5, TASN, 224"
    assert f"The paper reports 87.0 % ({rows}); measured here: 91.7 %." in text and text.count("87.0") == 1
    assert "Recipe `cub200_resnet50_224`, except: lr 0.2 (there 0.1)." in text
    assert "to make it" not in out, "not the model of the recipe"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(step=2), "ended after 2 of 1440 steps"),
        (
            dict(
                inexact=[
                    dict(lr=[0.1, 0.2], data=["/home/me", "/home/you"], initial_checkpoint=["/home/me/x", None]),
                    dict(processes=[1, 8]),
                ]
            ),
            "resumed with other settings (lr 0.1, then 0.2, other data, other initial_checkpoint), resumed with other "
            "settings (processes 1, then 8)",
        ),
    ],
)
def test_what_did_not_train_as_its_recipe_says_is_told_and_is_not_the_named_model(hub, command, birds, how, message):
    end(birds, **how)
    code, out, err = command(birds, "--repo", "me/birds")
    assert code == 0 and "to make it" not in out, err
    files = hub.repo("me/birds", "model").find().files
    assert f"Recipe `synthbirds`, except: {message}." in files["README.md"].decode()
    assert ", ".join(json.loads(files["eval_results.json"])["differences"]) == message
    code, _, err = command(birds, "--repo", "me/birds", "--write-config")
    assert code == 2 and f"of recipe 'synthbirds', except: {message}" in the_line(err)


def test_a_run_that_was_cut_short_says_so_whatever_its_recipe(command, run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == last["planned_steps"] == 3 and last["inexact"] == []
    (run / "metrics.jsonl").write_text(json.dumps(last | dict(step=2)) + "\n")
    code, out, err = command(run, "--repo", "me/birds", "--dry-run")
    assert code == 0 and "Recipe `small`, except: ended after 2 of 3 steps." in out, err


def test_what_accelerate_was_configured_for_is_an_option_of_the_run(birds):
    for used, expected in (
        (dict(mixed_precision="no", torchcompile="no"), []),
        (dict(mixed_precision="bf16", torchcompile="no"), ["mixed_precision bf16 (there None)"]),
        (dict(mixed_precision="no", torchcompile="inductor"), ["torchcompile inductor (there None)"]),
    ):
        retold(birds, **used)
        assert read_run(birds).differences == expected


@pytest.mark.parametrize("options", [dict(data="/home/me/cub200"), dict(test_split="validation")])
def test_the_papers_figure_is_not_beside_what_was_measured_on_other_data(hub, command, birds, options):
    save_recipe(dataclasses.replace(load_recipe("cub200_resnet50_224", {}), **options), birds / "recipe.yaml")
    config = json.loads((birds / "best/config.json").read_text())
    config["tasn"] |= dict(recipe="cub200_resnet50_224", dataset="cub200")
    (birds / "best/config.json").write_text(json.dumps(config))
    assert command(birds, "--repo", "me/birds")[0] == 0
    text = hub.repo("me/birds", "model").find().files["README.md"].decode()
    assert "The paper reports" not in text and "87.0" not in text
    different = "other data (cub200)" if "data" in options else "test_split validation (there test)"
    assert f"Recipe `cub200_resnet50_224`, except: {different}." in text


def test_a_dataset_of_the_hub_is_named_with_its_commit(hub, command, run):
    retold(run, data=f"you/colours@{'a' * 40}")
    assert command(run, "--repo", "me/birds")[0] == 0
    files = hub.repo("me/birds", "model").find().files
    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_revision) == ("you/colours", "a" * 40)
    assert card.data.datasets == ["you/colours"]
    tasn = json.loads(files["config.json"])["tasn"]
    assert (tasn["dataset"], tasn["dataset_revision"]) == ("you/colours", "a" * 40)
    assert trained_on("hf-hub:me/birds") == f"you/colours@{'a' * 40}"


def test_the_example_is_decoded_as_training_pictures_are(hub, command, run, tmp_path, monkeypatch):
    sideways = Image.new("RGB", (60, 30), "red")
    sideways.paste("blue", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it right by 90 degrees: blue is above then
    sideways.save(tmp_path / "bird.jpg", exif=exif)
    code, _, err = command(run, "--repo", "me/birds", "--example", tmp_path / "bird.jpg")
    assert code == 0, err
    figure = Image.open(io.BytesIO(hub.repo("me/birds", "model").find().files["attention.png"])).convert("RGB")
    side = figure.height
    above, below = (figure.getpixel((side // 2, side * part // 8)) for part in (1, 7))
    assert above[2] > above[0] and below[0] > below[2]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    code, _, err = command(run, "--repo", "me/birds", "--example", tmp_path / "bird.jpg")
    assert code == 2 and "bird.jpg' cannot be read as a picture: " in the_line(err)


def test_an_example_that_is_no_longer_given_is_no_longer_there(hub, command, run, tmp_path):
    Image.new("RGB", (60, 50), "red").save(tmp_path / "bird.png")
    for options, there in ((["--example", tmp_path / "bird.png"], True), ([], False)):
        code, _, err = command(run, "--repo", "me/birds", *options)
        files = hub.repo("me/birds", "model").find().files
        assert code == 0 and ("attention.png" in files) == there == (b"attention.png" in files["README.md"]), err
    assert len(hub.repo("me/birds", "model").commits) == 3


def test_an_example_needs_attention_to_show(command, run, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    config = timm.data.resolve_model_data_config(model)
    save_folder(model, run / "best", label_names=["a", "b", "c"], data_config=config, recipe="small", dataset="x")
    Image.new("RGB", (60, 50), "red").save(tmp_path / "bird.png")
    code, _, err = command(run, "--repo", "me/birds", "--dry-run", "--example", tmp_path / "bird.png")
    assert code == 2 and "--example has no effect: test_resnet has no attention to show" in the_line(err)


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_asked(hub, command, run):
    for license, message in (("mitt", "unknown license 'mitt': did you mean 'mit'?"), ("nonsense", "or other.")):
        code, _, err = command(run, "--repo", "me/birds", "--license", license)
        assert code == 2 and message in the_line(err)
    assert not hub.requests


def test_what_was_trained_from_nothing_has_no_licence_but_its_author_s(hub, command, run):
    cfg = timm.get_pretrained_cfg("test_resnet")
    assert cfg.license, "of weights that this run did not start from"
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 0, err
    files = hub.repo("me/birds", "model").find().files
    card = ModelCard(files["README.md"].decode())
    assert card.data.license is None and "No licence is stated" in card.text
    assert not json.loads(files["config.json"])["pretrained_cfg"].get("license")


def test_the_licence_of_weights_has_its_own_name_where_the_hub_has_none(hub, command, run):
    config = json.loads((run / "best/config.json").read_text())
    config["pretrained_cfg"]["license"] = "seer-license"
    (run / "best/config.json").write_text(json.dumps(config))
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 0, err
    card = ModelCard(hub.repo("me/birds", "model").find().files["README.md"].decode())
    assert (card.data.license, card.data.license_name) == ("other", "seer-license")
    assert "licence of these weights is seer-license" in card.text


def test_somebody_elses_commit_meanwhile_is_noticed(hub, command, run):
    assert command(run, "--repo", "me/birds")[0] == 0
    repo = hub.repo("me/birds", "model")

    def fault(method: str, path: str) -> None:
        if "preupload" in path:
            repo.commit(repo.find().files | {"NEWS.md": b"meanwhile"}, "somebody else's")
            hub.fault = None

    hub.fault = fault
    code, _, err = command(run, "--repo", "me/birds", "--license", "mit")
    assert code == 2 and "Run the same command again" in the_line(err)
    assert [commit.title for commit in repo.commits.values()][2:] == ["somebody else's"]
    assert command(run, "--repo", "me/birds", "--license", "mit")[0] == 0 and len(repo.commits) == 4


def test_what_the_hub_refuses_is_not_to_be_tried_again(hub, command, run, monkeypatch):
    hub.fault = lambda method, path: Fault(400) if "repos/create" in path else None
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 2 and "me/birds could not be published: " in the_line(err) and "again" not in err
    monkeypatch.setattr("tasn_timm.publish.LICENSES", ("nonsense",))
    monkeypatch.setattr("tasn_timm.card.LICENSES", ("nonsense",))
    hub.fault = None
    code, _, err = command(run, "--repo", "me/birds", "--license", "nonsense")
    assert code == 2 and '"license" must be one of' in the_line(err) and "again" not in err
    monkeypatch.setenv("HF_TOKEN", "hf_\u00fcber")
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 2 and "does not know the token of this machine: log in" in the_line(err) and "again" not in err


def test_publishing_again_updates_the_card_and_counts_the_version(hub, command, run):
    assert command(run, "--repo", "me/birds")[0] == 0
    code, out, _ = command(run, "--repo", "me/birds")
    repo = hub.repo("me/birds", "model")
    assert code == 0 and "nothing has changed since v1" in out
    assert len(repo.commits) == 2 and set(repo.tags) == {"v1"}
    code, out, _ = command(run, "--repo", "me/birds", "--license", "mit")
    assert code == 0 and "published v2" in out
    assert len(repo.commits) == 3 and set(repo.tags) == {"v1", "v2"}
    assert (
        b"license: mit" in repo.find().files["README.md"] and b"license: mit" not in repo.find("v1").files["README.md"]
    )
    assert timm.create_model("hf-hub:me/birds@v1", pretrained=True).num_classes == 3


def without_test(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def damage(run: Path) -> None:
    weights = run / "best/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def without_block(run: Path) -> None:
    config = json.loads((run / "best/config.json").read_text())
    del config["tasn"]
    (run / "best/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_test, "has no final evaluation, and a model is published with one: let it end"),
        (damage, "has other weights than its description says"),
        (lambda run: shutil.rmtree(run / "best"), "is no folder of a run with best/, recipe.yaml and metrics.jsonl"),
        (shutil.rmtree, "is no folder of a run"),
        (without_block, "was not saved by training: its config.json says nothing of it"),
    ],
)
def test_what_is_no_finished_run_is_refused_and_nothing_reaches_the_hub(hub, command, run, change, message):
    change(run)
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 2 and message in the_line(err)
    assert not hub.repos


def test_the_login_is_checked_first(hub, command, monkeypatch):
    for token, message in (
        (None, "nobody is logged in to the Hub: log in with hf auth login"),
        ("hf_x", "does not know"),
    ):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        code, _, err = command("nowhere", "--repo", "me/birds")
        assert code == 2 and message in the_line(err)
    assert not hub.repos


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("you/birds", WRITE_TOKEN, "does not let you write to you/birds"),
        ("me/birds", READ_TOKEN, "does not let you write to me/birds"),
        ("birds", WRITE_TOKEN, "--repo must be USER/NAME, got 'birds'"),
        ("me/birds/x", WRITE_TOKEN, "--repo must be USER/NAME, got 'me/birds/x'"),
        ("me/a--b", WRITE_TOKEN, "--repo must be USER/NAME, got 'me/a--b': Cannot have -- or .. in repo_id"),
    ],
)
def test_repositories_that_are_not_ones_own_are_refused(hub, command, run, monkeypatch, repo, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = command(run, "--repo", repo)
    assert code == 2 and message in the_line(err)
    assert not hub.repos
    if message.startswith("--repo"):
        code, out, err = command(run, "--repo", repo, "--dry-run")
        assert code == 2 and message in the_line(err) and not out and not hub.requests


def test_private_is_refused_for_a_public_repository(hub, command, run):
    assert command(run, "--repo", "me/birds")[0] == 0
    code, _, err = command(run, "--repo", "me/birds", "--private")
    assert code == 2 and "me/birds exists and is public: leave out --private" in the_line(err)


def test_a_dry_run_shows_everything_and_asks_nobody(hub, command, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = command(run, "--repo", "me/birds", "--dry-run")
    assert code == 0, err
    assert not hub.requests and "nothing was sent" in out
    assert all(f"  {name}\n" in out for name in FILES) and "# birds" in out


@pytest.mark.parametrize("path", ["whoami", "repos/create", "preupload", "lfs/objects", "commit/main", "tag/", "refs"])
def test_a_hub_that_fails_is_told_without_the_token_and_publishing_again_completes_it(
    hub, command, run, monkeypatch, path
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, asked: Fault(500) if path in asked else None
    code, out, err = command(run, "--repo", "me/birds")
    assert code == 2 and "Run the same command again" in the_line(err)
    assert WRITE_TOKEN not in out + err
    hub.fault = None
    code, out, err = command(run, "--repo", "me/birds")
    assert code == 0, err
    repo = hub.repo("me/birds", "model")
    assert len(repo.commits) == 2 and repo.tags == dict(v1=repo.find().id)


def test_a_commit_whose_answer_is_lost_is_found_again(hub, command, run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, path: Fault(cut=0) if "/commit/" in path else None
    assert command(run, "--repo", "me/birds")[0] == 2
    hub.fault = None
    code, _, err = command(run, "--repo", "me/birds")
    repo = hub.repo("me/birds", "model")
    assert code == 0 and len(repo.commits) == 2 and repo.tags == dict(v1=repo.find().id), err


def test_without_a_network_nothing_is_published(hub, command, run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.stop()
    code, _, err = command(run, "--repo", "me/birds")
    assert code == 2 and "the Hub cannot be reached" in the_line(err)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the package as a checkout has it; the command writes into its hub_configs/."""
    package = Path(tasn_timm.__file__).parent
    folder = tmp_path / "checkout"
    shutil.copytree(package, folder / "tasn_timm", ignore=shutil.ignore_patterns("__pycache__", "hub_configs"))
    shutil.copytree(HUB_CONFIGS, folder / "hub_configs")
    monkeypatch.setattr(publish, "HUB_CONFIGS", folder / "hub_configs")
    monkeypatch.setattr("tasn_timm.hub_config.HUB_CONFIGS", folder / "hub_configs")
    return folder


@pytest.fixture
def waiting(checkout) -> Path:
    """The file of a checkpoint that nobody has published, of the recipe synthbirds."""
    shipped = HubConfig.read(checkout / "hub_configs/tasn_tiny.synthbirds.json")
    unknown = dict(measured_top1=None, sha256=None)
    config = dataclasses.replace(
        shipped,
        tag="birds",
        pretrained_cfg=shipped.pretrained_cfg | dict(label_names=None),
        tasn=dataclasses.replace(shipped.tasn, **unknown),
    )
    config.write(checkout / "hub_configs/tasn_tiny.birds.json")
    return checkout / "hub_configs/tasn_tiny.birds.json"


def in_checkout(checkout: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with the package of a checkout."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", f"import timm, tasn_timm; print(tasn_timm.__file__); {code}"],
        env=os.environ | dict(PYTHONPATH=path) | variables,
        cwd=checkout.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_patch_makes_it_a_named_model(hub, command, birds, checkout, waiting, tmp_path):
    code, out, err = command(birds, "--repo", "me/birds", "--license", "mit")
    assert code == 0, err
    before = waiting.read_text()
    (checkout / "change.patch").write_text(out[out.index("--- a/") :].rstrip("\n") + "\n")
    subprocess.run(["git", "apply", "--unsafe-paths", "change.patch"], cwd=checkout, check=True)
    patched = waiting.read_text()
    waiting.write_text(before)
    code, out, err = command(birds, "--repo", "me/birds", "--write-config", "--license", "mit")
    assert code == 0 and "written: hub_configs/tasn_tiny.birds.json" in out, err
    assert waiting.read_text() == patched != before
    config, repo = HubConfig.read(waiting), hub.repo("me/birds", "model")
    assert (config.tasn.repo_id, config.tasn.commit) == ("me/birds", repo.find().id)
    assert config.tasn.measured_top1 == 91.67 and config.pretrained_cfg["license"] == "mit"
    assert config.model_args.items() >= json.loads(before)["model_args"].items(), "still complete"

    # The named model comes from the Hub then, and is checked.
    total = "print(float(timm.create_model('tasn_tiny.birds', pretrained=True).heads.shared.weight.sum()))"
    elsewhere = environment(hub, tmp_path / "other")
    loaded = in_checkout(checkout, total, **elsewhere)
    assert loaded.returncode == 0, loaded.stderr
    file, total_there = loaded.stdout.split()
    assert Path(file).is_relative_to(checkout)
    assert float(total_there) == float(load_file(birds / "best/model.safetensors")["heads.shared.weight"].sum())
    content = bytearray(repo.find().files["model.safetensors"])
    content[-1] ^= 1
    shutil.rmtree(tmp_path / "other")
    hub.fault = lambda method, path: (
        Fault(flip=len(content) - 1) if method == "GET" and path.endswith("safetensors") else None
    )
    damaged = in_checkout(checkout, total, **elsewhere)
    assert damaged.returncode == 1 and "has other weights than its description says" in damaged.stderr.splitlines()[-1]


def test_what_ships_with_the_package_stays_what_it_is(hub, command, birds, checkout, tmp_path):
    before = tree(checkout / "hub_configs")
    code, out, err = command(birds, "--repo", "me/birds")
    assert code == 0 and "to make it" not in out, err
    code, _, err = command(birds, "--repo", "me/birds", "--write-config")
    assert code == 2 and "no file in hub_configs/ is for weights of recipe 'synthbirds'" in the_line(err)
    assert tree(checkout / "hub_configs") == before
    code = "timm.create_model('tasn_tiny.synthbirds', pretrained=True)"
    offline = in_checkout(checkout, code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert offline.returncode == 0, offline.stderr


def test_write_config_is_for_recipes_of_hub_configs(hub, command, run, birds, waiting):
    code, _, err = command(run, "--repo", "me/birds", "--write-config")
    assert code == 2 and "no file in hub_configs/ is for weights of recipe 'small': leave it out." in the_line(err)
    save_recipe(dataclasses.replace(load_recipe("synthbirds", {}), epochs=20), birds / "recipe.yaml")
    code, _, err = command(birds, "--repo", "me/birds", "--write-config")
    assert code == 2 and "of recipe 'synthbirds', except: epochs 20 (there 16)." in the_line(err)
    assert not hub.repos


def test_the_figure_shows_the_picture_the_map_and_the_sample(birds):
    from tasn_timm.data.synthbirds import draw
    from tasn_timm.visualize import GAP, attention_panels

    sheet = attention_panels(load_model(str(birds)), Image.fromarray(draw("test", 0)), side=192)
    assert sheet.size == (3 * 192 + 2 * GAP, 192)
    first = torch.tensor(list(sheet.crop((0, 0, 192, 192)).tobytes()))
    original = torch.tensor(list(draw("test", 0).tobytes()))
    assert (first - original).abs().max() <= 1, "the picture itself"


def test_the_example_is_decoded_as_everywhere(tmp_path):
    """A photo that its EXIF turns gives the figure of the turned photo; what is no picture is one line."""
    model, turned = load_model("tasn_tiny"), Image.Exif()
    turned[ORIENTATION] = 6
    drawn = Image.fromarray(synthbirds.draw("test", 0))
    drawn.save(tmp_path / "upright.png")
    drawn.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    figures = []
    for name in ("upright", "turned"):
        publish._draw(model, None, tmp_path / f"{name}.png", tmp_path)
        figures.append((tmp_path / publish.FIGURE).read_bytes())
    assert figures[0] == figures[1]
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("text.jpg", "nowhere.jpg"):
        with pytest.raises(UserError, match=f"--example '.*{name}' cannot be read as a picture: "):
            publish._draw(model, None, tmp_path / name, tmp_path)
