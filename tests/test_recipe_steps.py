"""Every recipe: its model, loss, optimizer, schedule and transforms are built, and one step is taken on tiny images."""

import math
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2

from tasn_timm import TASN
from tasn_timm.recipe import RECIPES, Recipe, load_recipe
from tasn_timm.training.build import build_model, build_parts
from tasn_timm.training.loaders import build_loaders, load_data, plan_epoch

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# One of each kind is stepped in every run of the tests; all of them in CI.
QUICK = {
    *("cub200_resnet50_224", "cub200_resnet50_224_part_relation", "cub200_resnet50_224_saliency_master"),
    *("cub200_resnet50_224_uniform", "cub200_resnet50_336_isqrt", "cub200_resnet50_448_isqrt_plain"),
    *("cub200_resnet50_modern", "synthbirds", "synthbirds_plain"),
}


def test_the_quick_ones_exist():
    assert set(NAMES) > QUICK


def shrunk(name: str, data: Path) -> Recipe:
    """A recipe as it is, but for the weights to start from, batch, and sizes of pictures and attention net's input."""
    recipe = load_recipe(name)
    is_tasn = recipe.model.startswith("tasn")
    backbone = recipe.model_kwargs.get("backbone", "")
    sizes = dict(sample_size=28 if "patch14" in backbone else 32, attention_args=dict(input_size=32))
    small = dict(
        data=str(data),
        num_classes=None,
        train_split="train",
        val_split="validation",
        pretrained=False,
        img_size=56,
        resize=None if recipe.resize is None else 64,
        crop_padding=min(recipe.crop_padding, 4),
        batch_size=2,
        workers=0,
        compare=None,
        model_kwargs=sizes if is_tasn else {},
    )
    return load_recipe(name, small)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_step_of_every_recipe(name, image_folder):
    torch.manual_seed(0)
    recipe = shrunk(name, image_folder)
    splits, _ = load_data(recipe)
    model = build_model(recipe, classes=3)
    plan = plan_epoch(recipe, splits["train"])
    loaders = build_loaders(recipe, splits, plan, batch_size=2, accelerator=Accelerator(cpu=True))
    parts = build_parts(recipe, model, 24, resolve_model_data_config(model))
    parameter = next(iter(model.get_classifier().parameters()))
    before = parameter.detach().clone()

    images, labels, *_ = next(iter(loaders["train"]))
    assert images[0].shape == (2, 3, 56, 56) and images[0].dtype == torch.uint8
    assert len(images) == (2 if recipe.color_jitter or recipe.pca_noise else 1)
    losses = parts.objective(model.train()(parts.normalize(images)), labels)
    losses["loss"].backward()
    parts.optimizer.step()
    parts.scheduler.step_update(1)

    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert {"loss"} | expected_losses(model) == set(losses)
    assert not torch.equal(parameter, before), "the step changed nothing"
    assert (parts.average is not None) == (recipe.model_ema_decay is not None)
    model.eval()
    with torch.inference_mode():
        assert model(parts.normalize(next(iter(loaders["val"]))[0])).shape == (2, 3)


def expected_losses(model: torch.nn.Module) -> set[str]:
    if not isinstance(model, TASN):
        return set()
    views = {"structure": model.master_net, "detail": model.part_net, "soft": model.master_net and model.part_net}
    return {"attention", *(name for name, there in views.items() if there)}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("synthbirds")])
def test_paper_recipes_fit_the_datasets_of_table_1_and_what_timm_has_weights_for(name):
    recipe = load_recipe(name)
    classes = {"cub200": 200, "cars196": 196, "inat2017": 5089}
    assert recipe.data == name.split("_")[0] and recipe.num_classes == classes[recipe.data]
    assert recipe.val_split is None and recipe.pretrained
    backbone = recipe.model_kwargs.get("backbone", recipe.model)
    if not backbone.startswith("tasn"):
        assert timm.get_pretrained_cfg(backbone).has_weights


def test_the_published_setting():
    """What train.py, common/cub_data.py and model.py of researchmm/tasn say."""
    recipe = load_recipe("cub200_resnet50_224")
    model = timm.create_model(recipe.model, num_classes=200, device="meta", **recipe.model_kwargs)
    optimizer = create_optimizer_v2(
        model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["weight_decay"], group["nesterov"]) for group in optimizer.param_groups} == {
        (0, 0, False)
    }
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.1, 300, 96)
    assert (recipe.sched, recipe.decay_milestones, recipe.decay_rate) == ("multistep", [100, 200], 0.1)
    assert (recipe.img_size, recipe.resize or recipe.img_size, model.sample_size) == (512, 512, (224, 224))
    assert (recipe.degrees, recipe.color_jitter, recipe.pca_noise, recipe.hflip) == (30, 0.4, 0.1, 0.5)
    assert (recipe.temperature, recipe.soft_weight, recipe.scale_soft, recipe.detach_teacher) == (10, 2, False, False)
    assert (model.heads.heads, model.structure_sampler.shape, model.detail_sampler.shape) == ("both", "square", "none")
    assert model.trilinear_attention.spatial_scale == 7
    assert model.structure_sampler.max_zoom == 4 and model.structure_sampler.iterations == 5
