"""Photos to vectors: time and memory of plain sentence-transformers, and of ours with exact and with fast decoding.

    .venv/bin/python benchmarks/photos.py                                   # 200 photos, two cores, about 15 minutes
    .venv/bin/python benchmarks/photos.py --pictures DIR                    # vectors of fast and of exact decoding
    .venv/bin/python benchmarks/photos.py --parts ways ahead --device cuda  # the shapes of 2B, with a GPU

The photos are JPEGs of 2 to 24 megapixels, made of the photographs that scikit-learn and gradio ship: mirrored,
enlarged, and with noise, as a sensor has, so that they take as many bytes a pixel as photos do. Weights are random.
Each measurement has a process of its own, on the first one or two cores. Linux only. Parts:

- prepare: one photo of 12 megapixels, from the file to tensors, in processor time of one core;
- ways: plain sentence-transformers (its own `Transformer.preprocess`, padded), `encode` and `embed`;
- ahead: JPEGs against tensors that are ready, for a device of 10 ms a photo that sleeps, and for a tiny model;
- memory: resident memory while 5,000 photos are embedded;
- pictures: cosine, ranks and pixels of fast against exact decoding, over a folder of real pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gradio
import numpy as np
import sklearn.datasets
import torch
from embed import Claim, verdict_table
from embed_memory import peak_memory
from embed_models import Models
from PIL import ExifTags, Image
from sentence_transformers.base.modules import Transformer
from torch.nn.functional import normalize

from puma_hf.embedding.embed import embed, iterate_embeddings

SOURCES = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
SOURCES += [Path(gradio.__file__).parent / "media_assets" / "images" / name for name in ("cheetah1.jpg", "tower.jpg")]
SHAPES = ((4, 3), (3, 2), (16, 9), (3, 4), (1, 1))
DEVICE_SECONDS = 0.010  # of a photo, on a device that is simulated
OPTIONS = {decode: {"processing_kwargs": {"image": {"decode": decode}}} for decode in ("exact", "fast")}
# Function, decoding, worker processes. Threads are as many as torch has: one for each core of the run.
WAYS: dict[str, tuple[str, str, int]] = {
    "sentence-transformers": ("plain", "exact", 0),
    "encode, exact": ("encode", "exact", 0),
    "encode, fast": ("encode", "fast", 0),
    "embed, exact, 2 workers": ("embed", "exact", 2),
    "embed, fast": ("embed", "fast", 0),
    "embed, fast, 2 workers": ("embed", "fast", 2),
}


def make_photo(generator: np.random.Generator, megapixels: float) -> bytes:
    """A JPEG of so many megapixels: a mirrored crop, enlarged two to four times, with noise."""
    with Image.open(SOURCES[generator.integers(len(SOURCES))]) as opened:
        source = np.asarray(opened.convert("RGB"))
    across, down = SHAPES[generator.integers(len(SHAPES))]
    unit = (megapixels * 1e6 / (across * down)) ** 0.5
    width, height = round(across * unit), round(down * unit)
    scale = generator.uniform(2, 4)
    # Rows and columns of the photograph to and fro, from a random place on.
    rows, columns = (
        np.abs((np.arange(round(length / scale)) + generator.integers(side)) % (2 * side - 2) - side + 1)
        for length, side in ((height, source.shape[0]), (width, source.shape[1]))
    )
    large = np.asarray(Image.fromarray(source[rows][:, columns]).resize((width, height), Image.Resampling.BICUBIC))
    grain = (generator.standard_normal((512, 512)) * generator.uniform(2, 5)).astype(np.int16)
    noise = np.tile(grain, (-(-height // 512), -(-width // 512)))[:height, :width, None]
    photo = Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = int(generator.choice([1, 1, 1, 3, 6, 8]))
    quality, progressive = int(generator.integers(85, 93)), bool(generator.random() < 0.15)
    photo.save(stream, "JPEG", quality=quality, subsampling="4:2:0", progressive=progressive, exif=exif)
    return stream.getvalue()


def load(args: argparse.Namespace) -> Any:
    torch.set_num_threads(args.cores)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    models = Models(args.model, device=args.device, dtype=dtype, max_visual_tokens=args.tokens, seed=0)
    return models.at(12 if models.num_layers == 28 else models.num_layers // 2)


def prepare(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of processor time from 12 megapixels to tensors, for each decoding: means of five photos."""
    process, spent = load(args)[0].preprocess, {f"{decode} ms": 0.0 for decode in OPTIONS}
    for photo in (make_photo(np.random.default_rng(number), 12) for number in range(5)):
        for decode in OPTIONS:
            times = []
            for _ in range(7):
                start = time.process_time()
                with torch.inference_mode():
                    process([{"image": photo}], **OPTIONS[decode])
                times.append(1000 * (time.process_time() - start))
            spent[f"{decode} ms"] += median(times) / 5
    return spent


def way(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, processor time and peak memory of one way with all photos; seconds of the model apart."""
    model, inputs, in_model = load(args), [{"image": file} for file in args.files], [0.0]
    module, (function, decode, workers) = model[0], WAYS[args.way]
    forward = getattr(module, name := "_plain" if function == "plain" else "embed_batch")

    def timed(*given: Any, **more: Any) -> Any:
        start = time.perf_counter()
        result = forward(*given, **more)
        in_model[0] += time.perf_counter() - start  # on a GPU only what it takes to start the work
        return result

    setattr(module, name, timed)
    options = {"show_progress_bar": False, **OPTIONS[decode]}
    if function == "plain":
        module.fast_path, module.preprocess, options = None, partial(Transformer.preprocess, module), {}
    run = partial(embed, model, num_workers=workers) if function == "embed" else model.encode
    run(inputs[:2], **options)
    before, start, in_model[0] = sum(os.times()[:4]), time.perf_counter(), 0.0
    run(inputs, **options)
    seconds, spent = time.perf_counter() - start, sum(os.times()[:4]) - before
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024 if workers else 0
    times = {"photos/s": len(inputs) / seconds, "s": seconds, "of the model": in_model[0], "processor time": spent}
    return {**times, "peak MiB": peak_memory() // 2**20, "of a worker": worker}


def ahead(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a photo from tensors that are ready, and from JPEGs with two workers; a device that sleeps first."""
    model, inputs = load(args), [{"image": file} for file in args.files]
    torch.set_num_threads(1)  # the workers have the rest
    module, found, real = model[0], {}, model[0].embed_batch

    def sleeping(batch: Any) -> dict[str, Any]:
        count = sum(len(part.rows) for part in batch.parts)
        time.sleep(DEVICE_SECONDS * count)
        return {"sentence_embedding": torch.ones(count, model.get_embedding_dimension())}

    few, options = inputs[:64], OPTIONS["fast"]
    ready = [module.packer(**options)(few[first : first + 8]) for first in range(0, len(few), 8)]
    for device, forward in {"sleeping": sleeping, "computing": real}.items():
        module.embed_batch, start = forward, time.perf_counter()
        with torch.inference_mode():
            for batch in ready:
                forward(batch)
        found[f"{device}: ms from tensors"] = 1000 * (time.perf_counter() - start) / len(few)
        before, start = sum(os.times()[:4]), time.perf_counter()
        embed(model, inputs, num_workers=2, **options)
        found[f"from JPEGs, {device}"] = 1000 * (time.perf_counter() - start) / len(inputs)
        found[f"processor ms, {device}"] = 1000 * (sum(os.times()[:4]) - before) / len(inputs)
    return found


def memory(args: argparse.Namespace) -> dict[str, int]:
    """Resident MiB after the first photos and after each tenth of all, which are some files again and again."""
    model, found, done = load(args), {}, 0
    photos = ({"image": args.files[number % len(args.files)]} for number in range(args.memory))
    for indices, _ in iterate_embeddings(model, photos, **OPTIONS["fast"]):
        tenth, done = done * 10 // args.memory, done + len(indices)
        if done * 10 // args.memory > tenth or not found:
            resident = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
            found[f"MiB at {done:,}"] = int(resident) // 1024
    return {**found, "peak": peak_memory() // 2**20}


def pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Fast against exact over a folder: cosines, the share of the top ten that both have, pixels in levels of 255."""
    module, names, pixels, refused = load(args)[0], [], [], []
    rows: dict[str, list[Any]] = {"exact": [], "fast": []}
    levels = 255 * float(np.mean(module.processor.image_processor.image_std))
    for file in sorted(Path(args.pictures).iterdir()):
        batches = []
        for decode in rows:
            try:
                batches.append(module.preprocess([{"image": str(file)}], **OPTIONS[decode]))
            except ValueError as error:
                refused.append(f"{decode}: {error}")
        if len(batches) == 2:
            names.append(file.name)
            pixels.append(levels * float((batches[0]["pixel_values"] - batches[1]["pixel_values"]).abs().mean()))
            with torch.inference_mode():
                for decode, batch in zip(rows, batches, strict=True):
                    rows[decode].append(module(batch)["sentence_embedding"].cpu())
    exact, fast = (normalize(torch.cat(vectors).double(), dim=-1) for vectors in rows.values())
    cosines, num_shown = (exact * fast).sum(dim=1), min(10, len(names) - 1)
    others = [(vectors @ vectors.T).fill_diagonal_(-2) for vectors in (exact, fast)]
    tops = zip(*(own.topk(num_shown).indices.tolist() for own in others), strict=True)
    return {
        "pictures": len(names),
        "lowest cosine": float(cosines.min()),
        "mean cosine": float(cosines.mean()),
        "of two pictures": float(others[0][others[0] > -2].mean()),
        "of the top ten": float(np.mean([len({*one} & {*other}) / num_shown for one, other in tops])),
        "pixels, of 255": float(np.mean(pixels)),
        "worst": [(names[at], round(float(cosines[at]), 6), round(pixels[at], 2)) for at in cosines.argsort()[:5]],
        "refused": refused,
    }


PARTS = {"prepare": prepare, "ways": way, "ahead": ahead, "memory": memory, "pictures": pictures}


def run(args: argparse.Namespace, part: str, cores: int, **changes: Any) -> dict[str, Any]:
    """What a part measures in a fresh process, on the first so many of this one's cores."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--run", part],
        input=json.dumps({**vars(args), **changes, "cores": cores}),
        env={**os.environ, "OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        preexec_fn=partial(os.sched_setaffinity, 0, sorted(os.sched_getaffinity(0))[:cores]),
    )
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All that is asked for, each as a row that is printed as it comes."""
    small = {} if args.device == "cuda" else {"model": "tiny"}
    jobs: dict[str, list[tuple[int, dict[str, Any]]]] = {
        "prepare": [(1, {})],
        "ways": [(cores, {"way": name}) for cores in (1, 2) for name in args.ways],
        "ahead": [(2, small)],
        "memory": [(2, small)],
        "pictures": [(1, {"tokens": tokens, **small}) for tokens in args.visual_tokens],
    }
    found: list[dict[str, Any]] = []
    for part in args.parts:
        for cores, changes in jobs[part]:
            one = {"part": part, "cores": cores, **changes, **run(args, part, cores, **changes)}
            shown = {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in one.items()}
            if not found or found[-1]["part"] != part:
                print("\n| " + " | ".join(shown) + " |\n" + "|---" * len(shown) + "|")
            print("| " + " | ".join(map(str, shown.values())) + " |", flush=True)
            found.append(one)
    return found


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """What was measured, beside what it should be."""
    by_cores = {one["cores"]: one["photos/s"] for one in found if one.get("way") == "encode, fast"}
    made = [("encode, fast: photos/s on two cores / on one", by_cores[2] / by_cores[1], 1.7)] if by_cores else []
    for one in found:
        if one["part"] == "prepare":
            made.append(("12 megapixels on one core, fast: 40 / ms", 40 / one["fast ms"], 1.0))
            made.append(("12 megapixels on one core: exact / fast", one["exact ms"] / one["fast ms"], 6.0))
        for device in ("sleeping", "computing") if one["part"] == "ahead" else ():
            share = one[f"{device}: ms from tensors"] / one[f"from JPEGs, {device}"]
            made.append((f"{device} device, two workers: of the photos/s from tensors", share, 0.9))
        for name, bound in (("lowest", 0.999), ("mean", 0.9999)) if one["part"] == "pictures" else ():
            made.append((f"{one['tokens']} tokens: {name} cosine", one[f"{name} cosine"], bound))
    return [Claim(*one) for one in made]


def main() -> None:
    if "--run" in sys.argv:
        print(json.dumps(PARTS[sys.argv[2]](argparse.Namespace(**json.load(sys.stdin)))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS][:-1], default=["prepare", "ways", "ahead"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--count", type=int, default=200, help="photos")
    parser.add_argument("--memory", type=int, default=5000, help="photos of the part memory")
    parser.add_argument("--pictures", help="folder of pictures: only the last part")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[64, 128, 300], help="of the part pictures")
    parser.add_argument("--tokens", type=int, default=300, help="most visual tokens of the other parts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="shapes, of embed_models.py; by default small, and 2b on cuda")
    parser.add_argument("--folder", help="where the photos are made, and found again; by default they are removed")
    parser.add_argument("--json", help="file to write the measurements to")
    args = parser.parse_args()
    args.model = args.model or ("2b" if args.device == "cuda" else "small")
    args.parts = ["pictures"] if args.pictures else args.parts
    with tempfile.TemporaryDirectory() as temporary:
        Path(args.folder or temporary).mkdir(parents=True, exist_ok=True)
        needed = args.count if {"ways", "ahead", "memory"} & {*args.parts} else 0
        args.files = [str(Path(args.folder or temporary) / f"{number:05}.jpg") for number in range(needed)]
        for number, file in enumerate(args.files):
            if not Path(file).exists():
                generator = np.random.default_rng(number)
                Path(file).write_bytes(make_photo(generator, float(np.exp(generator.uniform(*np.log((2, 24)))))))
        about = f"{needed} photos of {sum(map(os.path.getsize, args.files)) / 1e6:.0f} MB"
        print(f"{about}; model {args.model}, {args.tokens} visual tokens, load {os.getloadavg()[0]:.1f} before\n")
        found = measure(args)
    print("\n" + verdict_table(claims(found)))
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
