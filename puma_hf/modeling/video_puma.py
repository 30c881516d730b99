"""Videos of a Qwen2-VL: settings that are kept where nothing can run them, and frames read by PyAV."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.import_utils import is_av_available, is_torchvision_available
from transformers.video_utils import load_video, read_video_pyav

from .image_inputs_puma import load_rgb_image

# What Qwen2VLVideoProcessor has by itself, written out: without torchvision the class cannot be asked.
_FAMILY = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_sample_frames": False,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_frames": 768,
    "max_video_tokens": 128000,
    "merge_size": 2,
    "min_frames": 4,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "return_metadata": False,
    "size": {"longest_edge": 28 * 28 * 768, "shortest_edge": 28 * 28 * 128},
    "temporal_patch_size": 2,
}
_NOT_VIDEO = ("auto_map", "processor_class", "image_processor_type")


def video_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete settings of a video processor, the same whatever is installed.

    Args:
        given: What a file says of videos, or of images where it says nothing of videos: transformers, too, reads the
            `preprocessor_config.json` of an original Qwen2-VL as both.

    Returns:
        What `Qwen2VLVideoProcessor(**given).to_dict()` gives where torchvision is installed.
    """
    found = {name: value for name, value in given.items() if value is not None and name not in _NOT_VIDEO}
    size = dict(found.get("size") or _FAMILY["size"])
    for old_name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        size[edge] = found.pop(old_name, size.get(edge))
    return {**_FAMILY, **found, "size": size, "video_processor_type": "Qwen2VLVideoProcessor"}


def video_part(given: Any, image_processor: Any) -> Any:
    """What reads videos, or without torchvision its settings, which a save writes again.

    Args:
        given: A video processor, settings, or `None` for those of `image_processor`, as in directories that were made
            without torchvision up to version 0.1.
        image_processor: The image processor.
    """
    if given is not None and not isinstance(given, Mapping):
        return given
    settings = video_settings(given or image_processor.to_dict())
    if not is_torchvision_available():
        return settings
    from transformers import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor(**settings)


def read_frames(video: Any, where: str) -> tuple[np.ndarray, float | None]:
    """The frames of a video, `(num_frames, height, width, channels)`, and how many a second has, where that is known.

    Args:
        video: A path, a URL, the bytes of a file, an array of frames or a list of images of one size.
        where: Name of the input, for errors.

    Raises:
        ValueError: If the video cannot be read.
        ImportError: If it is a file and PyAV is not installed.
    """
    is_file = isinstance(video, (str, Path, bytes))
    if is_file and not is_av_available():
        raise ImportError(
            f"{where}: a video file needs PyAV, which is not installed. Run `pip install 'puma-hf[video]'`."
        )
    try:
        if is_file:
            if isinstance(video, bytes):
                frames, about = read_video_pyav(BytesIO(video), _all_frames)  # type: ignore[arg-type]
            else:
                frames, about = load_video(str(video), backend="pyav", sample_indices_fn=_all_frames)
            return np.asarray(frames), about.fps
        if hasattr(video, "shape"):
            return np.ascontiguousarray(video), None
        return np.stack([np.asarray(load_rgb_image(frame, where)) for frame in video]), None
    except Exception as error:  # PyAV has an error for each way to be broken
        name = repr(str(video)) if isinstance(video, (str, Path)) else f"given as {type(video).__name__}"
        raise ValueError(
            f"{where}: the video {name} cannot be read ({error}). Pass a video file or its frames."
        ) from error


def _all_frames(**_: Any) -> range:
    return range(sys.maxsize)  # some containers do not say how many they hold
