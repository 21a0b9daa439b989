"Pictures: each kind of file as a viewer shows it, against Pillow and numpy; faults named; hashes of contents."
import io
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from laid_nb.haystack import Haystack
from laid_nb.pictures import (
    BadPicture,
    MissingPicture,
    check_pictures,
    decode_picture,
    open_picture,
    picture_hash,
    refuse_bad_pictures,
)

rng = np.random.default_rng(0)
COLOURS = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
RGB = Image.fromarray(COLOURS)
ALPHA = rng.integers(0, 256, (6, 9), dtype=np.uint8)


def saved(picture, form="PNG", **more):
    "A file's bytes."
    out = io.BytesIO()
    picture.save(out, form, **more)
    return out.getvalue()


def shown(picture, form="PNG", **more): return np.asarray(decode_picture(saved(picture, form, **more))).astype(int)


def over_white(colours, alpha):
    a = np.asarray(alpha, float)[..., None]/255
    return np.asarray(colours, float)*a + 255*(1 - a)


# orientation

@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"JPEG": dict(quality=95), "WEBP": dict(lossless=True)}.get(form, {})
    data = saved(RGB, form, exif=exif, **more)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((9, 6) if orientation < 5 else (6, 9))
    assert np.array_equal(decode_picture(data), expected)
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
             6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}
    if form != "JPEG": assert np.array_equal(expected, turns[orientation](COLOURS))


def test_a_broken_exif_block_says_nothing():
    assert np.array_equal(shown(RGB, exif=b"Exif\0\0garbage"), COLOURS)


def test_a_turned_transparent_scan_is_turned_and_over_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = RGB.convert("RGBA")
    picture.putalpha(Image.fromarray(ALPHA))
    assert np.abs(shown(picture, exif=exif) - np.rot90(over_white(COLOURS, ALPHA), -1)).max() <= 1


# transparency

def test_alpha_over_white():
    picture = RGB.convert("RGBA")
    picture.putalpha(Image.fromarray(ALPHA))
    expected = over_white(COLOURS, ALPHA)
    for form, more in (("PNG", {}), ("WEBP", dict(lossless=True, exact=True)), ("TIFF", {})):
        assert np.abs(shown(picture, form, **more) - expected).max() <= 1, form
    grey = Image.fromarray(COLOURS[..., 0])
    picture = Image.merge("LA", (grey, Image.fromarray(ALPHA)))
    assert np.abs(shown(picture) - over_white(COLOURS[..., :1].repeat(3, -1), ALPHA)).max() <= 1


def test_transparent_entries_of_a_palette():
    picture = RGB.quantize(5)
    index, palette = np.asarray(picture), np.array(picture.getpalette()[:15]).reshape(5, 3)
    one = over_white(palette[index], np.where(index == 2, 0, 255))
    assert np.array_equal(shown(picture, transparency=2), one)
    assert np.array_equal(shown(picture, "GIF", transparency=2), one)
    several = np.array([0, 128, 255, 40, 255], np.uint8)
    assert np.abs(shown(picture, transparency=several.tobytes()) - over_white(palette[index], several[index])).max() <= 1


def test_one_colour_that_is_not_drawn():
    key = tuple(map(int, COLOURS[2, 3]))
    expected = np.where((COLOURS == key).all(-1, keepdims=True), 255, COLOURS)
    assert np.array_equal(shown(RGB, transparency=key), expected)
    grey = COLOURS[..., 0]
    expected = np.where(grey == grey[1, 1], 255, grey)[..., None].repeat(3, -1)
    assert np.array_equal(shown(Image.fromarray(grey), transparency=int(grey[1, 1])), expected)


def png(rows, depth, kind, *chunks):
    "A PNG by hand: rows of bytes, bit depth, colour type, further chunks."
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, kind, 0, 0, 0)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks) + chunk(
        b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_a_key_with_16_bits():
    deep = COLOURS.astype(np.uint16)*257
    data = png(deep, 16, 2, (b"tRNS", struct.pack(">HHH", *map(int, deep[2, 3]))))
    expected = np.where((COLOURS == COLOURS[2, 3]).all(-1, keepdims=True), 255, COLOURS)
    assert np.array_equal(decode_picture(data), expected)
    grey = deep[..., 0]
    data = png(grey, 16, 0, (b"tRNS", struct.pack(">H", int(grey[1, 1]))))
    expected = np.where(grey == grey[1, 1], 255, COLOURS[..., 0])[..., None].repeat(3, -1)
    assert np.array_equal(decode_picture(data), expected)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_modes_that_no_file_has(mode):
    from laid_nb.pictures import _as_shown
    alpha = Image.fromarray(np.where(ALPHA > 127, 255, 0).astype(np.uint8))
    base = RGB.quantize(5).convert("RGB") if mode == "PA" else RGB
    if mode == "La": base = base.convert("L").convert("RGB")
    picture = base.convert("RGBA")
    picture.putalpha(alpha)
    expected = over_white(np.asarray(base), np.asarray(alpha))
    if mode == "PA":
        made = base.quantize(5).convert("PA")
        made.putalpha(alpha)
    else:
        made = picture.convert("LA").convert("La") if mode == "La" else picture.convert(mode)
    assert made.mode == mode and np.abs(np.asarray(_as_shown(made)).astype(int) - expected).max() <= 1


# grey and colours

@pytest.mark.parametrize("form, dtype", [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_16_bits_by_their_type(form, dtype):
    values = rng.integers(0, 30_000, (6, 9)).astype(dtype)  # nothing is white: nothing is stretched
    picture = Image.fromarray(values)
    assert picture.mode == {"<u2": "I;16", ">u2": "I;16B"}[dtype]
    assert np.abs(shown(picture, form) - (values.astype(float)/257)[..., None]).max() <= .51


@pytest.mark.parametrize("low, high", [(0, 1), (.2, .7), (-4, 9), (0, 255), (100, 90_000)])
def test_float_and_integers_by_their_range(low, high):
    values = np.linspace(low, high, 54, dtype=np.float32).reshape(6, 9)
    black, white = (0, 1) if high <= 1 else (low, high)
    expected = 255*(values - black)/(white - black)
    assert np.abs(shown(Image.fromarray(values), "TIFF") - expected[..., None]).max() <= .51
    whole = np.linspace(low*100, high*100, 54).reshape(6, 9).astype(np.int32)
    expected = 255*(whole.astype(float) - whole.min())/(whole.astype(float).max() - whole.min())
    assert np.abs(shown(Image.fromarray(whole), "TIFF") - expected[..., None]).max() <= .51


def test_what_is_not_a_number_is_black():
    values = np.linspace(0, 1, 54, dtype=np.float32).reshape(6, 9)
    values[0, 1], values[2, 2] = np.nan, np.inf
    picture = shown(Image.fromarray(values), "TIFF")
    assert picture[0, 1, 0] == picture[2, 2, 0] == 0 and picture[-1, -1, 0] == 255
    assert not shown(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF").any()


def test_cmyk_of_adobe_is_inverted_in_the_file_and_right_in_the_picture():
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = saved(flat, "JPEG", quality=100)
    assert b"Adobe" in data and np.abs(np.asarray(decode_picture(data)).astype(int) - (0, 255, 255)).max() < 4
    assert np.array_equal(shown(flat, "TIFF")[0, 0], (0, 255, 255))


@pytest.mark.parametrize("mode, form", [("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("P", "PNG"), ("YCbCr", "TIFF")])
def test_pillows_own_conversions(mode, form):
    picture = RGB.quantize(6) if mode == "P" else RGB.convert(mode)
    assert np.array_equal(shown(picture, form), picture.convert("RGB"))


def test_hsv_and_lab():
    from laid_nb.pictures import _as_shown
    hsv = RGB.convert("HSV")
    assert np.array_equal(_as_shown(hsv), hsv.convert("RGB"))
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    soft = Image.fromarray(COLOURS//4 + 96)
    lab = ImageCms.applyTransform(soft, to_lab)
    assert np.abs(shown(lab, "TIFF") - np.asarray(soft)).max() <= 6  # 8 bits of LAB are coarse


def test_a_profile_is_brought_to_srgb():
    linear = ImageCms.ImageCmsProfile(io.BytesIO(_linear_profile()))
    expected = ImageCms.profileToProfile(RGB, linear, ImageCms.createProfile("sRGB"), outputMode="RGB")
    picture = shown(RGB, icc_profile=_linear_profile())
    assert np.array_equal(picture, expected) and np.abs(picture - COLOURS).max() > 20
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile"): assert np.array_equal(shown(RGB, icc_profile=profile), COLOURS)


def _linear_profile():
    "sRGB's primaries without its curve: each tone curve of a profile of sRGB replaced by the identity."
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", data[128:132])[0]):
        name, start, size = struct.unpack(">4sII", data[132 + 12*i:144 + 12*i])
        if name in (b"rTRC", b"gTRC", b"bTRC"): data[start:start + 12] = b"curv" + bytes(8)
        if name == b"desc": data[start:start + size] = data[start:start + size].replace(b"s\0R", b"x\0R").replace(b"sR", b"xR")
    return bytes(data)


@pytest.mark.parametrize("form, more", [("GIF", {}), ("PNG", {}), ("WEBP", dict(lossless=True)), ("TIFF", {})])
def test_the_first_frame(form, more):
    others = [Image.new("RGB", RGB.size, c) for c in ("red", "blue")]
    first = RGB.quantize(20).convert("RGB")
    data = saved(first, form, save_all=True, append_images=others, **more)
    assert Image.open(io.BytesIO(data)).n_frames == 3 and np.array_equal(decode_picture(data), first)


# faults

@pytest.fixture
def bad(tmp_path):
    "Files that cannot be shown, and words of what is wrong with each."
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = {"JPEG": saved(Image.fromarray(big), "JPEG"), "PNG": saved(Image.fromarray(big))}
    bomb = bytearray(whole["PNG"])
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    flipped = bytearray(whole["PNG"])
    flipped[len(flipped)//2] ^= 255
    files = {"empty.jpg": (b"", "empty"), "page.jpg": (b"<html>no such picture</html>", "not an image"),
             "cut.jpg": (whole["JPEG"][:len(whole["JPEG"])//2], "truncated"),
             "cut.png": (whole["PNG"][:len(whole["PNG"])//2], "truncated"), "flipped.png": (bytes(flipped), ""),
             "head.png": (whole["PNG"][:20], ""), "bomb.png": (bytes(bomb), "pixels"),
             "tall.png": (saved(Image.new("L", (2, 402))), "200"), "wide.jpg": (saved(Image.new("L", (2010, 10)), "JPEG"), "200")}
    for name, (data, _) in files.items(): (tmp_path/name).write_bytes(data)
    (tmp_path/"folder.png").mkdir()
    return {tmp_path/name: word for name, (_, word) in files.items()} | {
        tmp_path/"folder.png": "folder", tmp_path/"gone.png": "no such"}


def test_each_fault_is_named(bad):
    for file, word in bad.items():
        with pytest.raises(BadPicture) as info: open_picture(file)
        message = str(info.value)
        assert str(file) in message and word in message and "\n" not in message and "BytesIO" not in message
        assert isinstance(info.value, MissingPicture) == isinstance(info.value, FileNotFoundError) == (word == "no such")


def test_all_of_them_at_once(bad, tmp_path):
    good = tmp_path/"good.png"
    RGB.save(good)
    files = [*bad, good]
    stacks = [Haystack((*files[:4], good), ()), Haystack(tuple(files), ()), SimpleNamespace(images=())]
    found = check_pictures(stacks, progress=False)
    assert [file for file, _ in found] == [str(file) for file in bad]
    assert all(word in wrong for (_, wrong), word in zip(found, bad.values()))
    with pytest.raises(BadPicture, match=f"{len(bad)} of {len(files)} pictures") as info: refuse_bad_pictures(stacks, False)
    assert all(str(file) in str(info.value) for file in bad) and "\n" not in str(info.value)
    assert check_pictures([Haystack((good, str(good)), ())], progress=False) == []
    refuse_bad_pictures([Haystack((good,), ())], False)


def test_a_name_of_another_format_is_a_warning(tmp_path):
    (tmp_path/"a.jpg").write_bytes(saved(RGB))
    (tmp_path/"b.jpeg").write_bytes(saved(RGB, "JPEG"))
    with pytest.warns(UserWarning, match="1 pictures .*a.jpg is PNG"):
        assert check_pictures([Haystack((tmp_path/"a.jpg", tmp_path/"b.jpeg"), ())], progress=False) == []
    assert np.array_equal(open_picture(tmp_path/"a.jpg"), COLOURS)


# hashes

def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    from laid_nb import pictures
    RGB.save(tmp_path/"a.png")
    read = []
    monkeypatch.setattr(pictures, "_digest", lambda data, digest=pictures._digest: read.append(len(data)) or digest(data))
    first = picture_hash(tmp_path/"a.png")
    assert [picture_hash(tmp_path/"a.png") for _ in range(3)] == [first]*3 and len(read) == 1
    RGB.transpose(0).save(tmp_path/"a.png")
    os.utime(tmp_path/"a.png", ns=(0, 0))
    assert picture_hash(tmp_path/"a.png") != first and len(read) == 2
    with pytest.raises(MissingPicture, match="gone"): picture_hash(tmp_path/"gone.png")


def test_what_has_bytes_is_hashed_as_a_file_would_be(tmp_path):
    RGB.save(tmp_path/"a.png")
    cell = SimpleNamespace(read_bytes=(tmp_path/"a.png").read_bytes)
    assert picture_hash(cell) == picture_hash(tmp_path/"a.png") == picture_hash(str(tmp_path/"a.png"))
    assert np.array_equal(open_picture(cell), COLOURS)
