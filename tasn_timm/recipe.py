"""A recipe: every option of a training run, read from YAML and overridden on the command line."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from timm.optim import get_optimizer_info, list_optimizers
from timm.utils import ParseKwargs

from .errors import KINDS, Parser, UserError, no_effect, unknown

RECIPES = Path(__file__).parent / "recipes"
BASES = RECIPES / "base"  # what recipes share; no recipes themselves


# What numbers may have to be.
_RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "0 or more": lambda value: 0 <= value < math.inf,
    "0 to 4294967295": lambda value: 0 <= value < 2**32,  # NumPy's
    "more than 0": lambda value: 0 < value < math.inf,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "more than 0 and less than 1": lambda value: 0 < value < 1,
}


def _option(default: Any, help: str, must_be: str | None = None) -> Any:
    """An option of `Recipe`: its default, help, and key of `_RANGES`."""
    metadata = dict(help=help, must_be=must_be)
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Options of a training run. Names are timm's where timm has the option."""

    # data
    data: str = _option("synthbirds", "built-in dataset, folder of images or parquet, or dataset id on the Hub")
    train_split: str = _option("train", "split to train on")
    val_split: str | None = _option(
        "validation", "split that chooses the best epoch; null: none, the last epoch is kept"
    )
    test_split: str | None = _option("test", "split that is read once, at the end; null: none")
    num_classes: int | None = _option(None, "number of classes, checked against the dataset; null: the dataset's")
    input_key: str | None = _option(None, "column of the images; null: found")
    target_key: str | None = _option(None, "column of the labels; null: found")
    streaming: bool = _option(
        False, "read the training split from the Hub or its folder as it is needed, in no exactly repeatable order"
    )
    max_bad_images: int = _option(
        0,
        "unreadable training images for which others are taken; one more stops the run. In evaluation any one does",
        must_be="0 or more",
    )
    decoder: str = _option("pillow", "what decodes training images: pillow or simplejpeg (extra fast)")
    overfit_batches: int = _option(
        0,
        "train and validate on the images of so many optimizer steps, unaugmented, and test nothing: without dropout, "
        "smoothing and mixup the loss should go towards 0; 0: off",
        must_be="0 or more",
    )

    # model
    model: str = _option("tasn_tiny", "timm model: tasn_..., any other one, or local-dir:FOLDER")
    pretrained: bool = _option(False, "start from pretrained weights")
    initial_checkpoint: str | None = _option(
        None, "folder of a run or model whose backbone and attention net this one starts from; its classifiers are new"
    )
    model_kwargs: dict = _option({}, "arguments of the model, e.g. sample_size=336 heads=shared")

    # images
    img_size: int = _option(
        192, "side of the model's input in pixels; TASN samples its small image from it", must_be="at least 1"
    )
    resize: int | None = _option(None, "short side in pixels before cropping; null: img_size")
    crop_padding: int = _option(
        0, "pixels of mirrored border around the image before the random crop", must_be="0 or more"
    )
    hflip: float = _option(0.5, "probability of a horizontal flip", must_be="between 0 and 1")
    degrees: float = _option(0.0, "largest random rotation in degrees", must_be="0 or more")
    color_jitter: float = _option(
        0.0, "largest relative change of brightness, contrast and saturation", must_be="0 or more"
    )
    pca_noise: float = _option(
        0.0, "standard deviation of AlexNet's PCA colour noise; the published code has 0.1", must_be="0 or more"
    )
    aa: str | None = _option(None, "timm's RandAugment, such as rand-m9-mstd0.5-inc1; null: none")
    reprob: float = _option(0.0, "probability that a random rectangle is erased", must_be="between 0 and 1")
    mixup: float = _option(0.0, "alpha of mixup; not for a TASN with a part net; 0: none", must_be="0 or more")
    cutmix: float = _option(0.0, "alpha of cutmix, likewise", must_be="0 or more")

    # loss
    smoothing: float = _option(0.0, "label smoothing, 0 to 1", must_be="between 0 and 1")
    temperature: float = _option(10.0, "TASN: T of the soft targets (Eq. 6)", must_be="more than 0")
    soft_weight: float = _option(2.0, "TASN: lambda, weight of the distillation (Eq. 8)", must_be="0 or more")
    part_weight: float = _option(1.0, "TASN: weight of the detail image's classification", must_be="0 or more")
    attention_weight: float = _option(1.0, "TASN: weight of the attention net's classification", must_be="0 or more")
    master_weight: float | None = _option(
        None,
        "TASN: share of the master and part classifiers, the shared one has the rest; null: 0.5 where there are both",
        must_be="between 0 and 1",
    )
    shared_part_weight: float | None = _option(
        None, "TASN: weight of the shared classifier on the detail image; null: as part_weight", must_be="0 or more"
    )
    scale_soft: bool = _option(False, "TASN: multiply the distillation by T^2, so that T does not change its gradient")
    detach_teacher: bool = _option(True, "TASN: the distillation does not change the part net")

    # optimisation
    epochs: int = _option(20, "passes over the training split", must_be="at least 1")
    batch_size: int = _option(
        32, "images per optimizer step, over all processes and accumulation steps", must_be="at least 1"
    )
    grad_accum_steps: int = _option(1, "forward and backward passes per optimizer step", must_be="at least 1")
    drop_last: bool = _option(
        True, "leave out the images (others every epoch) that do not fill up batch_size; no: a short last step has them"
    )
    opt: str = _option("adamw", "timm optimizer")
    lr: float = _option(
        4e-3,
        "learning rate, for the batch size as given; the schedule begins at epoch 0, also under the warm-up",
        must_be="0 or more",
    )
    weight_decay: float = _option(0.05, "weight decay, not on biases and norms", must_be="0 or more")
    momentum: float = _option(0.9, "momentum, for optimizers that have it", must_be="0 or more")
    opt_kwargs: dict = _option({}, "more arguments of the optimizer")
    layer_decay: float | None = _option(
        None,
        "factor on the learning rate from each layer to the one below it (timm's groups of layers); null: none",
        must_be="more than 0 and less than 1",
    )
    model_ema_decay: float | None = _option(
        None,
        "decay of an average of the weights, which is then what is evaluated and saved; in the first 1 / (1 - decay) "
        "steps it is their mean; null: none",
        must_be="more than 0 and less than 1",
    )
    sched: Literal["cosine", "tanh", "multistep"] = _option("cosine", "timm scheduler, stepped every update")
    warmup_epochs: float = _option(4.0, "epochs of linear warm-up from warmup_lr", must_be="0 or more")
    warmup_lr: float = _option(4e-4, "learning rate at the start of the warm-up", must_be="0 or more")
    min_lr: float = _option(4e-5, "learning rate at the end", must_be="0 or more")
    decay_milestones: list = _option([], "epochs at which the multistep scheduler decays")
    decay_rate: float = _option(0.1, "factor of each decay", must_be="more than 0 and less than 1")
    clip_grad: float | None = _option(None, "largest norm of the gradient; null: no clipping", must_be="more than 0")
    freeze: dict = _option(
        {}, "what is not trained when: a name's beginning and the epochs before which, or [from, before]: backbone=5"
    )
    sync_bn: bool = _option(False, "BatchNorm over the images of all processes; GPUs only")

    # running
    seed: int = _option(0, "seed of weights, data order, augmentation and part selection", must_be="0 to 4294967295")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option(
        None, "precision; null: as accelerate is configured"
    )
    tf32: bool | None = _option(None, "float32 products of a GPU in TF32, faster and rounder; null: torch's default")
    torchcompile: str | None = _option(
        None, "compile the model with this backend, such as inductor; null: as accelerate is configured"
    )
    channels_last: bool = _option(True, "memory layout of the convolutions")
    workers: int = _option(2, "processes that load images, per training process", must_be="0 or more")
    cpu: bool = _option(False, "train on CPU even where there is a GPU")
    log_interval: int = _option(
        50, "batches between lines of metrics.jsonl, and where there is no terminal of the log", must_be="at least 1"
    )
    recovery_interval: int | None = _option(
        None,
        "optimizer steps between checkpoints; null: at the end of each epoch, where there is always one",
        must_be="at least 1",
    )
    checkpoint_hist: int = _option(2, "checkpoints to keep", must_be="at least 1")
    trackers: list = _option([], "where metrics go besides metrics.jsonl: [tensorboard], [wandb], [trackio] ...")
    output: str = _option("runs", "folder in which the run gets a folder of its own")
    compare: str | None = _option(None, "recipe of a second model, trained afterwards for the final table")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, _typed(entry, getattr(self, entry.name)))
            _check_range(entry, getattr(self, entry.name))
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"recipe: warmup_epochs must be less than epochs ({self.epochs}), got {self.warmup_epochs}: lower it "
                f"(--warmup-epochs 0: no warm-up)."
            )
        if (self.sched == "multistep") != bool(self.decay_milestones):
            raise UserError(
                f"recipe: decay_milestones are for sched multistep, and it needs them; got sched {self.sched} and "
                f"{self.decay_milestones}."
            )
        if not _ascend(self.decay_milestones):
            raise UserError(
                f"recipe: decay_milestones must be numbers of epochs in ascending order, got {self.decay_milestones}."
            )
        if any(milestone >= self.epochs for milestone in self.decay_milestones):
            raise UserError(
                f"recipe: decay_milestones {self.decay_milestones} must be less than epochs ({self.epochs}), or the "
                f"learning rate never decays: scale them with epochs."
            )
        if self.crop_padding >= (self.resize or self.img_size):
            raise UserError(
                f"recipe: crop_padding ({self.crop_padding}) mirrors the picture, so it must be less than its short "
                f"side ({self.resize or self.img_size})."
            )
        if self.opt not in list_optimizers():
            raise unknown("optimizer", self.opt, list_optimizers(), "timm.optim.list_optimizers()")
        if get_optimizer_info(self.opt).second_order:
            raise UserError(f"recipe: opt {self.opt} needs second derivatives, which are not computed: take another.")
        if self.resize is not None and self.resize < self.img_size:
            raise UserError(f"recipe: resize ({self.resize}) must be at least img_size ({self.img_size}).")
        if self.overfit_batches:
            no_effect(Recipe, dict(decoder=self.decoder), "overfit_batches, which trains on what it validates on")
        if self.streaming:
            no_effect(Recipe, dict(drop_last=self.drop_last), "streaming, which gives each process whole batches")
            no_effect(Recipe, dict(overfit_batches=self.overfit_batches), "streaming, which has no order to pick from")
        for name, because in _ruled_out(vars(self)).items():
            no_effect(Recipe, {name: getattr(self, name)}, because, except_for=["decay_milestones"])  # see above


# What the weights at the end do not depend on; all the rest has to be the same when a run is resumed.
FREE_OPTIONS = (
    *("workers", "max_bad_images", "log_interval", "recovery_interval", "checkpoint_hist"),
    *("trackers", "output", "compare"),
)


DRY_STEPS = 2  # of training and of evaluation in a dry run


@dataclass
class Launch:
    """What is to be done with a recipe this time."""

    resume: str | None = _option(
        None, "run folder to go on with, or auto: the newest run of this recipe in output, or a new one"
    )
    resume_inexact: bool = _option(False, "go on although the result will not be that of an uninterrupted run")
    max_steps: int | None = _option(
        None, "end training after so many optimizer steps of the schedule; with --resume it goes on where that was"
    )
    dry_run: bool = _option(
        False, "two steps of training and evaluation, save and load once, estimate time and memory, leave nothing"
    )
    validate_only: bool = _option(False, "evaluate the validation split, with the weights of --resume or pretrained")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, _typed(entry, getattr(self, entry.name)))
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps must be at least 1, got {self.max_steps}.")
        if self.dry_run:
            rest = dict(resume=self.resume, max_steps=self.max_steps, validate_only=self.validate_only)
            no_effect(Launch, rest, "dry_run")
        if self.validate_only:
            rest = dict(max_steps=self.max_steps, resume_inexact=self.resume_inexact)
            no_effect(Launch, rest, "validate_only")
        if self.resume is None:
            no_effect(Launch, dict(resume_inexact=self.resume_inexact), "resume=None")

    @property
    def train_steps(self) -> int | None:
        """Optimizer steps after which training ends; None: at the end of the recipe's epochs."""
        return DRY_STEPS if self.dry_run else self.max_steps

    @property
    def eval_batches(self) -> int | None:
        """Batches after which an evaluation ends; None: at the end of the split."""
        return DRY_STEPS if self.dry_run else None


@dataclass
class PaperRow:
    """A figure of the paper that a recipe is for."""

    table: int | str  # its number; text for a section, "4.2"
    row: str
    top1: float | None = None  # per cent; None where the paper gives none
    ensemble: int = 1  # models whose predictions are averaged
    flip: bool = False  # predictions for the image and its mirror image are averaged
    super_classes: bool = False  # the paper gives the accuracy of each super-class, too

    def __post_init__(self) -> None:
        if not isinstance(self.table, int | str) or isinstance(self.table, bool):
            raise UserError(f"recipe: table must be a whole number or text such as '4.2', got {self.table!r}.")
        for entry in dataclasses.fields(self)[1:]:
            setattr(self, entry.name, _typed(entry, getattr(self, entry.name)))
        if self.ensemble < 1:
            raise UserError(f"recipe: ensemble must be at least 1, got {self.ensemble}.")


class RecipeFile(NamedTuple):
    """A recipe file as it stands: its own options, without its base's, and what is not an option."""

    options: dict[str, Any]
    base: str | None
    paper: list[PaperRow]
    measured: float | str | None  # top-1 that we measured; None: nobody has


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and its bases.

    Args:
        name: Name of a recipe of the package, or path of a YAML file.
        overrides: Options that take the place of the file's, as the file's take the place of its base's: of a dict
            option, only the keys given are replaced. With another model the file's model_kwargs are dropped, but if it
            is a TASN, too, they might be meant for it, so new ones have to be given. What then has no effect is
            dropped as well, e.g. min_lr with sched multistep.

    Raises:
        UserError: No such recipe, an unknown option, or a value of the wrong type.
    """
    options = _override(_resolve(_find(name)), overrides or {})
    known = [entry.name for entry in dataclasses.fields(Recipe)]
    for key in options:
        if key not in known:
            raise unknown(f"option in recipe {name!r}:", key, known, "train_accelerate.py --help")
    return Recipe(**options)


def read_recipe_file(path: Path) -> RecipeFile:
    """Read one YAML file, without its base."""
    try:
        options = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(options, dict):
        raise UserError(f"recipe {str(path)!r} must have lines such as 'epochs: 20', got {options!r}.")
    base, paper, measured = options.pop("base", None), options.pop("paper", []), options.pop("measured", None)
    if not isinstance(base, str | None):
        raise UserError(f"recipe {str(path)!r}: base must be the name of a recipe, got {base!r}.")
    if not isinstance(measured, int | float | str | None) or isinstance(measured, bool):
        raise UserError(f"recipe {str(path)!r}: measured must be a number or text, got {measured!r}.")
    if not isinstance(paper, list):
        raise UserError(f"recipe {str(path)!r}: paper must be a list of rows, got {paper!r}.")
    return RecipeFile(options, base, [_paper_row(entry) for entry in paper], measured)


def _paper_row(entry: Any) -> PaperRow:
    if not isinstance(entry, dict) or not {"table", "row"} <= entry.keys():
        raise UserError(f"recipe: a row of paper must be {{table: ..., row: ..., top1: ...}}, got {entry!r}.")
    known = [field.name for field in dataclasses.fields(PaperRow)]
    for key in entry:
        if key not in known:
            raise unknown("key in a recipe's row of paper:", key, known)
    return PaperRow(**entry)


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if not path.exists():
            names = (path.stem for path in RECIPES.glob("*.yaml"))
            raise unknown("recipe", name, names, "python -m tasn_timm recipes; a file's name ends in .yaml")
    elif not path.exists():
        raise UserError(f"there is no recipe file {name!r}; give a path to a YAML file or the name of a recipe.")
    return path


def _find_base(name: str, path: Path) -> Path:
    """File of the base that the recipe at `path` names; where that is a path, it is relative to the recipe's."""
    if name.endswith((".yaml", ".yml")):
        return _find(str(path.parent / name))
    if (BASES / f"{name}.yaml").exists():
        return BASES / f"{name}.yaml"
    if not (RECIPES / f"{name}.yaml").exists():
        names = [p.stem for folder in (BASES, RECIPES) for p in folder.glob("*.yaml")]
        raise unknown(f"base in recipe {path.name!r}:", name, names)
    return RECIPES / f"{name}.yaml"


def _resolve(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a file over those of its bases; `above` are the files that led here."""
    if path.resolve() in above:
        raise UserError(f"recipe {path.name!r} is its own base: {' -> '.join(p.name for p in (*above, path))}.")
    file = read_recipe_file(path)
    if file.base is None:
        return file.options
    return _override(_resolve(_find_base(file.base, path), (*above, path.resolve())), file.options)


def _override(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `above` in the place of those of `below`, see `load_recipe`."""
    below = below.copy()
    if above.get("model", below.get("model")) != below.get("model"):
        kwargs = below.pop("model_kwargs", None)
        if kwargs and "model_kwargs" not in above and above["model"].startswith("tasn"):
            raise UserError(
                f"recipe: model {above['model']!r} takes the place of {below['model']!r}, which has model_kwargs "
                f"{kwargs}: say with model_kwargs what of them is meant for the new one, nothing for none."
            )
    for name in _ruled_out(below | above).keys() - _ruled_out(below).keys():
        below.pop(name, None)
    for key, value in above.items():
        both = value and isinstance(value, dict) and isinstance(below.get(key), dict)  # {} clears
        below[key] = below[key] | value if both else value
    return below


def _ascend(milestones: list) -> bool:
    """Whether these are numbers of 0 or more, each greater than the one before."""
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in milestones):
        return False
    return all(before < after for before, after in pairwise([-1, *milestones]))


def _ruled_out(options: Mapping[str, Any]) -> dict[str, str]:
    """Names of options that have no effect, and because of what."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(Recipe)}
    options = defaults | dict(options)
    opt, sched, warmup_epochs = options["opt"], options["sched"], options["warmup_epochs"]
    ruled_out = {}
    if sched == "multistep":
        ruled_out["min_lr"] = f"{sched=}"
    else:
        ruled_out |= dict(decay_milestones=f"{sched=}", decay_rate=f"{sched=}")
    if warmup_epochs == 0:
        ruled_out["warmup_lr"] = f"{warmup_epochs=}"
    if opt in list_optimizers() and not get_optimizer_info(opt).has_momentum:
        ruled_out["momentum"] = f"{opt=}"
    return ruled_out


class _KeyValues(ParseKwargs):
    """timm's, which splits at "=" whether there is one or not."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if value and "=" not in value:
                raise UserError(f"{option_string} takes KEY=VALUE, such as sample_size=336, got {value!r}.")
        super().__call__(parser, namespace, values, option_string)


def parse_args(args: list[str]) -> tuple[str, Recipe, Launch]:
    """Parse the command line of train_accelerate.py.

    Args:
        args: What follows the script's name. Options may be written with "-" or "_".

    Returns:
        Name of the recipe, the recipe with the command line's overrides, and what to do with it.
    """
    parser = Parser(
        description="Train TASN, or any timm model, with Hugging Face Accelerate.",
        epilog="example: accelerate launch train_accelerate.py --epochs 30 --model-kwargs heads=shared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="synthbirds", help="recipe name or YAML file (default: synthbirds)")
    defaults = vars(Recipe()) | vars(Launch())
    for entry in (*dataclasses.fields(Recipe), *dataclasses.fields(Launch)):
        default = defaults[entry.name]
        text = f"{entry.metadata['help']} (default: {'null' if default is None else default})"
        options = dict(dest=entry.name, default=argparse.SUPPRESS, help=text)
        flag = f"--{entry.name.replace('_', '-')}"
        if entry.type is dict:
            parser.add_argument(flag, nargs="*", action=_KeyValues, metavar="KEY=VALUE", **options)
        elif entry.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag, type=_text_or_yaml(entry), metavar="VALUE", **options)
    overrides, rest = parser.parse_known_args([_dashed(argument) for argument in args])
    if rest:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise unknown("argument", rest[0], flags, "--help")
    overrides = vars(overrides)
    name = overrides.pop("recipe")
    launch = {entry.name: overrides.pop(entry.name) for entry in dataclasses.fields(Launch) if entry.name in overrides}
    return recipe_name(name), load_recipe(name, overrides), Launch(**launch)


def _text_or_yaml(entry: dataclasses.Field) -> Callable[[str], Any]:
    """How the command line's text for an option is read: as it stands where text is meant, else as YAML."""

    def read(text: str) -> Any:
        if entry.type is str or (entry.type == str | None and text != "null"):
            return text
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise argparse.ArgumentTypeError(f"cannot be read from {text!r}: write it as in a recipe") from None

    return read


def _dashed(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value if option.startswith("--") else argument


def recipe_name(name: str) -> str:
    """What a recipe is called: its name, or that of its file."""
    return Path(name).stem


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every option, defaults included, as YAML that `load_recipe` reads."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def _typed(entry: dataclasses.Field, value: Any) -> Any:
    """Check a value against the option's type; numbers may come as text ("4e-3" is text in YAML)."""
    union = typing.get_origin(entry.type) in (typing.Union, types.UnionType)
    kinds = typing.get_args(entry.type) if union else (entry.type,)
    if value is None and types.NoneType in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        value = "no" if value is False else value  # YAML reads no as false
        if value not in typing.get_args(kind):
            raise unknown(f"{entry.name} in recipe:", value, typing.get_args(kind))
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"recipe: {entry.name} must be {KINDS[kind]}, got {value!r}.")
    return value


def _check_range(entry: dataclasses.Field, value: Any) -> None:
    must_be = entry.metadata["must_be"]
    if must_be and value is not None and not _RANGES[must_be](value):
        _, null, means = entry.metadata["help"].partition("; null: ")
        raise UserError(f"recipe: {entry.name} must be {must_be}, got {value}{null}{means}.")
