"""Peak memory of loading the first layers of a checkpoint, against loading it whole and cutting it afterwards.

    .venv/bin/python benchmarks/prune_memory.py

Writes a random Qwen2-VL of 28 layers and more than 1 GB (bfloat16, ten shards) to a temporary folder. Each way of
loading runs in a process of its own; what importing the libraries takes is measured likewise and subtracted.
Linux only: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

NUM_LAYERS = 28
WAYS = {
    "import": "libraries alone",
    "pruned": "PumaModel.from_pretrained(..., num_kept_layers=k)",
    "cut": "the whole model, cut after it was read",
}


def write_checkpoint(folder: Path) -> int:
    """A random checkpoint; returns its size in bytes."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 8192,
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 4, "embed_dim": 320, "hidden_size": 1536, "num_heads": 4},
    )
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="150MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load(way: str, folder: str, num_kept_layers: int) -> None:
    """Load in one of the ways and print the peak memory of this process and the bytes kept."""
    from puma_hf import PumaModel

    kept = 0
    if way != "import":
        model = PumaModel.from_pretrained(folder, num_kept_layers=num_kept_layers if way == "pruned" else None)
        # Loading maps the files; memory is taken when a weight is first read, as by a forward pass or a copy to a GPU.
        for parameter in model.parameters():
            parameter.sum()
        model.language_model.layers = model.language_model.layers[:num_kept_layers]
        kept = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(peak_memory(), kept)


def peak_memory() -> int:
    """Peak resident bytes of this process. `getrusage` would include those of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run(way: str, folder: Path, num_kept_layers: int) -> tuple[int, int]:
    """Peak bytes and kept bytes of one way, measured in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        "--folder",
        str(folder),
        "--num-kept-layers",
        str(num_kept_layers),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(output[-2]), int(output[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-kept-layers", type=int, default=14)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        load(args.way, args.folder, args.num_kept_layers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"checkpoint: {write_checkpoint(folder) / 2**20:.0f} MiB, {NUM_LAYERS} layers, bfloat16")
        base, _ = run("import", folder, args.num_kept_layers)
        for way in ("pruned", "cut"):
            peak, kept = run(way, folder, args.num_kept_layers)
            print(
                f"{WAYS[way]:<50} kept {kept / 2**20:5.0f} MiB, peak {(peak - base) / 2**20:5.0f} MiB "
                f"above the libraries' {base / 2**20:.0f} MiB = {(peak - base) / kept:.2f} x kept"
            )


if __name__ == "__main__":
    main()
