"""The card of a trained model: README.md of its folder and of its repository on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from .recipe import PaperRow

# What the Hub takes as `license`, of models; any other one is "other" with a name.
LICENSE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
    """.split()
)

CITATION = """Heliang Zheng, Jianlong Fu, Zheng-Jun Zha, Jiebo Luo: *Looking for the Devil in the Details: Learning
Trilinear Attention Sampling Network for Fine-grained Image Recognition*, CVPR 2019.

```bibtex
@inproceedings{zheng2019looking,
  title = {Looking for the Devil in the Details: Learning Trilinear Attention Sampling Network for Fine-grained Image
           Recognition},
  author = {Zheng, Heliang and Fu, Jianlong and Zha, Zheng-Jun and Luo, Jiebo},
  booktitle = {CVPR},
  year = {2019}
}
```"""


@dataclass
class Measured:
    """What was measured of a model, once, after its training."""

    dataset: str
    split: str
    images: int
    top1: float  # percent
    top5: float | None  # percent
    recipe: str
    command: str
    gflops: float  # per image

    @property
    def metrics(self) -> dict[str, float]:
        """ "top1" and, where it was measured, "top5", in percent."""
        values = dict(top1=self.top1, top5=self.top5)
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class Context:
    """What a card says beside the measured.

    Args:
        title: Of the card.
        source: What `timm.create_model` takes for the model.
        dataset_id: Of the dataset on the Hub; None for others.
        revision: Of that dataset, a commit.
        license: Of the weights; None where nobody said, or those that they started from have more than one.
        figure: File of a figure in the same folder; None for none.
        differences: In what the training was not the named recipe, as text.
        paper: Rows of the paper that the recipe is for.
    """

    title: str
    source: str
    dataset_id: str | None = None
    revision: str | None = None
    license: str | None = None
    figure: str | None = None
    differences: Sequence[str] = ()
    paper: Sequence[PaperRow] = ()


def model_card(model: nn.Module, measured: Measured, context: Context) -> str:
    """Write the card of a timm model, metadata for the Hub included (license, dataset, "model-index" of results)."""
    return "\n\n".join(
        [
            f"---\n{_metadata(measured, context)}\n---",
            f"# {context.title}",
            f"`{model.pretrained_cfg['architecture']}`, {model.num_classes} classes, trained with tasn_timm on "
            f"{_dataset(measured, context)}.",
            *([_figure(context.figure)] if context.figure else []),
            _results(model, measured, context),
            _use(model, context),
            _training(measured, context),
            _limits(model, context),
            f"## Citation\n\n{CITATION}\n",
        ]
    )


def _metadata(measured: Measured, context: Context) -> str:
    dataset = dict(
        dataset_type=context.dataset_id or measured.dataset,
        dataset_name=measured.dataset,
        dataset_split=measured.split,
        dataset_revision=context.revision,
    )
    known = context.license is None or context.license in LICENSES
    data = ModelCardData(
        model_name=context.title,
        library_name="timm",
        pipeline_tag="image-classification",
        license=context.license if known else "other",
        license_name=None if known else context.license,
        datasets=[context.dataset_id] if context.dataset_id else None,
        metrics=["accuracy"],
        tags=["image-classification", "timm", "tasn", "fine-grained"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                metric_type="accuracy",
                metric_name=f"{name} (%)",
                metric_value=round(value, 2),
                **dataset,
            )
            for name, value in measured.metrics.items()
        ],
    )
    return data.to_yaml()


def _dataset(measured: Measured, context: Context) -> str:
    if context.dataset_id is None:
        return f"`{measured.dataset}`"
    at = f" at commit `{context.revision}`" if context.revision else ""
    return f"[{context.dataset_id}](https://huggingface.co/datasets/{context.dataset_id}){at}"


def _figure(file: str) -> str:
    return (
        f"![a picture; where the model looks; what its backbone sees]({file})\n\nA picture, the attention map over "
        f"it, and the pixels that are sampled for the backbone."
    )


def _results(model: nn.Module, measured: Measured, context: Context) -> str:
    accuracy = ", ".join(f"{name} {value:.2f} %" for name, value in measured.metrics.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = {}  # the same one may be in several tables
    for row in context.paper:
        figures.setdefault(row.top1, []).append(f"Table {row.table}, {row.row}")
    paper = "".join(
        f"\n- The paper reports {top1:.1f} % ({'; '.join(rows)}); measured here: {measured.top1:.1f} %."
        for top1, rows in figures.items()
    )
    return f"""| split | images | accuracy | parameters | GFLOPs an image |
|---|---|---|---|---|
| {measured.split} | {measured.images} | {accuracy} | {parameters / 1e6:.2f} M | {measured.gflops:.4g} |

The split was read once, after training; one centre crop an image. FLOPs are those of convolutions and matrix products,
two per multiply-add.{chr(10) if paper else ""}{paper}"""


def _use(model: nn.Module, context: Context) -> str:
    return f"""## Use

```python
import timm, tasn_timm  # the import registers the architecture

model = timm.create_model("{context.source}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)
logits = model(transform(image).unsqueeze(0))  # from a PIL image; (1, {model.num_classes})
model.pretrained_cfg["label_names"][logits.argmax()]
```"""


def _training(measured: Measured, context: Context) -> str:
    other = f", except: {', '.join(context.differences)}" if context.differences else ""
    return f"""## Training

Recipe `{measured.recipe}`{other}. Every option as used is in `recipe.yaml`. Command:

```bash
{measured.command}
```"""


def _limits(model: nn.Module, context: Context) -> str:
    license = (
        f"As far as its author says, the licence of these weights is {context.license}"
        if context.license
        else "No licence is stated for these weights: what they started from has none, or more than one"
    )
    return f"""## Limits and licence

It knows the {model.num_classes} classes of its dataset and nothing else: any other picture gets one of their names.
How it does on pictures of other cameras, places and seasons than its dataset's was not measured.

{license}; the pictures that it was trained on have terms of their own."""
