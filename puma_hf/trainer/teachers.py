"""Teachers: the full model in one copy of the weights with its student, or another model held beside it."""

from __future__ import annotations

import inspect
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from torch import Tensor, nn
from transformers import AutoTokenizer

from puma_hf.checkpoint import open_checkpoint, open_sentence_transformer
from puma_hf.data.records import Record
from puma_hf.files import is_hub_id, is_puma_directory, read_config
from puma_hf.fingerprint import model_fingerprint, short_name, space_fingerprint, tensors_sha256
from puma_hf.losses.cached_mac_puma import find_puma_model, runs_tower_once
from puma_hf.losses.distillation_puma import OTHER_WIDTH, TEACHER_KEY
from puma_hf.modeling import PumaModel
from puma_hf.modeling.configuration_puma import config_class_of
from puma_hf.modeling.modeling_puma import MODEL_CLASSES, PumaModelMixin, running_layers
from puma_hf.pruning import place_ret_token

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?<=^language_model\.layers\.)\d+")
# Among the features of a column: its inputs as the dataset has them, and the prompt for those without an instruction.
ROWS_KEY = "teacher_rows"


class Teacher(ABC):
    """Tells the student's trainer the `[RET]` states that the student is to reach.

    A teacher belongs to the trainer alone: never to the model, the loss, the optimizer or a checkpoint. One that
    `reads_rows` finds a column's inputs themselves under `ROWS_KEY` of its features.
    """

    reads_rows = False

    @abstractmethod
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of one column after the final norm, `(batch_size, hidden_size)`, without gradient."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 that changes when the states may, under which `teacher_mode="cached"` stores them."""

    def space(self, student: SentenceTransformer) -> str | None:
        """`space_fingerprint` of the teacher, which a student that reaches its states shares; None: it is not known."""
        return None

    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` `(batch_size, hidden_size)` into the features of one column, before the student runs."""
        features[TEACHER_KEY] = self.states(features)


class FrozenTeacher(Teacher):
    """The full, untouched model, which tells `[RET]` states to the student that was cut from it.

    One copy of the weights serves both: with adapters switched off, the student's kept layers are the teacher's,
    and only the dropped ones are held besides. It never enters the optimizer or a checkpoint.

    Args:
        student: The pruned model, whose base weights must not be trained (LoRA leaves them alone).
        dropped_layers: The decoder layers that pruning removed, in order.

    Raises:
        ValueError: If the layers do not complete the student to its original depth.

    Example:
        >>> teacher = FrozenTeacher.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", student)  # doctest: +SKIP
        >>> teacher.states(features).shape  # doctest: +SKIP
        torch.Size([8, 1536])

    Source: PUMA, ACM MM 2025, arXiv 2507.08064; in its released code the frozen teacher is a second model.
    """

    def __init__(self, student: PumaModel, dropped_layers: nn.ModuleList) -> None:
        kept, depth = len(student.language_model.layers), student.config.original_num_hidden_layers
        if kept + len(dropped_layers) != depth:
            raise ValueError(f"The student keeps {kept} of {depth} layers, and {len(dropped_layers)} more were given.")
        self.student = student
        self.dropped_layers = dropped_layers.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, student: PumaModel, *, revision: str | None = None) -> FrozenTeacher:
        """Load what pruning dropped from a folder or the Hub: of the original, or a PUMA directory of all layers.

        Raises:
            ValueError: If its weights, the dropped layers and the row of `[RET]` aside, are not the student's.
        """
        full = StoredModel(source, student, revision=revision)
        if different := full.different_weights(student):
            raise ValueError(f"{len(different)} of the student's weights differ in {source}, first {different[0]}.")
        return cls(student, full.dropped_layers(student))

    def add_states(self, features: dict[str, Any]) -> None:
        """Put `teacher_state` into the features; the vision tower runs once for student and teacher."""
        share_image_features(self.student, features)
        super().add_states(features)

    @torch.no_grad()
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of the full model after its final norm, `(batch_size, hidden_size)`, without gradient."""
        with self._full_depth():
            return _ret_states(self.student, features)

    def fingerprint(self) -> str:
        """SHA-256 of all weights and settings, whatever the adapter has learned."""
        return tensors_sha256(self._weights(), self.student.config.to_dict())

    def space(self, student: SentenceTransformer) -> str:
        """Of the full model, which reads as its student does."""
        return space_fingerprint(student, self._weights())

    def _weights(self) -> dict[str, Tensor]:
        dropped = {f"dropped.{name}": tensor for name, tensor in self.dropped_layers.state_dict().items()}
        return base_tensors(self.student) | dropped

    @contextmanager
    def _full_depth(self) -> Iterator[None]:
        """Make the student the full model: other layers, no adapter, no dropout; afterwards all is as before."""
        student, decoder = self.student, cast(Any, self.student.language_model)
        kept = dict(zip(student.config.layers_of_original, decoder.layers, strict=True))
        numbers, dropped = range(len(kept) + len(self.dropped_layers)), iter(self.dropped_layers)
        layers = [kept[number] if number in kept else next(dropped) for number in numbers]
        training = [module for module in student.modules() if module.training]
        self.dropped_layers.to(student.device)
        try:
            student.eval()
            if student._hf_peft_config_loaded:
                student.disable_adapters()
            with running_layers(student, layers):
                yield
        finally:
            if student._hf_peft_config_loaded:
                student.enable_adapters()
            for module in training:
                module.training = True


class WholeTeacher(Teacher):
    """A second model, such as a trained one of all layers, which is frozen and held beside the student.

    It reads the student's own token ids, so a ValueError refuses one of another hidden size (but with `any_width`) or
    reading, or with other ids of `[RET]` or of image tokens. PUMA distils from the model that was pruned; this is our
    addition.
    """

    def __init__(self, model: PumaModel, student: PumaModel, *, any_width: bool = False) -> None:
        names = ("hidden_size", "source_model_type", "ret_token_id", "image_token_id", "video_token_id", "positions")
        for name in names[any_width:]:
            ours, theirs = (
                getattr(config.text_config if name == "hidden_size" else config, name)
                for config in (student.config, model.config)
            )
            if ours != theirs:
                problem = f"The teacher has {name}={theirs} and the student {ours}, whose inputs it is given."
                own = "Save it as a SentenceTransformer, which reads rows itself, and take metric='relational'."
                raise ValueError(f"{problem} {OTHER_WIDTH if name == 'hidden_size' else own}")
        self.student = student
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def states(self, features: dict[str, Any]) -> Tensor:
        """`[RET]` states of the teacher after its final norm, `(batch_size, hidden_size)`, without gradient."""
        model: Any = self.model.to(self.student.device)
        return _ret_states(model.eval(), features)

    def fingerprint(self) -> str:
        """SHA-256 of the teacher's weights, an adapter among them, and settings."""
        return str(model_fingerprint(nn.ModuleDict({"teacher": self.model})))

    def space(self, student: SentenceTransformer) -> str:
        """Of the second model, which is given the student's tokens."""
        return space_fingerprint(student, dict(self.model.named_parameters()))


class EmbeddingTeacher(Teacher):
    """Any `SentenceTransformer`: the rows go through its own template, tokenizer and modules, as in its `encode`.

    It tells embeddings instead of states, which the metric `"cosine"` can aim at, and `"relational"` at those of any
    width. An instruction of a row is the prompt of its `encode`; rows without one get the trainer's prompt, or else the
    teacher's default. This is our addition, see `self_distillation_loss` for whose idea it is.

    Example:
        >>> teacher = EmbeddingTeacher(SentenceTransformer("Qwen/Qwen3-VL-Embedding-8B"))  # doctest: +SKIP
        >>> teacher.states({"teacher_rows": {"inputs": ["red", "blue"], "prompt": None}}).shape  # doctest: +SKIP
        torch.Size([2, 4096])
    """

    reads_rows = True

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model.requires_grad_(False).eval()

    def states(self, features: dict[str, Any]) -> Tensor:
        """Embeddings `(batch_size, embedding_dim)` of the column's own inputs, which leave the features."""
        rows = features.pop(ROWS_KEY)
        # A call of `encode` has one prompt, and many models take one modality in each.
        groups: dict[tuple[str | None, str], list[tuple[int, Any]]] = {}
        for place, row in enumerate(rows["inputs"]):
            prompt, modality, one = rows["prompt"], type(row).__name__, row
            if isinstance(row, dict) and "role" not in row:
                record = Record(text=row.get("text"), image=row.get("image"))
                prompt, modality, one = row.get("instruction") or prompt, record.modality, record.model_input
            groups.setdefault((prompt, modality), []).append((place, one))
        found: dict[int, Tensor] = {}
        for (prompt, _), members in groups.items():
            places, inputs = zip(*members, strict=True)
            options: dict[str, Any] = {"prompt": prompt, "batch_size": len(members), "convert_to_tensor": True}
            embedded: Any = self.model.encode(list(inputs), **options, show_progress_bar=False)
            if not isinstance(embedded, Tensor) or embedded.ndim != 2:
                what = f"The teacher's encode gave {type(embedded).__name__} of {getattr(embedded, 'shape', '?')}"
                raise ValueError(f"{what}, not one vector an input. Take a model of single vectors.")
            found.update(zip(places, embedded, strict=True))
        # Autograd takes no tensor of the inference mode, in which `encode` runs; that of `stack` is one like any other.
        return torch.stack([found[place] for place in range(len(found))])

    def fingerprint(self) -> str:
        """SHA-256 of the teacher's weights, settings, tokenizer and code."""
        return str(model_fingerprint(self.model))

    def space(self, student: SentenceTransformer) -> str:
        """Of the embedder, which reads by itself."""
        return space_fingerprint(self.model)


def with_rows(collator: Any) -> Any:
    """A copy of a data collator whose batches hold each column's inputs as well, for a teacher that `reads_rows`."""
    return replace(collator, preprocess_fn=partial(_preprocess_with_rows, collator.preprocess_fn))


def _preprocess_with_rows(
    preprocess: Callable[..., dict[str, Any]], inputs: Sequence[Any], prompt: str | None = None, **options: Any
) -> dict[str, Any]:
    rows = {"inputs": list(inputs), "prompt": prompt}
    return {**preprocess(inputs, prompt=prompt, **options), ROWS_KEY: rows}


TeacherSource = str | Path | PumaModel | SentenceTransformer | Teacher


def _check_vocabulary(full: StoredModel, tokenizer: Any, name: str) -> None:
    """Refuse a teacher to which a token id of the student's means another token."""
    own, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(full._checkpoint.folder).get_vocab()
    if other := [token for token, number in theirs.items() if own.get(token, number) != number]:
        problem = f"The teacher {name!r} has another vocabulary: {other[0]!r} is {theirs[other[0]]}"
        problem += f", not {own[other[0]]}"
        remedy = "Take one of the student's, or a sentence-transformers directory, which reads by itself, with"
        raise ValueError(f"{problem}. {remedy} metric='relational' (--metric relational).")


def find_teacher(
    teacher: TeacherSource | None,
    student: PumaModel,
    *,
    revision: str | None = None,
    metric: str = "mse",
    tokenizer: Any = None,
) -> Teacher:
    """A teacher that never moves: one copy of the weights with the student where that is possible.

    With the student's `tokenizer` a checkpoint of another vocabulary is refused, as it gets the student's token ids.
    `teacher` is the path or Hub id of a checkpoint, by default of the one that was pruned, which the student's
    configuration names: it shares its weights with the student where they are equal. A model is held whole beside the
    student, and so is another checkpoint, with a warning. A teacher is returned. For the metrics "relational" and
    "cosine", a `SentenceTransformer` that shares no weights with the student, or the directory of one, embeds by its
    own `encode`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If there is no teacher, it is the student, its width does not fit, or `WholeTeacher` refuses it.
    """
    relational, of_vectors = metric == "relational", metric in ("relational", "cosine")
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, SentenceTransformer) and of_vectors:
        return _embedding_teacher(teacher, student, relational)
    if isinstance(teacher, PumaModelMixin | SentenceTransformer):
        model: Any = teacher if isinstance(teacher, PumaModelMixin) else find_puma_model(teacher)
        if model is None:
            raise ValueError(f"The teacher is no PUMA model, whose states metric={metric!r} compares. {OTHER_WIDTH}")
        return WholeTeacher(model, student, any_width=relational)
    source, embeds = student.config.source_name_or_path, False
    if teacher is None:
        teacher, revision = source, revision or student.config.source_revision
        # Of a local checkpoint, pruning notes the folder's name alone; a Hub id has an owner.
        if teacher is None or ("/" not in teacher and not Path(teacher).is_dir()):
            what = f"The model was pruned from {teacher!r}, which is not here"
            raise ValueError(f"{what}. Pass teacher=<path of that folder> (--teacher).")
    elif of_vectors and (Path(teacher).is_dir() or is_hub_id(str(teacher))):
        embeds = is_sentence_transformer_model(str(teacher), revision=revision)
    is_cut = is_puma_directory(Path(teacher)) or (source and short_name(teacher) == short_name(source))
    full = None if embeds and not is_cut else StoredModel(teacher, student, revision=revision)
    shared = _shared_weights(full, student) if full else "it reads the rows by itself"
    if isinstance(shared, Teacher):
        return shared
    found: Any
    if embeds or not full:
        loading: dict[str, Any] = {"revision": revision, "device": str(student.device)}
        found = _embedding_teacher(open_sentence_transformer(str(teacher), **loading), student, relational)
    else:
        if tokenizer is not None:
            _check_vocabulary(full, tokenizer, str(teacher))
        found = WholeTeacher(full.load(), student, any_width=relational)
    size = sum(parameter.numel() * parameter.element_size() for parameter in found.model.parameters()) / 2**20
    logger.warning(
        "The teacher, %r, is held whole beside the student and takes %.1f MiB more: %s. With teacher_mode='cached' it "
        "is freed before training.",
        *(str(teacher), size, shared),
    )
    return cast(Teacher, found)


def _shared_weights(full: StoredModel, student: PumaModel) -> FrozenTeacher | str:
    """The teacher in one copy of the weights with its student, or why there is none."""
    different, original = full.different_weights(student), student.config.original_num_hidden_layers
    if getattr(student, "is_quantized", False):
        return "the student's base is held in 4 bits and the teacher is not"
    if different:
        return f"its weights are not the student's in {len(different)} tensors (first: {different[0]})"
    if full.num_layers == original:
        return FrozenTeacher(student, full.dropped_layers(student))
    if full.num_layers == len(student.language_model.layers):
        raise ValueError(f"The teacher {str(full.source)!r} has the student's weights: it is the student itself.")
    return f"it has {full.num_layers} layers, and the student was cut from {original}"


def _embedding_teacher(model: SentenceTransformer, student: PumaModel, any_width: bool) -> EmbeddingTeacher:
    width, own = model.get_embedding_dimension(), cast(Any, student.config.text_config).hidden_size
    if not any_width and width != own:
        raise ValueError(f"The teacher's embeddings have {width} dimensions and the student's {own}. {OTHER_WIDTH}")
    return EmbeddingTeacher(model)


# --- the full model's weights


class StoredModel:
    """A checkpoint with all its layers, in the student's data type and with its kind of attention, read in parts.

    To share a student's weights takes the memory of the dropped layers, and of one tensor while comparing.
    """

    def __init__(self, source: str | Path, student: PumaModel, *, revision: str | None = None) -> None:
        self._loading: dict[str, Any] = {
            "dtype": student.dtype,
            # Both halves see the mask that is built for the student's kind of attention.
            "attn_implementation": student.config._attn_implementation,
        }
        self.source, self._positions = source, student.config.positions
        self._has_ret = student.config.ret_token_id is not None  # an embedder's copy goes on without
        self._checkpoint = open_checkpoint(source, revision=revision)
        family = config_class_of(read_config(self._checkpoint.folder).get("model_type"))
        self.config: Any = family.from_pretrained(self._checkpoint.folder, **self._loading)
        self._class = MODEL_CLASSES[family]
        text_config: Any = self.config.text_config
        self.num_layers: int = text_config.num_hidden_layers

    def different_weights(self, student: PumaModel) -> list[str]:
        """Names of the student's base weights that are not those of this model, as they would be loaded."""
        # Tensor by tensor, on the CPU: the whole checkpoint is read once, and never held.
        stored, ours, different = self._checkpoint, base_tensors(student), []
        if self.num_layers == student.config.original_num_hidden_layers:  # else it may be the student itself
            kept = student.config.layers_of_original
            ours = {_LAYER.sub(lambda old: str(kept[int(old[0])]), name): tensor for name, tensor in ours.items()}
        for name, tensor in ours.items():
            other, parts = stored.get(name), [slice(None)]
            if other is not None and name == "language_model.embed_tokens.weight":
                # Pruning may have added rows, and made one that of [RET].
                rows, ret_row = min(len(tensor), len(other)), student.config.ret_token_id
                parts = [slice(rows)] if ret_row is None else [slice(min(ret_row, rows)), slice(ret_row + 1, rows)]
            if other is None or not all(torch.equal(tensor[p].cpu(), other[p].to(tensor.dtype)) for p in parts):
                different.append(name)
        return different

    def dropped_layers(self, student: PumaModel) -> nn.ModuleList:
        """The decoder layers that the student does not have, in order, on its device; nothing else is read."""
        numbers = [number for number in range(self.num_layers) if number not in student.config.layers_of_original]
        # Without memory: only the layers that are wanted are given tensors.
        with torch.device("meta"):
            every = self._class(self.config).language_model.layers
        layers = nn.ModuleList(every[number] for number in numbers)
        stored, tensors = self._checkpoint, {}
        for name, _ in layers.named_parameters():
            index, _, rest = name.partition(".")
            tensor = stored[f"language_model.layers.{numbers[int(index)]}.{rest}"]
            tensors[name] = tensor.to(student.device, self._loading["dtype"], copy=True)
        layers.load_state_dict(tensors, assign=True)  # which refuses a tensor of another shape
        return layers

    def load(self) -> PumaModel:
        """The whole model; one without `[RET]` gets the row that pruning would give it, if the student has one."""
        revision = self._checkpoint.revision or "main"
        full: PumaModel = self._class.from_pretrained(self.source, revision=revision, **self._loading)
        if self._has_ret and full.config.ret_token_id is None:
            place_ret_token(full, AutoTokenizer.from_pretrained(self._checkpoint.folder))
        if read_config(self._checkpoint.folder).get("model_type") == full.config.source_model_type:  # an original
            full.config.positions = self._positions
        return full


def base_tensors(model: PumaModel) -> dict[str, Tensor]:
    """Base weights under the names that they have without an adapter: peft wraps the layers that it adapts."""
    return {
        name.replace(".base_layer.", ".").replace(".token_adapter.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if not is_of_adapter(name)
    }


def is_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to the adapter."""
    return ".lora_" in name or "trainable_tokens" in name


# --- a forward pass


def _ret_states(model: PumaModel, features: dict[str, Any]) -> Tensor:
    """`[RET]` states after the final norm, from those features that the model's forward pass takes."""
    accepted = inspect.signature(model.forward).parameters
    inputs = {key: value for key, value in features.items() if key in accepted}
    states: Tensor = model(**inputs, return_dict=True).pooler_output
    return states


def share_image_features(model: PumaModel, features: dict[str, Any]) -> None:
    """Run the vision tower once for student and teacher, where it is frozen and its output can be passed on.

    `pixel_values` `(num_patches, patch_dim)` in `features` gives way to `mm_encoder_outputs`.
    """
    if features.get("pixel_values") is None or not runs_tower_once(model):
        return
    encode: Any = model.get_image_features
    with torch.no_grad():
        image = encode(features.pop("pixel_values"), features["image_grid_thw"], return_dict=True)
    features["mm_encoder_outputs"] = {"image": image}
