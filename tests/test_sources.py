"""All readings: prompts written out here, and the stock classes, give the same as copies with all layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from puma_hf import prune
from puma_hf.evaluation.layer_sweep import open_model
from puma_hf.hub.check import check
from puma_hf.modeling.fast_path_puma import FastPath
from tests.forks import run_worker
from tests.modeling.fresh_process import inputs_of_every_kind
from tests.tiny import build_checkpoint

# By reading: the family, the folder's name, visual tokens of an image, and the instruction where there is none.
PROFILES: dict[str, tuple[str, str, tuple[int, int], str]] = {
    "puma-released": ("qwen2_vl", "plain", (4, 256), ""),
    "source": ("qwen2_5_vl", "mine", (8, 64), "Find: "),
    "qwen3-vl-embedding": ("qwen3_vl", "Qwen3-VL-Embedding-2B", (4, 1800), "Represent the user's input."),
    "gme": ("qwen2_vl", "gme-Qwen2-VL-2B-Instruct", (256, 1280), "You are a helpful assistant."),
    "lamra": ("qwen2_vl", "LamRA-Ret", (4, 300), ""),
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# A template that nobody else has; `tail` and the generation prompt are asked for by sentence-transformers.
FOREIGN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + IMAGE + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}{{ tail }}"
)
TRANSFORMER: dict[str, Any] = {
    "modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "processing_kwargs": {
        "chat_template": {"add_generation_prompt": True, "tail": "<|endoftext|>"},
        "image": {"size": {"shortest_edge": 8 * 256, "longest_edge": 64 * 256}},
        "video": {"fps": 1},
    },
    "max_seq_length": 300,
}
SETTINGS = {"prompts": {"query": "Find: ", "none": ""}, "default_prompt_name": "query"}
SETTINGS |= {"similarity_fn_name": "dot", "truncate_dim": 24}


def with_modules(folder: Path, *kinds: str, pooling: Any = None, **settings: Any) -> None:
    """Make a checkpoint a plain directory of sentence-transformers, as that writes it."""
    every = enumerate(("Transformer", "Pooling", *kinds))
    modules = [{"path": f"{i}_{kind}" * bool(i), "type": f"sentence_transformers.models.{kind}"} for i, kind in every]
    files = {"modules": modules, "sentence_bert_config": settings or TRANSFORMER}
    files |= {"config_sentence_transformers": SETTINGS}
    files |= {"1_Pooling/config": pooling or {"embedding_dimension": 32, "pooling_mode": "lasttoken"}}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(FOREIGN)


def with_code(source: Path, name: str) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": name}}))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("sources"), {}
    for reading, (family, name, *_) in PROFILES.items():
        folders[reading] = build_checkpoint(root / name, family, extra_tokens=("<emb>",) if reading == "lamra" else ())
    with_modules(folders["source"], "Normalize")
    with_code(folders["gme"], "modeling_gme_qwen2vl.GmeQwen2VL")  # which sets the positions that its reading has
    return folders


@pytest.fixture(scope="module")
def copies(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All four layers of each."""
    root = tmp_path_factory.mktemp("copies")
    found = {"puma-released": "asked for", "source": "by modules.json, with last-token pooling"}
    for reading, source in sources.items():
        asked = reading if reading == "puma-released" else None
        report = prune(source, root / reading, num_kept_layers=4, reading=asked)
        assert (report.reading, report.parameters_after) == (reading, report.parameters_before)
        assert f"reading  {reading} ({found.get(reading, 'known by its name')})" in str(report)
    return {reading: root / reading for reading in sources}


def sentence(text: str) -> str:
    text = text.strip().strip('"')
    return text[:1].upper() + text[1:] + "." * (text[-1:] not in ".?!")


def written_out(reading: str, pictures: int, text: str, told: str | None) -> str:
    """The prompt of one input, as the authors' inference code has it."""
    told, user = PROFILES[reading][3] if told is None else told, IMAGE * pictures + text
    start, answer = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    if reading == "source":
        system = f"<|im_start|>system: {told}<|im_end|>\n" if told else ""
        return f"{system}<|im_start|>user: {user}<|im_end|>\n<|im_start|>assistant:<|endoftext|>"
    if reading == "qwen3-vl-embedding":
        told = told.strip() + "." * (told.strip()[-1] not in '.?\u3002"')
        return start.format(told) + (user or "NULL") + answer
    if reading == "gme":
        return start.format(told.strip()) + user + answer + "<|endoftext|>"
    said = sentence("\n".join(filter(None, (sentence(told), text))))
    nouns = " and ".join(["image"] * bool(pictures) + ["sentence"] * bool(said))
    user = f"{IMAGE * pictures}{said}\nSummarize above {nouns} in one word: "
    return start.format("You are a helpful assistant.") + user + answer + ("<emb>." if reading == "lamra" else "[RET].")


@torch.inference_mode()
def by_stock_classes(reading: str, source: Path, inputs: list[Any]) -> Tensor:
    """Vectors of the source, one input at a time, by the classes of transformers."""
    tokenizer, images = AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    model, rows = AutoModel.from_pretrained(source).eval(), []
    if reading == "puma-released":
        table, words = model.get_input_embeddings().weight, len(tokenizer)
        tokenizer.add_tokens(["[RET]"], special_tokens=True)
        table[words] = table[:words].mean(dim=0)
    unit = (images.patch_size * images.merge_size) ** 2
    least, most = (number * unit for number in PROFILES[reading][2])
    for item in inputs:
        item = item if isinstance(item, dict) else {"image" if Path(item).is_file() else "text": item}
        pictures = item.get("image", [])
        pictures = [Image.open(one) for one in (pictures if isinstance(pictures, list) else [pictures])]
        prompt, features = written_out(reading, len(pictures), item.get("text", ""), item.get("instruction")), {}
        if pictures:
            size = {"shortest_edge": least, "longest_edge": most}
            features = dict(images(pictures, size=size, return_tensors="pt"))
            first, *rest = prompt.split("<|image_pad|>")
            counts = features["image_grid_thw"].prod(dim=1) // 4
            prompt = first + "".join("<|image_pad|>" * int(n) + part for n, part in zip(counts, rest, strict=True))
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        features["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        if reading in ("gme", "lamra", "puma-released"):
            features["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        states = model(input_ids=ids, **features).last_hidden_state[0]
        words = tokenizer.convert_ids_to_tokens(ids[0])
        read = {"lamra": words.index("<emb>") - 1 if "<emb>" in words else 0, "puma-released": len(words) - 2}
        rows.append(torch.nn.functional.normalize(states[read.get(reading, -1)], dim=-1))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def picture_paths(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> list[str]:
    """The last is larger than the files' own limit of all but GME."""
    paths = [str(tmp_path_factory.mktemp("pictures") / f"{number}.png") for number in range(3)]
    for path, image in zip(paths, [*images[:2], images[2].resize((320, 290))], strict=True):
        image.save(path)
    return paths


@pytest.fixture(scope="module")
def fresh(copies: dict[str, Path], picture_paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process without puma_hf makes of them."""
    folder = tmp_path_factory.mktemp("fresh")
    job = {"images": picture_paths, "modules": str(folder / "modules"), "output": str(folder / "vectors.json")}
    job |= {"directories": {name: str(copy) for name, copy in copies.items()}, "saves": False}
    (folder / "job.json").write_text(json.dumps(job))
    run_worker("tests.modeling.fresh_process", folder / "job.json")
    return json.loads((folder / "vectors.json").read_text())


@pytest.mark.parametrize("reading", PROFILES)
def test_an_uncut_copy_reads_as_its_source(
    reading: str, sources: dict[str, Path], copies: dict[str, Path], picture_paths: list[str], fresh: Any
) -> None:
    inputs = [*inputs_of_every_kind(picture_paths), {"text": "which one?", "instruction": "Find it"}]
    inputs += [{"image": picture_paths[0], "instruction": "Which one?"}]
    inputs += [{"image": picture_paths, "text": "An apple!", "instruction": ' "find \u3002" '}]
    inputs += ["", {"text": "", "image": picture_paths[0]}] * (reading == "qwen3-vl-embedding")
    expected = by_stock_classes(reading, sources[reading], inputs)
    processor, model = AutoProcessor.from_pretrained(copies[reading]), AutoModel.from_pretrained(copies[reading]).eval()
    assert processor.tokenizer.padding_side == ("left" if reading == "gme" else "right")
    with torch.inference_mode():
        for padding in ("left", "right"):
            processor.tokenizer.padding_side = padding
            batch = processor.process_inputs(inputs)
            assert (model(**batch).embeddings - expected).abs().max() <= 1e-5
        features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        without = {name: value for name, value in batch.items() if name != "pixel_values"}
        assert (model(**without, mm_encoder_outputs={"image": features}).embeddings - expected).abs().max() <= 1e-5
        if model.config.positions == "sequential":  # images show which positions they got, texts have but one kind
            model.config.positions = "mrope"
            difference = (model(**batch).embeddings - expected).abs().amax(dim=1)
            assert difference[[1, 2, 3]].min() > 1e-4 > 1e-5 > difference[[0, 5]].max()
    opened: Any = SentenceTransformer(str(copies[reading]), trust_remote_code=True, device="cpu", truncate_dim=32)
    for fast_path in (FastPath(), FastPath(max_tokens=1), None):
        opened[0].fast_path = fast_path
        np.testing.assert_allclose(opened.encode(inputs), expected.numpy(), rtol=0, atol=1e-5)
    assert "modeling_gme" not in (copies[reading] / "config.json").read_text()
    assert batch["modality_ids"][:8].tolist() == [0, 1, 2, 2, 1, 0, 1, 2]
    for way, width in (("transformers", 32), ("sentence-transformers", 24 if reading == "source" else 32)):
        np.testing.assert_allclose(fresh[f"{reading}: {way}"], expected[:5, :width].numpy(), rtol=0, atol=1e-5)
    if reading != "puma-released":  # nothing was added to what it knows
        assert opened.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(sources[reading]).get_vocab()
        assert model.config.ret_token_id is None


def test_settings_of_the_source_stay(copies: dict[str, Path], tmp_path: Path) -> None:
    prune(copies["source"], tmp_path / "cut", num_kept_layers=2)
    for folder in (copies["source"], tmp_path / "cut"):
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        assert {name: getattr(model, name) for name in SETTINGS} == {**SETTINGS, "prompts": model.prompts}
        assert model.prompts.items() >= {"query": "Find: ", "none": ""}.items()
        # A long text is cut, the end of the prompt is not.
        ids = model[0].processor.process_inputs(["apple " * 300], "Find it")["input_ids"][0].tolist()
        assert len(ids) == model.max_seq_length == 300
        assert model.tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant:<|endoftext|>")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "[RET]" not in card
    assert "Inputs are read as `source`, with the chat template" in card


def test_check_and_sweep_work_on_sources(sources: dict[str, Path], copies: dict[str, Path], tmp_path: Path) -> None:
    for reading in ("source", "lamra"):
        report = check(copies[reading], source=sources[reading])
        compared = [row.form for row in report.rows if row.form.startswith("source")]
        assert compared == ["source, stock classes", "source, stock inputs too"][: 1 + (reading == "source")]
        assert report.ok, report
        copy = SentenceTransformer(str(copies[reading]), trust_remote_code=True, device="cpu")
        with open_model(str(sources[reading])) as model:
            np.testing.assert_array_equal(model.encode(["a table"]), copy.encode(["a table"]))
    prune(copies["gme"], tmp_path / "cut", num_kept_layers=2)
    with pytest.raises(ValueError, match="only an embedder's copy with all its layers"):
        check(tmp_path / "cut", source=sources["gme"])


# --- what cannot be cut as it is read


ENDS_IN_TEXT = FOREIGN.replace("{{ tail }}", "{{ messages[-1]['content'][-1]['text'] }}")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pooling": {"pooling_mode": "mean"}}, "pools by mean, and a cut copy by the last token"),
    ({"pooling": {"pooling_mode_cls_token": True}}, "pools by cls_token, "),
    ({"kinds": ("Dense", "Normalize")}, "has the modules Transformer, Pooling, Dense, Normalize, as one of many"),
    ({"kinds": ()}, "compares vectors of any length by dot"),
    ({"max_seq_length": 3}, "reads its inputs without a chat template"),
    ({**TRANSFORMER, "processing_kwargs": {"image": {"do_rescale": False}}}, "sets image.do_rescale in "),
    ({"code": "modeling_mine.Mine"}, "runs code of its own, modeling_mine.Mine, which may change"),
    ({"template": ENDS_IN_TEXT}, "does not end in a token"),
    ({"template": FOREIGN.replace(IMAGE, "")}, "has no place for an image"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_an_embedder_that_a_copy_would_not_be_like(
    change: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    change, source = dict(change), Path(shutil.copytree(sources["source"], tmp_path / "source"))
    code, template = change.pop("code", None), change.pop("template", None)
    with_modules(source, *change.pop("kinds", ("Normalize",)), **change)
    if code:
        with_code(source, code)
    if template:
        (source / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message) as caught:
        prune(source, tmp_path / "out", num_kept_layers=1)
    assert "pass --reading puma" in str(caught.value)
    # Which does what it says.
    assert prune(source, tmp_path / "out", num_kept_layers=1, reading="puma").reading == "puma"
    with pytest.raises(ValueError, match=r"LamRA-Ret' has no modules\.json, which would say how"):
        prune(sources["lamra"], tmp_path / "two", num_kept_layers=1, reading="source")


def test_a_name_that_promises_an_embedder(sources: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    source = shutil.copytree(sources["puma-released"], tmp_path / "my-embedder")
    assert prune(source, tmp_path / "out", num_kept_layers=1).reading == "puma"
    assert "'my-embedder' is taken for a generative model, as nothing says how it is read. If it reads" in caplog.text
