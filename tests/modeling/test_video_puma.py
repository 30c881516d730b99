"""Settings of videos everywhere; real videos, and pictures read by torchvision, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor
from transformers.utils.import_utils import is_av_available, is_torchvision_available

from puma_hf import PumaModel, PumaProcessor
from puma_hf.modeling import video_puma
from puma_hf.modeling.video_puma import read_frames, video_settings

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision: bash .ci/torchvision")
needs_av = pytest.mark.skipif(not is_av_available(), reason="needs PyAV: bash .ci/torchvision")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"patch_size": 14, "size": {"shortest_edge": 100352, "longest_edge": 602112}}),
        (
            {"min_pixels": 56, "max_pixels": 78, "patch_size": 8, "image_processor_type": "I", "processor_class": "P"},
            {"patch_size": 8, "size": {"shortest_edge": 56, "longest_edge": 78}},
        ),
        ({"size": {"shortest_edge": 5, "longest_edge": 7}, "fps": 2, "num_frames": None}, {"fps": 2}),
    ],
)
def test_settings_are_complete(given: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = video_settings(given)
    assert {**settings, **expected} == settings
    assert settings.keys() == video_settings({}).keys() | expected.keys()
    assert settings["video_processor_type"] == "Qwen2VLVideoProcessor"
    if is_torchvision_available():
        from transformers import Qwen2VLVideoProcessor

        assert json.loads(Qwen2VLVideoProcessor(**given).to_json_string()) | given == settings | given


FRAMES = np.stack([np.full((56, 84, 3), value, np.uint8) for value in (0, 60, 120, 180, 240, 250)])


def video_file(path: Path, container: str) -> Path:
    av: Any = pytest.importorskip("av", reason="needs PyAV: bash .ci/torchvision")
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("mpeg4" if container == "mp4" else "libvpx", rate=2)
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], "yuv420p"
        for frame in FRAMES:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("container", ["mp4", "webm"])  # WebM does not say how many frames there are
@needs_av
def test_all_frames_of_a_file_are_read(tmp_path: Path, container: str) -> None:
    path = video_file(tmp_path / "clip", container)
    for video in (path, str(path), path.read_bytes()):
        frames, fps = read_frames(video, "it")
        assert (frames.shape, fps) == (FRAMES.shape, 2)
        assert np.abs(frames.mean(axis=(1, 2, 3)) - FRAMES.mean(axis=(1, 2, 3))).max() < 5


def test_frames_are_taken_as_they_are() -> None:
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for video in (FRAMES, torch.from_numpy(FRAMES), pictures, list(FRAMES)):
        frames, fps = read_frames(video, "it")
        assert (frames == FRAMES).all()
        assert fps is None


@pytest.mark.parametrize("video", [b"no video", "missing.mp4", [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))]])
@needs_av
def test_what_is_no_video_is_named(video: Any) -> None:
    name = "'missing.mp4'" if isinstance(video, str) else f"given as {type(video).__name__}"
    with pytest.raises(ValueError, match=rf"inputs\[2\]: the video {name} cannot be read \(.+\)\. Pass a video"):
        read_frames(video, "inputs[2]")


def test_a_file_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_puma, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match=r"inputs\[2\]: a video file needs PyAV.*pip install 'puma-hf\[video\]'"):
        read_frames("clip.mp4", "inputs[2]")


@needs_av
@needs_torchvision
def test_videos_are_embedded(
    sentence_transformer: SentenceTransformer, processor: PumaProcessor, tmp_path: Path
) -> None:
    path = video_file(tmp_path / "clip.mp4", "mp4")
    frames, _ = read_frames(path, "it")
    pictures = [Image.fromarray(frame) for frame in frames]
    ways = [path, str(path), path.read_bytes(), frames, pictures]
    batch = processor.process_inputs([{"video": str(path)}, {"video": frames[:4], "text": "a red apple"}, "text"])
    # 6 and 4 frames, two of them a patch
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 2]
    assert batch["num_videos_per_sample"].tolist() == [1, 1, 0]
    assert batch["modality_ids"].tolist() == [3, 4, 0]
    for text in ({}, {"text": "a red apple"}):
        vectors = sentence_transformer.encode([{"video": video, **text} for video in ways])
        np.testing.assert_allclose(vectors, vectors[:1].repeat(len(ways), axis=0), rtol=0, atol=1e-5)
        other = sentence_transformer.encode({"video": frames[::-1], **text})
        assert np.abs(other - vectors[0]).max() > 1e-4
    processor.video_processor.do_sample_frames, processor.video_processor.num_frames = True, 2
    assert processor.process_inputs([{"video": path}])["video_grid_thw"][:, 0].tolist() == [1]
    processor.video_processor.min_frames, processor.video_processor.num_frames = 2, None
    processor.video_processor.fps = 1.5  # of 3 seconds: 4.5 frames, so 4
    assert processor.process_inputs([{"video": path}])["video_grid_thw"][:, 0].tolist() == [2]


@needs_torchvision
def test_pictures_read_by_torchvision_give_nearly_the_vectors_of_pillow(
    puma_dir: Path, model: PumaModel, processor: PumaProcessor, images: list[Image.Image]
) -> None:
    inputs = ["a red apple", *images, {"image": images[0], "text": "on a table"}]
    pillow = PumaProcessor.from_pretrained(puma_dir)
    pillow.image_processor = AutoImageProcessor.from_pretrained(puma_dir, backend="pil")
    with torch.inference_mode():
        one, other = (model(**part.process_inputs(inputs)).embeddings for part in (processor, pillow))
    assert type(processor.image_processor) is not type(pillow.image_processor)
    assert (1 - torch.cosine_similarity(one, other)).max() < 1e-3
    assert torch.equal(*(model(**part.process_inputs(inputs[:1])).embeddings for part in (processor, pillow)))
