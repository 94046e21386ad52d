"""Decoding and cropping: the released preparation's pixels, whatever kind of file they come from."""

from __future__ import annotations

import numpy as np
import pytest
from photos import encoded, photograph
from PIL import Image

from rae_xla.benchmarks.input import released_crop
from rae_xla.data.transforms import centre_crop, decoded, decoded_fast, random_crop


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (640, 427), (333, 257), (1100, 700), (90, 300)])
def test_centre_crop_is_adms(size: tuple[int, int]) -> None:
    image = photograph(1, size)
    expected = released_crop(image, 256)
    assert (centre_crop(image, 256, "exact") == expected).all()
    difference = np.abs(centre_crop(np.asarray(image), 256, "fast").astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01


def test_random_crops_reach_every_edge() -> None:
    image = photograph(2, (60, 40))
    whole = np.asarray(image)
    for drawn, (top, left) in {(0.0, 0.0): (0, 0), (1 - 2**-24, 1 - 2**-24): (8, 28), (0.5, 0.5): (4, 14)}.items():
        assert (random_crop(image, 40, 32, drawn, "exact") == whole[top : top + 32, left : left + 32]).all()


def test_files_of_other_kinds_come_as_upright_rgb() -> None:
    image = photograph(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(encoded(image, exif=exif, quality=95))
    assert turned.size == (60, 80)
    plain = np.asarray(decoded(encoded(image, quality=95)))
    assert (np.asarray(turned) == np.rot90(plain, -1)).all()
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("L", "PNG")):
        found = decoded(encoded(image.convert(mode), kind))
        assert found.mode == "RGB" and found.size == image.size
        grey = np.asarray(image.convert("L")).astype(int).mean()
        assert abs(np.asarray(found.convert("L")).astype(int).mean() - grey) < 6
    with pytest.raises(ValueError, match="no image of a known kind"):
        decoded(b"something else")


def test_the_fast_decoder_gives_the_same_pixels_and_finds_the_same_faults() -> None:
    image, exif = photograph(4, (101, 77)), Image.Exif()
    exif[0x0112] = 5
    files = [
        *[encoded(image, quality=quality, subsampling=sub) for quality in (50, 90) for sub in (0, 1, 2)],
        encoded(image, progressive=True, exif=exif),
        *[encoded(image.convert(mode), kind) for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"))],
        encoded(image) + bytes(7),
    ]
    for file in files:
        assert (np.asarray(decoded_fast(file)) == np.asarray(decoded(file))).all()
    for broken in (files[0][:-300], files[0][:100], b"\xff\xd8\xff\xd9", b""):
        with pytest.raises((OSError, ValueError)):
            decoded(broken)
        with pytest.raises((OSError, ValueError)):
            decoded_fast(broken)
