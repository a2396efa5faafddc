"""Small pictures in image files for tests."""

import io

import numpy as np
from PIL import Image


def picture(seed, height=40, width=60):
    """uint8 (height, width, 3): smooth colours with some noise, different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    waves = np.stack([np.sin(x + seed), np.cos(y - x * seed), np.sin(x * y / 7)], axis=2)
    return np.clip(128 + 90 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def encoded(pixels, suffix=".png", mode=None, **options):
    """bytes of an image file."""
    content = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(content, Image.registered_extensions()[suffix.lower()], **options)
    return content.getvalue()


def write(path, pixels, **options):
    """Write an image file, with its folder; the path as str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels, path.suffix, **options))
    return str(path)


def exif_jpeg(pixels, orientation):
    """bytes of a JPEG that asks to be turned: EXIF's orientation, 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, ".jpg", quality=95, exif=exif)
