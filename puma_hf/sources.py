"""What a checkpoint that is to be cut is: a generative model, or an embedder that reads inputs in its own way."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from puma_hf.checkpoint import Checkpoint
from puma_hf.files import PUMA_MODEL_TYPES, read_config
from puma_hf.modeling import PumaProcessor
from puma_hf.modeling.processing_puma import SETTINGS_FILE
from puma_hf.modeling.readings_puma import READINGS, reading_of

logger = logging.getLogger(__name__)

_TEMPLATES = Path(__file__).parent / "modeling"
TRANSFORMER_FILE = "sentence_bert_config.json"
# What sentence-transformers may be told for the processor, by kind: of these a cut model does the same, or has no need.
_PASSED = {
    "image": {"size", "min_pixels", "max_pixels"},
    "text": {"max_length", "padding", "padding_side", "truncation"},
    "common": {"return_tensors"},
}
_OPENED = {"size", "min_pixels", "max_pixels", "model_max_length", "padding_side", "use_fast", "trust_remote_code"}
_TEXT_ALONE = ("do_lower_case", "query_length", "document_length", "query_expansion")
_REMEDY = (
    f"If it reads as {' or '.join(name for name, reading in READINGS.items() if reading.known_by)} does, pass that as "
    "--reading; to cut its layers as those of a generative model, which has to be trained then, pass --reading puma."
)


@dataclass(frozen=True)
class Source:
    """How a checkpoint reads inputs, as `find_source` has found."""

    reading: str  # by its name in READINGS
    found: str  # what says so
    template: str
    padding_side: str | None = None
    settings: dict[str, Any] | None = None  # of SentenceTransformer, where the source's own stay
    render: Mapping[str, Any] = field(default_factory=dict)  # what its template is given besides the messages


def find_source(checkpoint: Checkpoint, tokenizer: Any, asked: str | None = None) -> Source:
    """Find out how a checkpoint reads inputs, from its files and its name.

    In this order: what a PUMA directory records; `asked`; "source" where modules.json has a Transformer with a chat
    template, last-token Pooling and Normalize; the reading whose `known_by` is in the name, or in that of its classes;
    "puma", for a generative checkpoint.

    Raises:
        ValueError: If `asked` is unknown, or is not what a PUMA directory was made for; or if the checkpoint is an
            embedder of which a cut copy would not read as it does, with what can be done instead.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from puma_hf.checkpoint import open_checkpoint
    >>> from puma_hf.sources import find_source

    >>> name = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
    >>> find_source(open_checkpoint(name), AutoTokenizer.from_pretrained(name)).reading  # doctest: +SKIP
    'gme'
    ```
    """
    folder, config = checkpoint.folder, read_config(checkpoint.folder)
    reading_of(asked or "puma")  # or it raises
    if config.get("model_type") in PUMA_MODEL_TYPES:
        own = str(read_config(folder, "processor_config.json").get("reading", "puma"))
        if asked not in (None, own):
            raise ValueError(f"reading={asked!r}, but {checkpoint.name!r} was made for {own!r}. Leave it out.")
        return _source(own, "recorded there", folder, tokenizer)
    modules: Any = []
    with suppress(OSError, ValueError):
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8")) or []
    problem = _problem(folder, modules) if modules else "has no modules.json, which would say how it is read"
    code: dict[str, Any] = config.get("auto_map") or {}
    names = [Path(checkpoint.name).name, *(config.get("architectures") or ()), *map(str, code.values())]
    known = [name for name, reading in READINGS.items() if reading.known_by and _is_known(reading.known_by, names)]
    if asked is not None:
        name, found = asked, "asked for"
    elif modules and problem is None:
        name, found = "source", "by modules.json, with last-token pooling"
    elif known:
        name, found = known[0], "known by its name"
    else:
        name, found = ("source" if modules else "puma"), "a generative checkpoint"
        if not modules and _is_known("embed|retriev", names):
            logger.warning("%r is taken for a generative model, as nothing says how it is read. %s", names[0], _REMEDY)
    if name == "source" and problem is not None:
        raise ValueError(f"{checkpoint.name!r} {problem}. {_REMEDY}")
    if code and (name == "source" or (name, asked) == ("puma", None)):
        runs = f"{checkpoint.name!r} runs code of its own, {next(iter(code.values()))}"
        raise ValueError(f"{runs}, which may change what it computes; a cut copy is stock layers. {_REMEDY}")
    return _source(name, found, folder, tokenizer)


def _is_known(pattern: str, names: Sequence[str]) -> bool:
    return any(re.search(pattern, name, re.IGNORECASE) for name in names)


def _source(name: str, found: str, folder: Path, tokenizer: Any) -> Source:
    """Template, padding and settings of a reading, from the source's files where they are its own."""
    reading, transformer = reading_of(name), read_config(folder, TRANSFORMER_FILE)
    settings = {key: value for key, value in read_config(folder, SETTINGS_FILE).items() if key != "__version__"}
    keeps_settings = reading.template is None or reading.known_by is not None
    render: dict[str, Any] = {}
    if reading.template is None:
        own = read_config(folder, "chat_template.json")  # an older place, which a newer file goes before
        is_older = bool(own) and not (folder / "chat_template.jinja").is_file()
        template = own.get("chat_template") if is_older else tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        render = dict((transformer.get("processing_kwargs") or {}).get("chat_template") or {})
        template, fixed = render.pop("chat_template", template), render
        if template is None:
            raise ValueError(f"{str(folder)!r} has no chat template. {_REMEDY}")
    else:
        template = (_TEMPLATES / reading.template).read_text(encoding="utf-8")
        fixed = {} if reading.system is None else {"system": reading.system, "end": reading.end}
    # As a part of the template, so that every program that renders it does the same.
    head = "".join(f"{{%- set {key} = {json.dumps(value)} -%}}\n" for key, value in fixed.items() if value is not None)
    side = reading.padding_side or (transformer.get("processor_kwargs") or {}).get("padding_side")
    return Source(name, found, head + template, side, (settings or None) if keeps_settings else None, render)


def _problem(folder: Path, modules: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a model of sentence-transformers cannot be cut as it is read; None if it can."""
    types = [str(module.get("type")) for module in modules]
    if foreign := [kind for kind in types if not kind.startswith("sentence_transformers.")]:
        return f"runs code of its own, {foreign[0]}, which is not in a cut copy"
    kinds, similarity = [kind.rpartition(".")[2] for kind in types], read_config(folder, SETTINGS_FILE)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        has = f"has the modules {', '.join(kinds)}, as one of many vectors for each input or with a head on top"
        return f"{has}, and a cut copy a Transformer, last-token Pooling and Normalize"
    pooling = read_config(folder, f"{modules[1].get('path')}/config.json")
    flags = {key.removeprefix("pooling_mode_"): key for key, value in pooling.items() if value is True}
    modes = pooling.get("pooling_mode") or [key for key in flags if key != "include_prompt"]
    modes = [modes] if isinstance(modes, str) else modes
    if list(modes) != ["lasttoken"]:
        return f"pools by {' and '.join(modes) or 'the mean'}, and a cut copy by the last token"
    if len(kinds) == 2 and similarity.get("similarity_fn_name") not in (None, "cosine"):
        how = similarity["similarity_fn_name"]
        return f"compares vectors of any length by {how}, and those of a cut copy have length 1"
    transformer = read_config(folder, TRANSFORMER_FILE)
    if "message" not in (transformer.get("modality_config") or {}):
        return f"reads its inputs without a chat template ({TRANSFORMER_FILE} has no modality 'message')"
    passed, opened = transformer.get("processing_kwargs") or {}, transformer.get("processor_kwargs") or {}
    # What a template is given, it goes on being given; how videos are sampled is not in a vector of texts and images.
    known = _PASSED | {kind: (passed.get(kind) or {}).keys() for kind in ("chat_template", "video", "audio")}
    given = [(kind, key) for kind, options in passed.items() for key in options or ()]
    unknown = [f"{kind}.{key}" for kind, key in given if key not in known.get(kind, ())]
    unknown += [*sorted(opened.keys() - _OPENED), *(key for key in _TEXT_ALONE if transformer.get(key))]
    if transformer.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown.append(f"transformer_task {transformer['transformer_task']}")
    return f"sets {unknown[0]} in {TRANSFORMER_FILE}, which a cut copy does not know" if unknown else None


def check_template(processor: PumaProcessor, name: str) -> None:
    """Refuse a source's template that leaves an image out, or ends in what the user has said: that would be pooled.

    Raises:
        ValueError: In these cases, or if the template cannot be rendered.
    """
    image, *words = {"type": "image"}, *({"type": "text", "text": text} for text in ("0", "1 2 3"))
    contents = [[words[0]], [words[1]], [image], [image, words[1]]]
    try:
        chats: list[Any] = [[{"role": "user", "content": content}] for content in contents]
        prompts = [str(processor.apply_chat_template(chat, tokenize=False)) for chat in chats]
    except TemplateError as error:
        raise ValueError(f"The chat template of {name!r} cannot be rendered ({error}). {_REMEDY}") from error
    counts = [content.count(image) for content in contents]
    if [prompt.count("<|image_pad|>") for prompt in prompts] != counts:
        raise ValueError(f"The chat template of {name!r} has no place for an image. {_REMEDY}")
    if len({prompt[-1:] for prompt in prompts}) > 1:
        ends = f"The chat template of {name!r} does not end in a token of its own, but in the input's text or image"
        raise ValueError(f"{ends}, so the last token, which is pooled, has not seen a whole input. {_REMEDY}")
