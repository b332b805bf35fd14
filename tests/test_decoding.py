"""Every kind of picture becomes the upright 8-bit RGB that it shows; what does not is refused with a reason."""

import io
import pickle
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tasn_timm.data.decoding import (
    DECODERS,
    MAX_ASPECT,
    ORIENTATION,
    UnreadableImage,
    check_decoder,
    claimed_size,
    decode,
    read,
)

# Orientation -> what brings pixels (h, w, 3) upright. The standard says which side row 0 and column 0 of the file are.
UPRIGHT = {
    1: lambda a: a,  # row 0 top, column 0 left
    2: lambda a: np.fliplr(a),  # top, right
    3: lambda a: np.rot90(a, 2),  # bottom, right
    4: lambda a: np.flipud(a),  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: np.rot90(a, -1),  # right, top: a quarter clockwise
    7: lambda a: np.fliplr(np.flipud(a.transpose(1, 0, 2))),  # right, bottom
    8: lambda a: np.rot90(a, 1),  # left, bottom
}


def smooth(height: int = 96, width: int = 144) -> np.ndarray:
    """A picture (h, w, 3) without symmetry that JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    channels = 255 * x / width, 255 * y / height, 120 + 100 * np.sin(x / width * 5 + y / height * 2)
    return np.stack(channels, -1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes, decoder: str = "pillow", **options) -> np.ndarray:
    """Decoded pixels (h, w, 3), as integers that can be subtracted."""
    array = np.asarray(decode(dict(bytes=data, path=None), decoder, **options))
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    return array.astype(int)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colours: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file by the specification: `colours` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


@pytest.fixture(params=sorted(DECODERS))
def decoder(request) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    return request.param


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_jpegs_are_turned_upright(decoder, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(smooth(), "JPEG", quality=95, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data, decoder), UPRIGHT[orientation](stored))
    pillows = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data, decoder), np.asarray(pillows))


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_other_formats_are_turned_once(format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(smooth(), format, exif=exif, **(dict(lossless=True) if format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(data), UPRIGHT[orientation](smooth()))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_and_damaged_exif_change_nothing(decoder, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    plain = pixels(encode(smooth(), "JPEG"), decoder)
    np.testing.assert_array_equal(pixels(encode(smooth(), "JPEG", exif=exif), decoder), plain)
    np.testing.assert_array_equal(pixels(encode(smooth(), "JPEG", exif=b"Exif\0\0nonsense"), decoder), plain)


def test_odd_metadata_does_not_make_a_picture_unreadable(decoder):
    """ImageOps.exif_transpose writes the EXIF anew, and fails where a field is of another type than usual."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x011A] = 72.0  # horizontal resolution
    data = encode(smooth(), "JPEG", exif=exif)
    fraction, text = (struct.pack(">HH", 0x011A, kind) for kind in (5, 2))
    assert data.count(fraction) == 1
    np.testing.assert_array_equal(pixels(data.replace(fraction, text), decoder), pixels(data))


@pytest.mark.parametrize(
    "options", [dict(subsampling=0), dict(subsampling=2), dict(keep_rgb=True), dict(progressive=True)]
)
def test_decoders_agree_on_jpegs(options):
    pytest.importorskip("simplejpeg")
    data = encode(smooth(97, 143), "JPEG", quality=90, **options)
    np.testing.assert_array_equal(pixels(data, "simplejpeg"), pixels(data, "pillow"))
    assert np.abs(pixels(data) - smooth(97, 143)).mean() < 3


def test_decoders_agree_on_everything_else():
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(smooth())
    files = [encode(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    files += [encode(image, format) for format in ("PNG", "GIF", "BMP", "WEBP", "TIFF")]
    for data in files:
        np.testing.assert_array_equal(pixels(data, "simplejpeg", min_side=20), pixels(data, "pillow"))


def test_decoders_agree_on_what_is_readable():
    """libjpeg warns of bytes that do not belong; cameras write such files, and Pillow reads them."""
    pytest.importorskip("simplejpeg")
    data = encode(smooth(), "JPEG")
    for odd in (data[:-2] + b"\x12\x34\x56" + data[-2:], data + b"trailer"):
        np.testing.assert_array_equal(pixels(odd, "simplejpeg"), pixels(data))
    for cut in (data[:-2], data[: len(data) // 2], data[:100]):
        reasons = []
        for decoder in DECODERS:
            with pytest.raises(UnreadableImage) as error:
                pixels(cut, decoder, min_side=20)
            reasons.append(str(error.value))
        assert reasons[0] == reasons[1]


@pytest.mark.parametrize("size", [(600, 800), (803, 601), (448, 448), (300, 1201)])
@pytest.mark.parametrize("min_side", [32, 75, 200, 256, 448, 5000])
def test_simplejpeg_shrinks_no_further_than_asked(size, min_side):
    pytest.importorskip("simplejpeg")
    data = encode(smooth(*size), "JPEG", quality=95)
    array = pixels(data, "simplejpeg", min_side=min_side)
    height, width = array.shape[:2]
    assert min(height, width) >= min(min_side, *size)
    if min(size) >= 2 * min_side:
        assert height <= size[0] / 2 + 1, "something was saved"
    if min(size) <= min_side:
        assert (height, width) == size
    reduced = Image.fromarray(smooth(*size)).resize((width, height), Image.Resampling.BOX)
    difference = np.abs(array - np.asarray(reduced).astype(int))
    assert difference.max() <= 12 and difference.mean() < 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_simplejpeg_shrinks_turned_pictures_too(orientation):
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    array = pixels(encode(smooth(400, 800), "JPEG", quality=95, exif=exif), "simplejpeg", min_side=100)
    assert array.shape[:2] == ((100, 200) if orientation == 1 else (200, 100))
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](smooth(400, 800))))
    reduced = upright.resize(array.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(array - np.asarray(reduced)).max() <= 12


def test_pillow_gives_an_image_and_simplejpeg_may_give_an_array():
    pytest.importorskip("simplejpeg")
    image = dict(bytes=encode(smooth(), "JPEG"), path=None)
    assert isinstance(decode(image), Image.Image) and decode(image).mode == "RGB"
    array = decode(image, "simplejpeg")
    assert isinstance(array, np.ndarray) and array.flags.c_contiguous


def test_cmyk_keeps_its_colours(decoder):
    data = encode(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    difference = np.abs(pixels(data, decoder) - smooth())
    assert difference.mean() < 2 and difference.max() <= 12


def test_grey_and_black_and_white_are_repeated():
    grey = Image.fromarray(smooth()).convert("L")
    np.testing.assert_array_equal(pixels(encode(grey, "PNG")), np.asarray(grey)[..., None].repeat(3, -1))
    data = png(8, 1, 1, 0, bytes([0, 0b00011011]))
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [0, 0, 0, 255, 255, 0, 255, 255])
    data = png(4, 1, 2, 0, bytes([0, 0b00011011]))
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [0, 85, 170, 255])


PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50, 0, 0, 0]))


def test_palettes_are_looked_up():
    data = png(3, 1, 8, 3, bytes([0, 1, 0, 2]), PALETTE)
    np.testing.assert_array_equal(pixels(data)[0], [[200, 100, 50], [10, 20, 30], [0, 0, 0]])
    data = encode(Image.fromarray(smooth()).quantize(64), "GIF")
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def on_white(colour: list[int], alpha: int) -> list[float]:
    """A colour (0-255) of an opacity (0-255) as a white page shows it."""
    return [value * alpha / 255 + 255 * (1 - alpha / 255) for value in colour]


def test_transparent_pictures_are_laid_on_white():
    alphas = [0, 255, 128]
    data = png(3, 1, 8, 3, bytes([0, 0, 1, 2]), PALETTE, chunk(b"tRNS", bytes(alphas)))
    expected = [on_white(*pair) for pair in zip([[10, 20, 30], [200, 100, 50], [0, 0, 0]], alphas)]
    np.testing.assert_allclose(pixels(data)[0], expected, atol=1)

    rgba = np.array([[[200, 100, 50, alpha] for alpha in (0, 1, 100, 254, 255)]], np.uint8)
    expected = [on_white([200, 100, 50], alpha) for alpha in (0, 1, 100, 254, 255)]
    for format, options in (("PNG", {}), ("WEBP", dict(lossless=True, exact=True)), ("TIFF", {})):
        np.testing.assert_allclose(pixels(encode(rgba, format, **options))[0], expected, atol=1)

    data = png(3, 1, 8, 4, bytes([0, 90, 0, 90, 255, 90, 128]))  # grey and alpha
    assert Image.open(io.BytesIO(data)).mode == "LA"
    np.testing.assert_allclose(pixels(data)[0, :, 0], [255, 90, *on_white([90], 128)], atol=1)

    data = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))  # one colour
    np.testing.assert_array_equal(pixels(data)[0], [[255, 255, 255], [4, 5, 6]])
    gif = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    gif.putpalette([10, 20, 30, 200, 100, 50])
    np.testing.assert_array_equal(pixels(encode(gif, "GIF", transparency=0))[0], [[255] * 3, [200, 100, 50]])


def test_16_bit_grey_is_scaled_not_cut_off():
    values = np.array([[0, 128, 129, 257, 300, 32768, 65406, 65407, 65535]], np.uint16)
    expected = np.round(values[0] / 257)
    for data in (encode(values, "PNG"), encode(values, "TIFF"), encode(values.astype(np.int32), "TIFF")):
        assert Image.open(io.BytesIO(data)).mode.startswith("I")
        for channel in range(3):
            np.testing.assert_array_equal(pixels(data)[0, :, channel], expected)


def test_16_bit_grey_with_a_transparent_value():
    raw = b"\0" + struct.pack(">4H", 0, 300, 65535, 32768)
    data = png(4, 1, 16, 0, raw, chunk(b"tRNS", struct.pack(">H", 300)))
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [0, 255, 255, 128])


def test_16_bit_colours_are_scaled():
    values = [0, 300, 65535, 32768, 128, 40000]
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *values))
    np.testing.assert_allclose(pixels(data).ravel(), np.array(values) / 257, atol=1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32), "floating point pixels, of unknown range"),
        (np.full(16, 70000, np.int32), "32-bit pixels, of unknown range"),
        (np.full(16, -1, np.int32), "32-bit pixels, of unknown range"),
    ],
)
def test_values_of_unknown_range_are_refused(values, reason):
    with pytest.raises(UnreadableImage, match=reason):
        pixels(encode(values.reshape(4, 4), "TIFF"))


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", dict(lossless=True)), ("TIFF", {}), ("MPO", {})]
)
def test_of_several_pictures_the_first_counts(decoder, format, options):
    first, second = Image.fromarray(smooth()).quantize(64).convert("RGB"), Image.new("RGB", (144, 96), "blue")
    data = encode(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    difference = np.abs(pixels(data, decoder) - np.asarray(first))
    assert difference.mean() < (5 if format == "MPO" else 0.01)


def test_a_decompression_bomb_is_refused_before_it_takes_memory(decoder):
    data = png(40000, 40000, 8, 2, b"\0" * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage, match="1600000000 pixels.* exceeds limit"):
            pixels(data, decoder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_strips_are_refused(decoder):
    assert pixels(encode(np.zeros((2, 2 * MAX_ASPECT, 3), np.uint8), "JPEG"), decoder).shape == (2, 2 * MAX_ASPECT, 3)
    for shape in ((100, 1, 3), (1, 100, 3), (2, 2 * MAX_ASPECT + 1, 3)):
        with pytest.raises(UnreadableImage, match=f"{shape[1]} x {shape[0]} pixels: no side may be 50 times"):
            pixels(encode(np.zeros(shape, np.uint8), "JPEG"), decoder)


NOT_AN_IMAGE = "not an image, or of a format that Pillow does not know"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(smooth(), "JPEG")[:1000], "image file is truncated"),
        (encode(smooth(), "PNG")[:1000], "image file is truncated"),
        (encode(smooth(), "JPEG")[:20], NOT_AN_IMAGE),
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", NOT_AN_IMAGE),
        (None, "the row has no picture"),
    ],
)
def test_reasons(decoder, data, reason):
    with pytest.raises(UnreadableImage, match=reason) as error:
        decode(dict(bytes=data, path=None), decoder)
    assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)


def test_files_may_be_given_by_path(decoder, tmp_path):
    path, data = tmp_path / "a.jpg", encode(smooth(), "JPEG")
    path.write_bytes(data)
    given = dict(bytes=None, path=str(path))
    assert read(given) == data == read(dict(bytes=data, path="elsewhere.jpg"))
    np.testing.assert_array_equal(np.asarray(decode(given, decoder)), pixels(data))
    for path, reason in ((tmp_path / "none.jpg", "the file does not exist"), (tmp_path, "Is a directory")):
        with pytest.raises(UnreadableImage) as error:
            decode(dict(bytes=None, path=str(path)), decoder)
        assert str(error.value) == reason
    with pytest.raises(UnreadableImage, match="the row has no picture"):
        decode(None, decoder)


def test_lack_of_memory_is_not_the_pictures_fault(monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setitem(DECODERS, "pillow", fail)
    with pytest.raises(MemoryError):
        pixels(encode(smooth(), "JPEG"))


def test_a_worker_can_hand_the_error_over():
    with pytest.raises(UnreadableImage) as error:
        pixels(b"text")
    copy = pickle.loads(pickle.dumps(error.value))
    assert type(copy) is UnreadableImage and str(copy) == NOT_AN_IMAGE


def test_decoders_are_checked_by_name_and_package(monkeypatch):
    check_decoder("pillow")
    with pytest.raises(ValueError, match="unknown decoder 'simplejpg': did you mean 'simplejpeg'"):
        check_decoder("simplejpg")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ValueError, match=r"'simplejpeg' is not installed: pip install 'tasn_timm\[fast\]'"):
        check_decoder("simplejpeg")


def test_an_installed_decoder_passes():
    pytest.importorskip("simplejpeg")
    check_decoder("simplejpeg")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_picture_that_is_a_program_is_not_run(decoder, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: 1 / 0)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    with pytest.raises(UnreadableImage, match="not an image, or of a format"):
        decode(dict(bytes=file.getvalue(), path=None), decoder)


def test_the_size_that_a_file_claims_is_read_without_decoding_it():
    whole = io.BytesIO()
    Image.new("RGB", (40, 30)).save(whole, "PNG")
    assert claimed_size(whole.getvalue()) == (40, 30)
    assert claimed_size(whole.getvalue()[:50]) == (40, 30), "its pixels are cut off"
    with pytest.raises(UnreadableImage, match="not an image"):
        claimed_size(b"no picture")
