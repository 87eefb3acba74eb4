"""Images out of requests."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
import zlib

import cv2
import numpy as np
from PIL import Image

from .errors import RequestError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
# What damaged images make Pillow raise, beside its own errors.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def decode_base64(text: str) -> bytes:
    """Decode base64.

    Raises:
        RequestError: It is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, 'bad_base64', '`image` is not base64') from None


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image as ``iconformer predict`` reads the file, but refuse a truncated one.

    The size is read from the header first, so an image that unfolds to a huge size is never decoded.

    Args:
        data: Bytes of a JPEG, PNG, WebP or BMP file.
        max_pixels: Largest number of pixels.

    Returns:
        (H, W, 3), uint8, BGR.

    Raises:
        RequestError: It is no such image, it is damaged or it is too large.
    """
    if not data:
        raise RequestError(400, 'bad_image', 'the image is empty')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of large images, which the next check is for
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise RequestError(
                    413,
                    'image_too_large',
                    f'the image has {width} x {height} pixels, {max_pixels} are allowed in all',
                )
            opened.load()
    except Image.DecompressionBombError:
        raise RequestError(413, 'image_too_large', f'the image has more than {max_pixels} pixels') from None
    except Image.UnidentifiedImageError:
        raise RequestError(400, 'bad_image', f'this is no image of a known format ({", ".join(FORMATS)})') from None
    except MemoryError:
        raise RequestError(413, 'image_too_large', 'the image does not fit into memory') from None
    except _DAMAGED as error:
        raise RequestError(400, 'bad_image', f'the image is damaged: {error}') from None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise RequestError(400, 'bad_image', 'the image is damaged')
    return image
