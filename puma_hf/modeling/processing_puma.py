"""The PUMA processor: text, images, both, or video, with an instruction, to tensors that end in `[RET]`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from transformers import BatchFeature, FeatureExtractionPipeline, Qwen2VLProcessor
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .inputs_puma import (
    MAX_ASPECT_RATIO,
    MODALITY_IDS,
    ROLES,
    SPECIAL_TOKEN_REMEDY,
    decoded_by_torchvision,
    items_of,
    load_rgb_image,
    modality_of,
    read_frames,
    to_messages,
    video_part,
)
from .readings_puma import ANSWER, RET_TOKEN, reading_of

if TYPE_CHECKING:
    # Never run, but read by transformers, which copies and downloads what a processor's code imports: wherever this
    # file is, the module is beside it, and every save has it.
    from .sentence_transformers_puma import PumaTransformer  # noqa: F401

logger = logging.get_logger(__name__)

MODULE_FILE = "sentence_transformers_puma.py"
SETTINGS_FILE = "config_sentence_transformers.json"
DECODE = ("fast", "exact", "torchvision")
_MOST_THREADS = 8
_LENGTH_REMEDY = (
    "Give it fewer or smaller images, or change the limits: --max-length and --max-pixels in a command, "
    "processing_kwargs={'text': {'max_length': ...}, 'image': {'size': {'shortest_edge': ..., 'longest_edge': ...}}} "
    "in encode."
)


# --- the processor


class PumaProcessor(Qwen2VLProcessor):
    r"""Turns queries and candidates of any modality into model inputs, each ending in the token `[RET]`.

    [`~PumaProcessor.process_inputs`] is the way in. The instruction stands before the user's text in the user turn, as
    in LamRA and in the paper's figure, and the prompt closes with "Summarize above image and sentence in one word: "
    (the nouns follow the parts that are present). Works without torchvision; only video needs it.

    Args:
        image_processor: A Qwen2-VL image processor.
        tokenizer: A Qwen2 tokenizer that holds `[RET]`, if the reading ends in it.
        video_processor: A Qwen2-VL video processor, or its settings as a dict, by default those of the images. Without
            torchvision the settings are kept, and saved.
        chat_template (`str`, *optional*): Jinja template; a saved processor brings its own.
        reading (`str`): How inputs are read, by its name in `READINGS`; the template must be that reading's.

    Example:

    ```python
    >>> from puma_hf import PumaProcessor

    >>> processor = PumaProcessor.from_pretrained("puma-demo")  # doctest: +SKIP
    >>> inputs = ["a red apple", {"image": "apple.png", "text": "in green"}]
    >>> processor.process_inputs(inputs)["modality_ids"].tolist()  # doctest: +SKIP
    [0, 2]
    ```

    Source: PUMA, ACM MM 2025, arXiv 2507.08064; LamRA for the wording of the prompt.
    """

    sentence_transformers_settings: dict[str, Any] | None = None  # of the directory it was loaded from
    _takes_video = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        reading: str = "puma",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        reading_of(reading)  # or it raises
        self.reading = reading
        if self._takes_video:
            self.video_processor = video_part(video_processor, image_processor)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that transformers opens: the video processor, which needs torchvision, is made from its settings."""
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a processor, with the prompts of its directory, which a save writes again."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
        place: dict[str, Any] = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        place |= {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
        path = cached_file(pretrained_model_name_or_path, SETTINGS_FILE, **place)
        if path is not None:
            processor.sentence_transformers_settings = json.loads(Path(path).read_text(encoding="utf-8"))
        return processor

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the processor, and what makes its directory a SentenceTransformer once a model joins it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_sentence_transformers_files(folder, self.sentence_transformers_settings, overwrite=False)
        saved = super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        if push_to_hub:  # transformers would upload what it wrote itself, and mean pooling would be read from the rest
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return saved

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """As in transformers, for prompts that are rendered already; [`~PumaProcessor.process_inputs`] renders them.

        Raises:
            ValueError: If a prompt does not end in `[RET]`, or as its reading has it: the embedding would be that of
                another token.
        """
        for prompt in [text] if isinstance(text, str) else text or ():
            self._check_end(prompt)
        batch: BatchFeature = super().__call__(images=images, text=text, videos=videos, **kwargs)
        return batch

    def _check_end(self, prompt: Any) -> None:
        end = reading_of(self.reading).end
        end = ANSWER if end == "" else end  # None: only the source knows
        if isinstance(prompt, str) and end and not prompt.endswith(end):
            raise ValueError(
                f"The prompt {prompt!r:.80} does not end in {end}, where the embedding is read. Pass inputs "
                "to process_inputs, or restore chat_template.jinja from the model's directory if it wrote this."
            )

    @property
    def ret_token_id(self) -> int:
        """Token id of `[RET]`, or -1 where the tokenizer has no such token."""
        return self._token_id(RET_TOKEN)

    def _token_id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return -1 if found is None else int(found)

    def process_inputs(
        self,
        inputs: Iterable[Any],
        prompt: str | None = None,
        *,
        max_length: int | None = None,
        split_special_tokens: bool = False,
        images_kwargs: dict[str, Any] | None = None,
    ) -> BatchFeature:
        """Turn a list of inputs, of one or of many modalities, into one padded batch.

        Args:
            inputs: A list, or another collection in order, such as a column. Each input is a string, an image (PIL,
                path, URL, bytes, array), a dict with any of the keys "text", "image", "video" (a value or a list of
                values) and "instruction", or a list of chat messages, written as for Qwen, transformers or OpenAI. A
                video is a path, URL, the bytes of a file, an array of frames, or a list of images. In a dict media
                come before the text, whatever the order of its keys; `None` values are ignored.
            prompt: Instruction for all inputs; a dict's own "instruction" takes its place.
            max_length: Longest sequence in tokens, by default the tokenizer's `model_max_length`. Only the
                user's text is cut; template, images and `[RET]` always remain. Tokens of videos are not counted.
            split_special_tokens: Special tokens such as `<|image_pad|>` inside a user's text raise an error
                by default; with `True` they are broken up and read as plain text.
            images_kwargs: Overrides for the image processor, for example
                `{"size": {"shortest_edge": 3136, "longest_edge": 235200}}` in pixels; and `{"decode": "exact"}`, which
                decodes every pixel of a photo, where by default ("fast") a JPEG is decoded no larger than is needed
                for the size that is kept, and other large images are averaged in blocks first. With
                `{"decode": "torchvision", "device": "cuda"}` torchvision decodes JPEGs, and scales all, on a GPU.

        Returns:
            A batch with `input_ids`, `attention_mask` and `mm_token_type_ids` of shape
            `(batch_size, sequence_length)`, `modality_ids` of shape `(batch_size,)` (see `MODALITY_NAMES`)
            and, where present, `pixel_values` `(num_patches, patch_dim)`, `image_grid_thw` `(num_images, 3)`
            and `num_images_per_sample` `(batch_size,)`, likewise for videos.

        Raises:
            ValueError: If an input is empty, of an unknown kind, holds an unreadable image or a special
                token, or if its images alone exceed `max_length`.
            ImportError: If a video is passed and torchvision is not installed, or a video file without PyAV.
        """
        # A set has no order, a table of pandas would yield the names of its columns, a file its lines.
        is_one = isinstance(inputs, str | bytes | bytearray | Mapping | set | frozenset | Image.Image | torch.Tensor)
        is_one = is_one or hasattr(inputs, "columns") or hasattr(inputs, "read")
        if isinstance(inputs, np.ndarray):
            is_one = inputs.ndim == 0 or inputs.dtype.kind not in "OUT"  # of numbers it is one image
        if is_one or not isinstance(inputs, Iterable):
            raise ValueError(f"inputs must be a list of inputs, got {type(inputs).__name__}. Wrap a single one in [ ].")
        if not (inputs := list(inputs)):
            raise ValueError("inputs is empty: pass at least one input.")
        reading = reading_of(self.reading)
        if prompt is None and reading.template is None:  # that of sentence-transformers, for a model of its own
            settings = self.sentence_transformers_settings or {}
            prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        pattern = re.compile("|".join(map(re.escape, special)))
        conversations = []
        for index, item in enumerate(inputs):
            with _named(index):
                item = item if reading.empty_text is None else _filled(item, reading.empty_text)
                conversations.append(to_messages(item, prompt))
                _check_special_tokens(conversations[-1], pattern, split_special_tokens)
        sources = [part["image"] for messages in conversations for part in items_of(messages, "image")]
        images: list[BatchFeature] = []
        videos, texts, modalities, counts = [], [], [], []
        with self._processed(sources, self._image_options(images_kwargs)) as processed:
            for index, messages in enumerate(conversations):
                own_videos = [part["video"] for part in items_of(messages, "video")]
                has_text = bool(items_of(messages, "text", ROLES[1:]))
                with _named(index):
                    own_images = [processed(part["image"]) for part in items_of(messages, "image")]
                    videos += [self._read_video(video) for video in own_videos]
                    texts.append(self._render(self._as_read(messages), own_images, limit))
                modalities.append(MODALITY_IDS[modality_of(has_text, bool(own_images), bool(own_videos))])
                images += own_images
                counts.append((len(own_images), len(own_videos)))
        batch = self._batch(texts, images, videos)
        ids = batch["input_ids"]
        last = (batch["attention_mask"] * torch.arange(ids.shape[1])).argmax(dim=1, keepdim=True)
        if reading.end and not (ids.gather(1, last) == self._token_id(reading.end)).all():
            raise ValueError(f"{reading.end} is no token of this tokenizer. Open the one in the model's directory.")
        batch["mm_token_type_ids"] = (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id)
        batch["modality_ids"] = torch.tensor(modalities)
        # Patches of all samples lie in one tensor; mini-batch slicing needs to know whose they are.
        for name, per_sample in zip(("images", "videos"), zip(*counts, strict=True), strict=True):
            if any(per_sample):
                batch[f"num_{name}_per_sample"] = torch.tensor(per_sample)
        return batch

    @contextmanager
    def _processed(self, sources: list[Any], options: dict[str, Any]) -> Iterator[Callable[[Any], BatchFeature]]:
        """From an image as it came to what the image processor makes of it; in threads, ahead of who asks.

        Pillow and NumPy leave the interpreter to the other threads while they work. Each thread has one decoded image
        in memory; what waits is no larger than the pixels that the model takes.
        """
        decode = options.pop("decode", "fast")
        if decode not in DECODE:
            raise ValueError(f"decode={decode!r} must be one of {', '.join(map(repr, DECODE))}.")
        images, size = self.image_processor, options["size"]
        here, own_limit, worker = size["longest_edge"], images.size["longest_edge"], get_worker_info()
        if sources and here != own_limit and (worker is None or worker.id == 0):  # of several workers one tells it
            limits = f"{here:,} pixels, and the model was saved with {own_limit:,}"
            logger.warning_once(f"Images are scaled down to {limits}: embeddings at two limits differ.")
        # Only what shrinks images as we do can be helped by smaller ones.
        do_resize, resample = (options.get(name, getattr(images, name)) for name in ("do_resize", "resample"))
        is_exact = decode == "exact" or not do_resize or resample != Image.Resampling.BICUBIC
        factor = options.get("patch_size", images.patch_size) * options.get("merge_size", images.merge_size)

        def kept_size(width: int, height: int) -> tuple[int, int]:
            if is_exact:
                return width, height
            limits = factor, size["shortest_edge"], size["longest_edge"]
            kept: tuple[int, int] = smart_resize(width, height, *limits)
            # A strip rounded up to a token, or a size rounded down below a near lower limit, would be resized, or
            # refused, once more.
            is_final = max(kept) <= MAX_ASPECT_RATIO * min(kept) and smart_resize(*kept, *limits) == kept
            return kept if is_final else (width, height)

        def process(source: Any) -> BatchFeature:
            # An array with a stated layout: whether Pillow images are read right with one depends on the version of
            # transformers, and without one a 1- or 3-pixel-high image is mistaken for channels-first. A copy, as
            # PyTorch warns of what it may not write to.
            decoded = decoded_by_torchvision(source, options.get("device", "cpu")) if decode == "torchvision" else None
            pixels = np.array(load_rgb_image(source, kept_size=kept_size)) if decoded is None else decoded
            layout = "channels_last" if decoded is None else "channels_first"
            layouts = {"input_data_format": layout, "do_convert_rgb": False, **options}
            processed: BatchFeature = images(pixels, return_tensors="pt", **layouts)
            return processed

        # torch has one thread in a worker of a DataLoader, and under torchrun by default: the other processes have the
        # other cores. An image that comes twice is read once, as two threads cannot read from one file.
        own = {id(source): source for source in sources}
        pool = ThreadPoolExecutor(max(1, min(torch.get_num_threads(), _MOST_THREADS, len(own))), "puma-images")
        try:
            jobs = {key: pool.submit(process, source) for key, source in own.items()}
            yield lambda source: jobs[id(source)].result()
        finally:
            pool.shutdown(cancel_futures=True)  # one that lived on would be dead in a process that is forked later

    def _batch(self, texts: list[str], images: list[BatchFeature], videos: list[Any]) -> BatchFeature:
        """What `__call__` makes of prompts, frames, and images that are processed already."""
        data: dict[str, Any] = {}
        if images:
            data = {name: _joined([image[name] for image in images]) for name in ("pixel_values", "image_grid_thw")}
        tokens: list[list[str]] = [[self.replace_image_token(dict(image), 0) for image in images], []]
        if videos:
            facts = [{"total_num_frames": len(frames), "fps": fps} for frames, fps in videos]
            frames = [frames for frames, _ in videos]  # metadata is asked for where frames are sampled
            processed, tokens[1] = self._process_videos(frames, video_metadata=facts, return_tensors="pt")
            data |= {name: value for name, value in processed.items() if name != "video_metadata"}
        for text in texts:
            self._check_end(text)
        for token, found in ((self.image_token, images), (self.video_token, videos)):
            if (places := sum(text.count(token) for text in texts)) != len(found):
                problem = f"The prompts have {places} places {token}, for {len(found)} inputs"
                raise ValueError(f"{problem}. Restore chat_template.jinja from the model's directory.")
        expanded, _ = self.get_text_with_replacements(texts, *tokens)
        return BatchFeature({**self.tokenizer(expanded, padding=True, return_tensors="pt"), **data})

    def _as_read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with instruction and text in the form that the reading has."""
        reading = reading_of(self.reading)
        if reading.to_instruction is not None:
            for item in items_of(messages, "text", ("system",)):
                item["text"] = reading.to_instruction(item["text"])
        if reading.to_sentence is None:
            return messages
        # The instruction stands before the first text, in the user's turn.
        said = [item["text"] for item in items_of(messages, "text", ("system",))]
        instruction = reading.to_sentence(" ".join(said))
        turns = [message for message in messages if message["role"] != "system"]
        if instruction and not items_of(turns, "text"):
            turns[-1]["content"].append({"type": "text", "text": ""})
        most = reading.max_text_tokens
        for number, item in enumerate(items_of(turns, "text")):
            joined = f"{instruction}\n{item['text']}" if instruction and number == 0 else item["text"]
            item["text"] = reading.to_sentence(joined)
            # A byte is at most one token: what fits in bytes needs no counting, here and in `_render`.
            if most is not None and len(item["text"].encode()) > most:
                excess = self._num_text_tokens(item["text"]) - most
                item["text"] = self._drop_last_tokens(item["text"], excess) if excess > 0 else item["text"]
        return turns

    def _read_video(self, video: Any) -> tuple[np.ndarray, float | None]:
        if not self._takes_video:
            raise ValueError("only PUMA models cut from Qwen2-VL take videos. Pass some frames as {'image': [...]}.")
        if isinstance(self.video_processor, Mapping):
            raise ImportError("video input needs torchvision. Run `pip install 'puma-hf[video]'`.")
        return read_frames(video)

    def _render(self, messages: list[dict[str, Any]], images: list[BatchFeature], limit: int) -> str:
        """The prompt of one conversation, its last text shortened until the whole fits into `limit` tokens."""
        visual = sum(int(image["image_grid_thw"].prod()) for image in images) // self.image_processor.merge_size**2
        rendered = str(self.apply_chat_template(messages, tokenize=False))
        if visual + len(rendered.encode()) <= limit:
            return rendered
        texts = items_of(messages, "text", ROLES[1:])
        while (excess := visual + self._num_text_tokens(rendered) - limit) > 0:
            shortened = self._drop_last_tokens(texts[-1]["text"], excess) if texts else ""
            if not shortened:
                needs = f"it needs more than max_length={limit} tokens ({visual} of them for images)"
                raise ValueError(f"without the text that may be cut {needs}. {_LENGTH_REMEDY}")
            texts[-1]["text"] = shortened
            rendered = str(self.apply_chat_template(messages, tokenize=False))
        return rendered

    def _image_options(self, images_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Complete `size` with the image processor's own, so that tokens are counted as images are cut."""
        options, default = dict(images_kwargs or {}), self.image_processor.size
        size = {name: default[name] for name in ("shortest_edge", "longest_edge")} | options.pop("size", {})
        for old_name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            size[edge] = options.pop(old_name, size[edge])
        if size["longest_edge"] < size["shortest_edge"]:
            edges = f"longest_edge={size['longest_edge']}, less than shortest_edge={size['shortest_edge']}"
            raise ValueError(f"The image size has {edges}. Pass both, or a larger longest_edge (--max-pixels).")
        return {**options, "size": size}

    def _num_text_tokens(self, rendered: str) -> int:
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids) - ids.count(self.image_token_id)

    def _drop_last_tokens(self, text: str, count: int) -> str:
        # Not verbose: a warning about a text that is too long would be wrong for one that is about to be cut.
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        # From the first dropped token's first character on, so that no character is cut in half.
        return text[: offsets[len(offsets) - count][0]] if count < len(offsets) else ""


class PumaImageTextProcessor(PumaProcessor):
    """A `PumaProcessor` without video, for the later families, which tell the time of frames in other ways."""

    _takes_video = False


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    # torch.cat would start OpenMP's threads on a CPU, and a process that is forked later would wait for them forever.
    return torch.cat(parts) if parts[0].device.type != "cpu" else torch.from_numpy(np.concatenate(parts))


def _filled(item: Any, text: str) -> Any:
    """An input with `text` for its text if it has no part, and without an empty text."""
    if isinstance(item, dict) and "role" not in item and "bytes" not in item:
        parts = {key: value for key, value in item.items() if value is not None and not isinstance(value, str | list)}
        parts |= {key: value for key, value in item.items() if isinstance(value, str | list) and value}
        return parts if parts.keys() - {"instruction"} else {**parts, "text": text}
    return {"text": text} if isinstance(item, str) and not item else item


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say of an error which input it is about."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        kind = next(kind for kind in (FileNotFoundError, ImportError, ValueError) if isinstance(error, kind))
        raise kind(f"inputs[{index}]: {error}") from error


def _check_special_tokens(messages: list[dict[str, Any]], pattern: re.Pattern[str], split: bool) -> None:
    """Refuse, or with `split` break up in place, special tokens inside the user's text."""
    for part in items_of(messages, "text"):
        text = part["text"]
        if (found := pattern.search(text)) and not split:
            problem = f"the text contains the special token {found.group()!r}: {text!r:.80}"
            raise ValueError(f"{problem}. {SPECIAL_TOKEN_REMEDY}")
        part["text"] = pattern.sub(lambda token: token.group()[0] + " " + token.group()[1:], text)


class PumaFeatureExtractionPipeline(FeatureExtractionPipeline):
    """What `pipeline("feature-extraction", model=directory, trust_remote_code=True)` runs; `config.json` names it.

    transformers' own reads a text without the chat template, and gives the states of all tokens. This one takes what
    [`~PumaProcessor.process_inputs`] takes, and gives the embedding, `(1, embedding_dim)`, of each input; options of
    `process_inputs` go into `tokenize_kwargs`.
    """

    _load_tokenizer = False
    _load_processor = True

    # The signatures of transformers' own classes differ from each other.
    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.processor.process_inputs([inputs], **options))  # type: ignore[union-attr]

    def postprocess(self, model_outputs: Any, return_tensors: bool = False) -> Any:  # type: ignore[override]
        embeddings = model_outputs["embeddings"]
        return embeddings if return_tensors else embeddings.tolist()


PIPELINES = {"feature-extraction": {"impl": "processing_puma.PumaFeatureExtractionPipeline", "pt": ["AutoModel"]}}


# --- the files that make a directory a SentenceTransformer


def write_sentence_transformers_files(folder: Path, settings: Mapping[str, Any] | None, overwrite: bool = True) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` needs beside transformers' files.

    Without these files SentenceTransformer opens a directory too, but averages all tokens instead of reading
    `[RET]`: every saved processor therefore brings them along.

    Args:
        folder: The directory.
        settings: Of SentenceTransformer, such as `prompts`, the named instructions for `encode(prompt_name=...)`;
            `None` writes no file of them.
        overwrite: Whether to replace files that are there already.
    """
    module_file = Path(__file__).with_name(MODULE_FILE)
    output = {"method": "forward", "method_output_name": "embeddings"}
    kinds = ("text", "image", "image+text", "video", "video+text")
    files: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": f"{module_file.stem}.PumaTransformer"}],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {**dict.fromkeys(kinds, output), "message": {**output, "format": "structured"}},
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
        },
    }
    if settings is not None:
        usual: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        files[SETTINGS_FILE] = {"model_type": "SentenceTransformer", **usual, **settings}
    for name, content in files.items():
        if overwrite or not (folder / name).exists():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for source in (module_file, *map(Path, get_relative_import_files(module_file))):
        if overwrite or not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)
