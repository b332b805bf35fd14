"""Draw the README's picture with the checkpoint that ships with the package: python tests/benchmarks/readme_picture.py

It is the figure of `python -m tasn_timm visualize tasn_tiny ... --parts 2`, for three birds of the test split, with
fewer colours.
"""

import io
from pathlib import Path

from PIL import Image

from tasn_timm.data import synthbirds
from tasn_timm.figures import attention_figure
from tasn_timm.gaze import look
from tasn_timm.hub import load_model

INDICES = (1, 14, 19)
DPI = 86  # for less than 300 KB


def main() -> None:
    model = load_model("tasn_tiny")
    gazes = [look(model, Image.fromarray(synthbirds.draw("test", index)), details=2) for index in INDICES]
    names = [model.pretrained_cfg["label_names"][gaze.probabilities.argmax()] for gaze in gazes]
    captions = [f"{name}, {100 * gaze.probabilities.max():.0f} %" for name, gaze in zip(names, gazes)]
    png = io.BytesIO()
    attention_figure(gazes, captions).savefig(png, dpi=DPI)
    path = Path(__file__).parents[2] / ".github" / "synthbirds.png"
    sheet = Image.open(png).convert("RGB")
    palette = sheet.quantize(256, kmeans=1)
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    right = [name == synthbirds.CLASS_NAMES[index % 24] for name, index in zip(names, INDICES)]
    print(f"{path}: {path.stat().st_size:,} bytes, {sum(right)} of {len(right)} recognised")


if __name__ == "__main__":
    main()
