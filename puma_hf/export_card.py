"""The README of an export: how stock programs read the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puma_hf.modeling.configuration_puma import named_layers

_CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- puma
- multimodal-retrieval
- layer-pruning
---

# {title}

A retrieval embedder for text, images and both, as a plain `{model_type}` checkpoint: {kept} of the {total}
of {source}, without remote code. Exported by `puma-hf export`. It does not generate text: its
language-model head is only there because the stock class has one, and is tied to the token embedding.

The embedding is the last hidden state at the last token, `[RET]`, scaled to unit length; {dim} numbers. Every prompt
must come from `chat_template.jinja`, which ends in `[RET]`. An instruction is the system message; in a user message
pictures come before the text.

## transformers

The files are in the form of transformers 5: an older one may read the positions of `config.json` wrong without a word.

```python
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForImageTextToText.from_pretrained("{name}").eval()
chat = [
    {{"role": "system", "content": "Find an image that matches the sentence."}},
    {{"role": "user", "content": "a red apple"}},
]
batch = tokenizer([tokenizer.apply_chat_template(chat, tokenize=False)], return_tensors="pt")
with torch.inference_mode():
    states = model.model(**batch).last_hidden_state
embedding = torch.nn.functional.normalize(states[:, -1].float(), dim=-1)  # the last token that is not padding
```

For pictures take `AutoProcessor`, which needs torchvision, in the tokenizer's place, with `{{"type": "image"}}` items
in the chat and `images=[...]` in the call.

`puma-hf check PUMA_DIRECTORY --exported THIS_DIRECTORY` tells whether these embeddings are the PUMA model's.

## vLLM

**Not run:** vLLM was not installed where this was written. By its documentation, and by the names that its loader for
this family renames, this serves the embeddings:

```bash
vllm serve {name} --runner pooling --convert embed --chat-template-content-format openai
```

Its pooler takes the last token and scales to unit length unless told otherwise. Send chats, so that the template is
used; a bare `"input"` is not brought into the form that the model was trained on:

```bash
curl http://localhost:8000/v1/embeddings -H "Content-Type: application/json" -d '{{
  "model": "{name}",
  "messages": [{{"role": "user", "content": [
    {{"type": "image_url", "image_url": {{"url": "https://example.com/apple.png"}}}},
    {{"type": "text", "text": "a red apple"}}]}}]}}'
```
"""

_ONNX_CARD = """---
library_name: onnx
pipeline_tag: feature-extraction
tags:
- puma
- retrieval
- layer-pruning
---

# {title}, ONNX

A retrieval embedder for texts: {kept} of the {total} of {source} as an ONNX graph, in float32.
Exported by `puma-hf export --format onnx`, which compared it with PyTorch. **It embeds texts alone**: its vectors are
those of the PUMA model, so it can search an index of pictures that the model made. Keep `model.onnx.data` beside
`model.onnx`.

It takes `input_ids` and `attention_mask`, `(batch_size, sequence_length)`, padded on either side, and gives
`sentence_embedding`, `(batch_size, {dim})`, of unit length. Every prompt must come from `chat_template.jinja`, which
ends in `[RET]`. An instruction is the system message.{told}

```python
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = InferenceSession("{name}/model.onnx")
chat = [
    {{"role": "system", "content": "Find an image that matches the sentence."}},
    {{"role": "user", "content": "a red apple"}},
]
batch = tokenizer([tokenizer.apply_chat_template(chat, tokenize=False)], padding=True, return_tensors="np")
inputs = {{name: batch[name].astype("int64") for name in ("input_ids", "attention_mask")}}
(embedding,) = session.run(["sentence_embedding"], inputs)
```
"""


def write_export_card(
    folder: Path, config: Any, lineage: Mapping[str, Any], *, onnx: bool = False, told: str = ""
) -> None:
    """Write the `README.md` of an export.

    Args:
        folder: The directory.
        config: Its stock configuration.
        lineage: What the PUMA model's configuration says of its source.
        onnx: Whether it is an ONNX graph.
        told: What the reading makes of inputs, which is to be done before the template.
    """
    source = lineage["source_name_or_path"]
    text = (_ONNX_CARD if onnx else _CARD).format(
        title=f"{source or config.model_type}, {lineage['num_kept_layers']} layers",
        name="path/to/this/directory",
        model_type=config.model_type,
        kept=named_layers(lineage.get("kept_layers") or range(lineage["num_kept_layers"])),
        total=lineage["original_num_hidden_layers"],
        source=f"`{source}`" if source else "its source",
        dim=config.text_config.hidden_size,
        told=f"\nThe model was made to read inputs {told}: bring texts into that form first." if told else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
