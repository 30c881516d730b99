"""Every check that waits for a GPU, in one command of at most 25 minutes: what puma-hf does there was written on a CPU.

    .venv/bin/python benchmarks/gpu.py                    # all of it; run it again to go on where it ended
    .venv/bin/python benchmarks/gpu.py --minutes 9        # only as much as fits, the rest another time
    .venv/bin/python benchmarks/gpu.py --only attention fast_path --again
    .venv/bin/python benchmarks/gpu.py --list

Weights are random; no download is made. Each check runs in a process of its own, so that one that crashes or runs out
of memory ends alone, and what is done stands in `docs/gpu.json`, which the page "What was verified" shows. A result of
another commit, device or torch is not counted as done. Without a CUDA GPU the checks are listed and the command ends.
`--rehearse` runs them at tiny shapes on the CPU instead, to see that this program works; it writes no result.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "gpu.json"
CONFIGS = ROOT / "configs"
BACKBONE = ROOT / "demo" / "backbone"
LEFT_OUT, KEPT = "left out", 12
GIB = 2**30
Figures = dict[str, Any]


class LeftOut(Exception):
    """A check that cannot be made here, with the reason."""


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        says: What holds if it succeeds.
        minutes: What it takes at most; one that takes longer is ended.
        run: Makes it on a device; returns its figures, raises `AssertionError` if it does not hold.
    """

    says: str
    minutes: float
    run: Callable[[str], Figures]


def holds(claim: bool, message: str) -> None:
    """Raise AssertionError with the message if the claim is false; `python -O` does not remove it."""
    if not claim:
        raise AssertionError(message)


# --- the fast path


def attention(device: str) -> Figures:
    """Blocks with and without shared prefixes, causal and not, against float32 attention of each sequence alone."""
    from puma_hf.modeling import attention_puma
    from puma_hf.modeling.attention_puma import Block, attend, blocks_of_lengths, sequences_of

    # Two prefixes of 30 and 50 tokens; three sequences with the first, one with the second, then one without.
    prefixes = blocks_of_lengths([30, 50])
    first = (Block(2, 40, 40, 80, 80, 0, 30), Block(1, 1, 1, 160, 160, 0, 30))
    shared = (*prefixes, *first, Block(1, 7, 7, 161, 161, 30, 50))
    layouts = {"alone": blocks_of_lengths([1, 700, 33, 33, 5]), "shared prefix": shared}
    worst: dict[str, float] = {}
    for name, blocks in layouts.items():
        sequences = sequences_of(blocks)
        total = sum(block.count * block.num_queries for block in blocks)
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(total, heads, 128, generator=generator) for heads in (28, 4, 4))
        for causal in (True, False):
            exact = attend(query, key, value, sequences, scale=128**-0.5, causal=causal)  # float32, on the CPU
            halves = (part.to(device, torch.bfloat16) for part in (query, key, value))
            fast = attend(*halves, sequences.to(device), scale=128**-0.5, causal=causal)
            worst[f"{name}{', causal' if causal else ''}"] = (fast.float().cpu() - exact).abs().max().item()
    holds(max(worst.values()) < 0.03, f"largest differences {worst}, bfloat16 explains 0.03")
    uses_kernel = device == "cuda" and attention_puma._has_varlen(torch.device(device), 128)
    if device == "cuda" and not uses_kernel:
        raise LeftOut(f"torch {torch.__version__} has no varlen_attn with scale and window; blocks: {worst}")
    return {"largest difference": max(worst.values()), "varlen kernel": uses_kernel}


def fast_path(device: str) -> Figures:
    """The vectors of `encode` with the fast path and without, in both precisions, of texts, images and both."""
    figures: Figures = {}
    on_gpu = device == "cuda"
    shapes = [("small", torch.float32), ("2b", torch.bfloat16)] if on_gpu else [("tiny", torch.float32)]
    for shape, dtype in shapes:
        figures |= _fast_against_plain(shape, dtype, device, "sdpa")
    return figures


def flash_attention(device: str) -> Figures:
    """The plain path with flash-attn against the plain path with SDPA."""
    if importlib.util.find_spec("flash_attn") is None:
        raise LeftOut("flash-attn is not installed: pip install 'puma-hf[flash-attn]'")
    return _fast_against_plain("2b", torch.bfloat16, device, "flash_attention_2")


def _fast_against_plain(shape: str, dtype: torch.dtype, device: str, implementation: str) -> Figures:
    from embed_contestants import fast_path as with_fast_path
    from embed_models import Models
    from embed_workloads import workloads

    from puma_hf.modeling.fast_path_puma import FastPath

    models = Models(shape, device=device, dtype=dtype, max_visual_tokens=256, seed=0)
    model = models.at(models.num_layers // 2)
    module: Any = model[0]
    chosen = workloads(module.processor.tokenizer, device="cpu", scale=0.25, seed=0)
    lowest = 1.0
    for workload in chosen.values():
        vectors = []
        for setting in (FastPath(), None):
            # Only the plain path asks transformers for an attention of this name.
            module.model.set_attn_implementation("sdpa" if setting else implementation)
            with with_fast_path(model, setting):
                vectors.append(model.encode(workload.inputs, prompt=workload.prompt, convert_to_tensor=True).double())
        lowest = min(lowest, (vectors[0] * vectors[1]).sum(dim=1).min().item())
    bound = 1 - 1e-5 if dtype == torch.float32 else 0.999
    holds(lowest >= bound, f"{shape}, {dtype}: lowest cosine {lowest:.6f} of fast and plain, at least {bound} expected")
    return {f"1 - cosine, {shape}, {str(dtype).removeprefix('torch.')}": 1 - lowest}


def tests(device: str) -> Figures:
    """The tests that are skipped without a GPU: `embed` with and without worker processes, pinned copies."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed: pip install pytest")
    # The others would ask for every extra when they are collected.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    ran = "skipped" if device == "cpu" else "passed"
    holds(done.returncode == 0 and ran in last, done.stdout[-2000:] + done.stderr[-2000:])
    return {"pytest": last}


def throughput(shape: str) -> Callable[[str], Figures]:
    """Inputs a second beside plain sentence-transformers, from `embed.py`."""

    def run(device: str) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "embed.json"
            # A quarter of the inputs: `encode` reads pictures in its own process, 6 ms each, and half of the ways are
            # `encode`. "half" is captions and images as they come.
            options = ["--device", device, "--json", str(output), "--repeats", "3", "--workloads", "captions", "images"]
            options += ["--model", shape, "--num-kept-layers", str(KEPT), "--scale", "0.25"]
            if device == "cpu":
                options = ["--json", str(output), "--repeats", "1", "--scale", "0.05", "--workloads", "captions"]
                options += ["--model", "tiny"]
            _benchmark("embed.py", *options)
            measured = json.loads(output.read_text())
        rates = {f"{r['contestant']}, {r['workload']}": r["num_inputs"] / r["median"] for r in measured["results"]}
        return {f"{name}, inputs/s": round(rate, 1) for name, rate in rates.items()}

    return run


# --- training


def teachers(device: str) -> Figures:
    """A step of distillation with each teacher, beside two models held side by side."""
    options = ["--full-size", "--num-kept-layers", str(KEPT)] if device == "cuda" else ["--steps", "1"]
    rows = [_cells(line) for line in _benchmark("teachers.py", *options).splitlines() if line.startswith("|")]
    unit = rows[0][3].split()[-1]
    return {row[0]: f"{row[1]} s, {row[3]} {unit}" for row in rows[2:]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _benchmark(name: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    holds(done.returncode == 0, f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def stage(number: int) -> Callable[[str], Figures]:
    """Some steps of a released stage at 7B shapes, k = 12: batch and precision of its recipe, random weights."""

    def run(device: str) -> Figures:
        from puma_hf.estimate import estimate

        shape, kept = ("7b", KEPT) if device == "cuda" else ("tiny", 2)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            # Stage 2 has no teacher: the layers that are dropped would only be written.
            source = _random_checkpoint(shape, work / "source", device, num_layers=kept if number == 2 else None)
            _command("prune", source, work / "pruned", num_kept_layers=kept, reading="puma-released")
            data = _pairs(work, number, rows=256 if device == "cuda" else 8)
            # The recipe's split is one of M-BEIR's.
            options: dict[str, Any] = {"teacher": source} if number == 1 else {"split": "train"}
            if device == "cpu":
                options |= {"batch_size": 4, "dataloader_num_workers": 2}
            recipe = CONFIGS / f"qwen2_vl_7b_stage{number}.yaml"
            options |= {"max_steps": 3, "save_steps": 0, "logging_steps": 1}
            seconds = _timed_steps()
            _command("train", config=recipe, model=work / "pruned", output=work / "lora", data=data, **options)
            expected = estimate(recipe, model=work / "pruned", tokens=(64, 350)[number - 1])
        figures: Figures = {"seconds a step": round(min(seconds), 3), "estimated GiB": round(expected.peak / GIB, 1)}
        if device == "cuda":
            figures["peak GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
        return figures

    return run


def fsdp(device: str) -> Figures:
    """Two steps of stage 2 under FSDP2, on as many GPUs as there are, or as two processes of a CPU."""
    number = torch.cuda.device_count() if device == "cuda" else 2
    config = str(CONFIGS / "accelerate_fsdp2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", str(number), "--main_process_port", "0"]
    return _small_training(launch, "DTensor", device)


def four_bits(device: str) -> Figures:
    """Two steps of stage 2 on a base in 4 bits (QLoRA); in all its bits on a CPU."""
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed: pip install 'puma-hf[qlora]'")
    on_gpu = device == "cuda"
    more = ["--load-in-4bit"] if on_gpu else []
    return _small_training([sys.executable], "Linear4bit" if on_gpu else "Linear", device, *more)


def _small_training(launch: list[str], expected: str, device: str, *options: str) -> Figures:
    """Two steps by a launcher, of a model that has parts of the expected class."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _command("prune", BACKBONE, work / "pruned", num_kept_layers=4)
        words = [str(work / "pruned"), str(work / "lora"), "--data", str(ROOT / "demo" / "emoji"), "--bf16", *options]
        words += ["--max-steps", "2", "--batch-size", "16", "--logging-steps", "1", "--save-steps", "1"]
        # accelerate's launcher for GPUs starts processes on a CPU, too, if it is told so here.
        on_cpu = {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"} if device == "cpu" else {}
        command = [*launch, __file__, "--train", json.dumps(words), "--expect", expected]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **on_cpu})
        holds(done.returncode == 0, done.stderr[-2000:])
        holds((work / "lora" / "adapter_model.safetensors").is_file(), "no adapter was written")
    return {}


def train_here(words: list[str], expected: str) -> None:
    """`puma-hf train` in this process; without parts of the expected class it would say nothing of what is checked."""
    from puma_hf import PumaTrainer
    from puma_hf.cli import app

    if os.environ.get("ACCELERATE_USE_CPU"):
        _shard_on_cpu()
    step = PumaTrainer.training_step

    def checked(trainer: Any, *arguments: Any, **options: Any) -> Any:
        kinds = {type(part).__name__ for part in (*trainer.model.modules(), *trainer.model.parameters())}
        holds(expected in kinds, f"the model that is trained has no {expected}, but {sorted(kinds)}")
        return step(trainer, *arguments, **options)

    PumaTrainer.training_step = checked  # type: ignore[method-assign]
    app(["train", *words], standalone_mode=False)


def _shard_on_cpu() -> None:
    """Let accelerate use FSDP on a CPU: it leaves it out there without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(state: Any, *arguments: Any, **options: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(options.get("cpu", False))
            if PartialState().distributed_type == DistributedType.MULTI_CPU:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(state, *arguments, **options)

    AcceleratorState.__init__ = init


def _random_checkpoint(shape: str, folder: Path, device: str, num_layers: int | None) -> Path:
    """A random stock Qwen2-VL with the demo's tokenizer, whose few words are the first rows of its embedding."""
    from embed_models import PATCH_SIZE, SHAPES, Models
    from transformers import AutoImageProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    shapes = copy.deepcopy(SHAPES[shape])
    shapes["text_config"]["num_hidden_layers"] = num_layers or shapes["text_config"]["num_hidden_layers"]
    config = Qwen2VLConfig(**shapes, **Models._token_ids(), tie_word_embeddings=False)
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    for path in BACKBONE.glob("*token*.json"):
        shutil.copy(path, folder)
    pixels = (2 * PATCH_SIZE) ** 2
    size = {"shortest_edge": 4 * pixels, "longest_edge": 300 * pixels}
    AutoImageProcessor.from_pretrained(BACKBONE, patch_size=PATCH_SIZE, size=size).save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return folder


def _pairs(work: Path, stage: int, rows: int) -> Path:
    """Pairs of texts of some 24 words for stage 1, and of a caption and an image of 300 visual tokens for stage 2."""
    import numpy as np
    from embed_workloads import jpeg, one_token_words
    from transformers import AutoTokenizer

    generator = np.random.default_rng(0)
    words = one_token_words(AutoTokenizer.from_pretrained(BACKBONE))
    texts = [" ".join(generator.choice(words, 24)) for _ in range(2 * rows)]
    lines = [{"sent0": texts[2 * row], "sent1": texts[2 * row + 1]} for row in range(rows)]
    if stage == 2:
        lines = []
        for row in range(rows):
            image = work / f"{row}.jpg"
            image.write_bytes(jpeg(generator, (560, 420)))
            lines.append({"anchor": texts[row], "positive_image": str(image)})
    path = work / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _timed_steps() -> list[float]:
    """A list that the seconds of every training step from now on are added to."""
    from puma_hf import PumaTrainer

    seconds: list[float] = []
    step = PumaTrainer.training_step

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        loss = step(*arguments, **options)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        return loss

    PumaTrainer.training_step = timed  # type: ignore[method-assign]
    return seconds


def _command(name: str, *arguments: object, **options: object) -> None:
    from puma_hf.cli import app

    words = [name, *map(str, arguments)]
    for option, value in options.items():
        flag = option.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", *([] if value is True else [str(value)])]
    app(words, standalone_mode=False)


# In the order of what the others rest on. The minutes are guesses for an H100-class GPU.
CHECKS = {
    "attention": Check("the varlen kernel masks as blocks do: causal from the last key, prefixes shared", 1, attention),
    "fast_path": Check("the fast path gives the plain path's vectors, float32 and bfloat16", 2, fast_path),
    "flash_attention": Check("flash-attn gives the vectors of the fast path", 2, flash_attention),
    "tests": Check("the tests that need a GPU pass", 2, tests),
    "stage1": Check("steps of the released stage 1 at 7B shapes, k = 12: time and memory", 4, stage(1)),
    "stage2": Check("steps of the released stage 2 at 7B shapes, k = 12: time and memory", 4, stage(2)),
    "throughput_2b": Check("inputs a second at 2B, beside sentence-transformers", 3, throughput("2b")),
    "throughput_7b": Check("inputs a second at 7B, beside sentence-transformers", 4, throughput("7b")),
    "teachers": Check("steps with each teacher at 7B shapes, k = 12", 3, teachers),
    "fsdp": Check("two steps under FSDP2", 1, fsdp),
    "four_bits": Check("two steps on a base in 4 bits", 1, four_bits),
}


# --- all of them


def where() -> dict[str, str]:
    """What a result belongs to."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD:puma_hf"]
    code = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"puma_hf": code or "unknown", "device": torch.cuda.get_device_name(), "torch": torch.__version__}


def make(name: str, minutes: float, rehearse: bool) -> dict[str, Any]:
    """The record of one check, made in a process of its own."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--run", name, "--output", str(output)]
        command += ["--rehearse"] if rehearse else []
        # Of a check that is ended, nothing may stay: in a session of its own what it has started ends with it instead
        # of keeping the GPU, and the checkpoints of 7B shapes that it has written are in this folder.
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options |= {"start_new_session": True, "env": {**os.environ, "TMPDIR": folder}}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            _, errors = process.communicate(timeout=None if rehearse else 60 * minutes)
            ended = f"ended with {process.returncode}: {errors.strip()[-1500:]}"
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            ended = f"took more than {minutes} minutes"
        found = json.loads(output.read_text()) if output.is_file() else {"verdict": "failed", "why": ended}
    return found | {"seconds": round(time.monotonic() - start)}


def run_here(name: str, device: str) -> dict[str, Any]:
    """The record of one check, made in this process."""
    try:
        return {"verdict": "holds", "figures": CHECKS[name].run(device)}
    except LeftOut as error:
        return {"verdict": LEFT_OUT, "why": str(error)}
    except AssertionError as error:
        return {"verdict": "failed", "why": str(error)}


def table(records: dict[str, Any]) -> str:
    """All checks, those not made yet too, as a Markdown table."""
    lines = ["| check | verdict | figures |", "|---|---|---|"]
    for name, check in CHECKS.items():
        record = records.get(name, {"verdict": "not run"})
        figures = "; ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in record.get("figures", {}).items()
        )
        why = (record.get("why", "").splitlines() or [""])[-1]  # of an error the message, which stands last
        lines.append(f"| {check.says} | {record['verdict']} | {figures or why[:200]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the checks and end")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks alone")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--minutes", type=float, default=25, help="begin no check that might end later")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; writes no result")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--run", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--expect", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train_here(args.train, args.expect)
        return
    if args.run:
        args.output.write_text(json.dumps(run_here(args.run, "cpu" if args.rehearse else "cuda")))
        return
    if args.list or not (args.rehearse or torch.cuda.is_available()):
        for name, check in CHECKS.items():
            print(f"{name:16} {check.minutes:2g} min  {check.says}")
        if not args.list:
            print("\nNone was run: torch sees no CUDA GPU.")
        return
    start = time.monotonic()
    here = {"device": "CPU"} if args.rehearse else where()
    records: dict[str, Any] = {}
    if args.output.is_file() and not args.rehearse:
        stored = json.loads(args.output.read_text(encoding="utf-8"))
        records = stored["checks"] if stored["where"] == here else {}
    for name in args.only or CHECKS:
        done, left = (
            records.get(name, {}).get("verdict") in ("holds", LEFT_OUT),
            args.minutes * 60 - time.monotonic() + start,
        )
        if done and not args.again:
            print(f"{name}: done before")
            continue
        if CHECKS[name].minutes * 60 > left:
            print(f"{name}: needs up to {CHECKS[name].minutes:g} minutes, {left / 60:.1f} are left; run this again")
            continue
        records[name] = make(name, CHECKS[name].minutes, args.rehearse)
        print(f"{name}: {json.dumps(records[name])}", flush=True)
        if not args.rehearse:
            args.output.write_text(json.dumps({"where": here, "checks": records}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{here}\n\n{table(records)}")


if __name__ == "__main__":
    main()
