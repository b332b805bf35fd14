"""Start-up time and memory of a training loader over 600,000 images, as many as iNaturalist 2017 has.

    python tests/benchmarks/scale.py                  # 600,000 and, to compare, 60,000 rows; 2 workers

Rows are tiny JPEGs of 5,089 classes in parquet files, as `prepare` writes them. Each measurement is a new process: the
first opening converts parquet to Arrow files, once; the second and all later ones map those into memory. Memory is
what is no mapped file, whose pages are shared and can be dropped at any time: of the main process all of it (most is
imported packages: in brackets), of a worker what it does not share with the main process.
"""

import argparse
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[60_000, 600_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the new processes run
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.cache, options.workers)))
        return
    print("| rows | opening | open | first batch | main process | a worker |")
    print("|---|---|---|---|---|---|")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder, "data"), rows)
            for opening in ("first", "later"):
                command = [sys.executable, __file__, "--measure", folder, "--cache", f"{folder}/cache"]
                command += ["--workers", str(options.workers)]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                seconds = " | ".join(f"{result[key]:.2f} s" for key in ("open", "batch"))
                memory = f"{result['main']:.0f} MB ({result['imports']:.0f} before) | {result['worker']:.0f} MB"
                print(f"| {rows:,} | {opening} | {seconds} | {memory} |", flush=True)


def write_rows(folder: Path, rows: int, shard: int = 50_000) -> None:
    """Parquet files; the same 500 images over and over, under different ids."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(500):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "JPEG")
        jpegs.append(dict(bytes=file.getvalue(), path=None))
    names = [f"species {number}" for number in range(5089)]
    features = Features(image=ImageFeature(), label=ClassLabel(names=names), image_id=Value("string"))
    shards = -(-rows // shard)
    for index in range(shards):
        numbers = range(index * shard, min(rows, (index + 1) * shard))
        columns = dict(
            image=[jpegs[number % 500] for number in numbers],
            label=[number % 5089 for number in numbers],
            image_id=[f"{number}" for number in numbers],
        )
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{index:05}-of-{shards:05}.parquet")


def measure(folder: Path, cache: Path, workers: int) -> dict[str, float]:
    """Open, start the workers, load 20 batches: seconds and megabytes."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    from tasn_timm.data.loading import KeyedBatches, create_train_loader
    from tasn_timm.data.splits import load_splits, pick_split
    from tasn_timm.data.transforms import train_transform

    imports = memory("self", "status", "RssAnon")
    start = time.perf_counter()
    split = pick_split(load_splits(str(folder)), "train", "train_split", "generated")
    opened = time.perf_counter()
    loader = create_train_loader(split, train_transform(24), KeyedBatches(len(split), 0, 96), workers=workers)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in range(20):
        next(batches)
    children = multiprocessing.active_children()
    worker = sum(memory(child.pid, "smaps_rollup", "Private_Dirty") for child in children) / len(children)
    return dict(
        open=opened - start,
        batch=first - opened,
        main=memory("self", "status", "RssAnon"),
        imports=imports,
        worker=worker,
    )


def memory(process: int | str, file: str, kind: str) -> float:
    """Megabytes, as Linux tells them."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


if __name__ == "__main__":
    main()
