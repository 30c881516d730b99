"""Peak memory and time of a distillation step with each teacher, beside two models held side by side.

    .venv/bin/python benchmarks/teachers.py                # 28 small layers on the CPU, k = 7, about two minutes
    .venv/bin/python benchmarks/teachers.py --full-size    # the shapes of Qwen2-VL-7B on a CUDA GPU, k = 8 and 12

Weights are random, and so are the states that `cached` looks up. Each mode runs in a process of its own. On the CPU
its memory is the peak of the resident set during the steps, less what importing the libraries takes (Linux: read from
/proc), and its time that of the processor, on one thread; on a GPU they are what torch has allocated and the clock's.
Operations are counted by torch, and divided by the time of a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from puma_hf import PumaConfig, PumaModel, SelfDistillationLoss, lora_config
from puma_hf.modeling.sentence_transformers_puma import PumaTransformer
from puma_hf.trainer.teachers import FrozenTeacher, Teacher, WholeTeacher

NUM_LAYERS = 28
MODES = {
    "naive": "two models",
    "frozen": "frozen, one copy",
    "cached": "cached",
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
SMALL: dict[str, Any] = {
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {"depth": 8, "embed_dim": 320, "hidden_size": 512, "num_heads": 5, "mlp_ratio": 4},
    "image_token_id": 8000,
    "video_token_id": 8001,
    "vision_start_token_id": 8002,
}
FULL: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
}
TEXT_TOKENS = 34


class InputModule(PumaTransformer):
    """The forward pass of `PumaTransformer`, without a processor."""

    fast_path = None

    def __init__(self, model: PumaModel) -> None:
        nn.Module.__init__(self)
        self.model = model


def build(shapes: dict[str, Any], num_layers: int, device: str, dtype: torch.dtype) -> PumaModel:
    """A random model of the first layers, frozen."""
    config = PumaConfig(**shapes, num_kept_layers=num_layers)
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = PumaModel(config)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False)


def build_student(shapes: dict[str, Any], kept: int, device: str, dtype: torch.dtype, full: PumaModel | None) -> Any:
    """The pruned model with an adapter; its base weights are those of `full` itself if that is given."""
    student = build(shapes, kept, "meta" if full is not None else device, dtype)
    if full is not None:
        weights = {name: weight for name, weight in full.state_dict().items() if name in student.state_dict()}
        student.load_state_dict(weights, assign=True)
        student.visual.rotary_pos_emb = full.visual.rotary_pos_emb  # buffers that no checkpoint holds
        student.language_model.rotary_emb = full.language_model.rotary_emb
    student.add_adapter(lora_config(r=64 if shapes is FULL else 16, dropout=0.0))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student.train()


def images(model: PumaModel, batch_size: int, side: int) -> dict[str, Any]:
    """Features of images of side x side visual tokens, with text."""
    config: Any = model.config
    text = torch.arange(1000, 1000 + TEXT_TOKENS - 1).tolist()
    visual = [config.image_token_id] * side**2
    row = [*text[:16], config.vision_start_token_id, *visual, *text[16:]]
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    features = {
        "input_ids": torch.tensor([row] * batch_size),
        "pixel_values": torch.randn(batch_size * 4 * side**2, patch),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * batch_size),
    }
    return {name: value.to(model.device) for name, value in features.items()}


def measure(mode: str, kept: int, full_size: bool, batch_size: int, steps: int) -> dict[str, float]:
    """Seconds, peak bytes, bytes of weights and operations of a step in this process."""
    torch.set_num_threads(1)
    before = resident()
    shapes, device, dtype = (FULL, "cuda", torch.bfloat16) if full_size else (SMALL, "cpu", torch.float32)
    full = None if mode == "cached" else build(shapes, NUM_LAYERS, device, dtype).eval()
    student = build_student(shapes, kept, device, dtype, None if mode == "naive" else full)
    model = SentenceTransformer(modules=[InputModule(student)], device=device).train()
    teacher: Teacher | None = None
    if full is not None:
        layers: Any = full.language_model.layers[kept:]
        teacher = {
            "naive": lambda: WholeTeacher(full, student),
            "frozen": lambda: FrozenTeacher(student, layers),
        }[mode]()
    # By address: assigned weights are new parameters on old memory.
    held = {p.data_ptr(): p for module in (student, full) if module is not None for p in module.parameters()}
    weights = sum(p.numel() * p.element_size() for p in held.values())
    loss = SelfDistillationLoss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = images(student, batch_size, 16 if full_size else 8)
    stored = torch.randn(batch_size, shapes["text_config"]["hidden_size"])

    def step() -> None:
        features = dict(batch)
        mixed: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16) if full_size else nullcontext()
        with mixed:
            if teacher is None:
                features["teacher_state"] = stored.to(device)
                value: Tensor = loss([features])
            else:
                teacher.add_states(features)
                value = loss([features])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # also makes the optimizer's state
        step()
    reset_peak(device)
    times = []
    for _ in range(steps):
        start = now(device)
        step()
        times.append(now(device) - start)
    peak = torch.cuda.max_memory_allocated() if full_size else peak_resident() - before
    with FlopCounterMode(display=False) as counter:
        step()
    return {"seconds": median(times), "peak": peak, "weights": weights, "flops": counter.get_total_flops()}


def now(device: str) -> float:
    """Seconds: of the clock once a GPU has done what it was given, of this process on a CPU, which others may share."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: str) -> None:
    """Let the peak count from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Resident bytes of this process."""
    return _status("VmRSS:")


def peak_resident() -> int:
    """Peak resident bytes since the last reset."""
    return _status("VmHWM:")


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024


def run(mode: str, kept: int, args: argparse.Namespace) -> dict[str, float]:
    """The measurements of one mode in a fresh process."""
    command = [sys.executable, __file__, "--mode", mode, "--num-kept-layers", str(kept), "--steps", str(args.steps)]
    command += ["--batch-size", str(args.batch_size), *(["--full-size"] if args.full_size else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode}, k = {kept} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def table(kept: int, results: dict[str, dict[str, float]], full_size: bool) -> str:
    """The results as a markdown table."""
    unit, scale = ("GiB", 2**30) if full_size else ("MiB", 2**20)
    digits = 1 if full_size else 0
    base = results["naive"]
    lines = [
        f"k = {kept} of {NUM_LAYERS}",
        "",
        f"| teacher | s / step | | peak {unit} | | weights {unit} | TFLOP / step | | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, r in results.items():
        ratio = {name: f"{r[name] / base[name]:.2f}x" for name in ("seconds", "peak", "flops")}
        lines.append(
            f"| {MODES[mode]} | {r['seconds']:.2f} | {ratio['seconds']} | {r['peak'] / scale:.{digits}f} | "
            f"{ratio['peak']} | {r['weights'] / scale:.{digits}f} | {r['flops'] / 1e12:.3f} | {ratio['flops']} | "
            f"{r['flops'] / r['seconds'] / 1e12:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="the shapes of Qwen2-VL-7B, on a CUDA GPU")
    parser.add_argument("--num-kept-layers", type=int, help="k; by default 7, and 8 and 12 with --full-size")
    parser.add_argument("--batch-size", type=int, help="images per step; by default 2, and 8 with --full-size")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed; the median is shown")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.full_size and not torch.cuda.is_available():
        raise SystemExit(
            "--full-size needs a CUDA GPU with some 40 GiB, and torch sees none. Leave it out for the CPU."
        )
    args.batch_size = args.batch_size or (8 if args.full_size else 2)
    depths = [args.num_kept_layers] if args.num_kept_layers else ([8, 12] if args.full_size else [7])
    if args.mode:
        print(json.dumps(measure(args.mode, depths[0], args.full_size, args.batch_size, args.steps)))
        return
    tokens = TEXT_TOKENS + (16 if args.full_size else 8) ** 2
    where = torch.cuda.get_device_name() if args.full_size else "CPU, one thread"
    print(f"{args.batch_size} images of {tokens} tokens a step, torch {torch.__version__}, {where}\n")
    for kept in depths:
        results = {mode: run(mode, kept, args) for mode in MODES}
        print(table(kept, results, args.full_size) + "\n")


if __name__ == "__main__":
    main()
