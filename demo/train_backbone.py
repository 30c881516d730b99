"""Train the demo's tiny Qwen2-VL from scratch on the emoji's train split and save it as a stock checkpoint.

`make demo` does not run this: its result, `demo/backbone/`, is committed. Run it to make the backbone anew:

    .venv/bin/python demo/train_backbone.py --output demo/backbone

The model is a Qwen2-VL of 8 layers in every respect but size, with a byte-level BPE tokenizer learnt from the train
texts. It is trained as a retriever (InfoNCE, all layers), so that "the full model" of the demo is worth distilling.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint

from puma_hf import PumaTrainer, evaluate_mbeir, load_mbeir, prune
from puma_hf.modeling import RET_TOKEN

DEMO = Path(__file__).parent
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    RET_TOKEN,
]
PROMPT_WORDS = ["user\n", "\nSummarize above image and sentence in one word: ", "assistant\n", "system\n"]


def train_texts(data: Path) -> Iterator[str]:
    """Every text that the train split shows, with the instructions and the words of the prompt."""
    dataset = load_mbeir(data, "train")
    for row in dataset:
        yield from (
            row["anchor"]["text"] or "",
            row["anchor"]["instruction"] or "",
            row["positive"]["text"] or "",
        )
    for _ in range(2000):
        yield from PROMPT_WORDS


def build_tokenizer(data: Path, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2-VL's special tokens and `[RET]`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_texts(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=512,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> Qwen2VLForConditionalGeneration:
    """A randomly initialised tiny Qwen2-VL with 8x8 patches."""
    token_id = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # The sections of M-RoPE (time, height, width) must sum to half a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision_config = {
        "depth": 3,
        "embed_dim": 96,
        "hidden_size": hidden_size,
        "num_heads": 3,
        "patch_size": 8,
        "mlp_ratio": 3,
    }
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def save_stock(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save as an ordinary Qwen2-VL checkpoint; a 48x48 image stays 48x48 instead of being enlarged."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 256 * 256}).save_pretrained(
        folder
    )


def train(model: SentenceTransformer, args: argparse.Namespace) -> None:
    """Contrastive training on all eight tasks at once."""
    dataset = load_mbeir(args.data, "train", seed=args.seed, with_ids=True)
    trainer = PumaTrainer(
        model=model,
        train_dataset=dataset.select_columns(["anchor", "positive"]),
        positives=dataset["positives"],
        loss=MultipleNegativesRankingLoss(model, scale=1 / 0.07),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(args.work / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            dataloader_drop_last=True,
            dataloader_num_workers=args.workers,
            dataloader_persistent_workers=args.workers > 0,
            learning_rate=args.learning_rate,
            weight_decay=0.05,
            warmup_steps=args.steps // 20,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_strategy="steps",
            save_steps=400,
            save_total_limit=2,
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO / "emoji", help="dataset in M-BEIR's layout")
    parser.add_argument("--output", type=Path, default=DEMO / "backbone", help="new directory for the checkpoint")
    parser.add_argument("--work", type=Path, default=DEMO / "work", help="checkpoints; run again to resume")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="queries a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocabulary-size", type=int, default=1536)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than one only on idle cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists. Remove it first, or choose another --output.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.data, args.vocabulary_size)
    stock = build_model(tokenizer, args.hidden_size, args.num_layers)
    save_stock(stock, tokenizer, args.work / "random")
    prune(args.work / "random", args.work / "full", num_kept_layers=args.num_layers, overwrite=True)
    model = SentenceTransformer(str(args.work / "full"), trust_remote_code=True)
    train(model, args)
    stock.model.load_state_dict(model[0].model.state_dict())
    save_stock(stock, tokenizer, args.output)
    print(evaluate_mbeir(model, args.data, split="val", pool="local", show_progress_bar=False).to_markdown())


if __name__ == "__main__":
    main()
