"""Images of a source as pixels: decoded, and refused where they would have to be changed to fit the task."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from distillation.config import ImageClassification
from distillation.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG")
"""Whatever else Pillow can open is left out: the fewer decoders see foreign bytes, the better."""
MODES = {1: "L", 3: "RGB"}
NAMES = {"L": "grey (L)", "RGB": "red, green and blue (RGB)"}


def version() -> str:
    """Of the decoder: the pixels of a JPEG depend on it."""
    import PIL

    return str(PIL.__version__)


def pixels(value: Any, task: ImageClassification, where: str) -> bytes:
    """size * size * channels bytes, row by row; b"" where there is no image.

    value: {"bytes": ..., "path": ...} as `datasets` stores an image, the bytes of a PNG or JPEG file, or nested lists [rows][columns] or
    [rows][columns][channels] of numbers from 0 to 255. Raises InputError for anything else, and for another size or mode.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise InputError(
                "DST-3461", "image cannot be read", where=where, expected="the bytes of the image", found=f"only a path, {value['path']!r:.60}",
                do="Save the data set with the images inside it",
            )  # fmt: skip
        value = value.get("bytes")
    if value is None or (isinstance(value, bytes) and not value):
        return b""
    if isinstance(value, bytes):
        image = _decoded(value, task, where)
    elif isinstance(value, list):
        image = _from_array(value, where)
    else:
        raise InputError(
            "DST-3461", "image cannot be read", where=where, expected="bytes of a PNG or JPEG file, or rows of pixels",
            found=type(value).__name__,
        )  # fmt: skip
    return _fitted(image, task, where)


def _decoded(content: bytes, task: ImageClassification, where: str) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_size(image, task, where)  # before the pixels of a large one are unpacked
            upright: Image.Image = ImageOps.exif_transpose(image)
            upright.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError("DST-3461", "image is too large", where=where, expected="fewer pixels", found=str(error)[:80]) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        found = "bytes of another kind" if isinstance(error, UnidentifiedImageError) else str(error)[:80] or type(error).__name__
        raise InputError("DST-3461", "image cannot be read", where=where, expected="a whole PNG or JPEG file", found=found) from error
    return upright


def _from_array(value: list[Any], where: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros(0, object)  # rows of different lengths
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    whole = array.dtype.kind in "iu" and array.size > 0 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
    if not whole or array.min() < 0 or array.max() > 255:
        found = f"{array.dtype} of shape {list(array.shape)}" + (f" from {array.min()} to {array.max()}" if whole else "")
        raise InputError(
            "DST-3461", "image cannot be read", where=where,
            expected="integers from 0 to 255 in lists [rows][columns] or [rows][columns][1 or 3 channels]", found=found,
        )  # fmt: skip
    return Image.fromarray(array.astype(np.uint8))


def _check_size(image: Image.Image, task: ImageClassification, where: str) -> None:
    if not task.resize and image.size != (task.size, task.size):
        raise InputError(
            "DST-3462", "image has another size", where=where, expected=f"{task.size}x{task.size}", found=f"{image.width}x{image.height}",
            do="Set task.size, or task.resize to scale every image",
        )  # fmt: skip


def _fitted(image: Image.Image, task: ImageClassification, where: str) -> bytes:
    from PIL import Image

    _check_size(image, task, where)
    image = _without_loss(image)
    if image.mode != MODES[task.channels]:
        raise InputError(
            "DST-3463", "image has other channels", where=where, expected=NAMES[MODES[task.channels]],
            found=NAMES.get(image.mode, image.mode),
            do=f"Set task.channels to {4 - task.channels}" if image.mode in NAMES else "Convert the image to grey or RGB",
        )  # fmt: skip
    if task.resize and image.size != (task.size, task.size):
        image = image.resize((task.size, task.size), Image.Resampling.BILINEAR)
    return image.tobytes()


def _without_loss(image: Image.Image) -> Image.Image:
    """The image as grey or RGB, if that is another way of writing the same pixels; else unchanged."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "P" and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (255, 255):
        return image.convert(image.mode[:-1])
    return image
