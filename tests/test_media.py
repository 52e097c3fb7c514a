"""Pictures and videos between disk and tensors."""

import contextlib
import errno
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vcd_fast import media
from vcd_fast.media import frame_strip, read_image, read_video, resize_crop, write_image, write_video


def psnr(a, b):
    return -10 * math.log10((a.double() - b.double()).square().mean().item())


def smooth_video(frames=6, height=64, width=96):
    """Slanted waves of different colours that travel: no flat areas, nothing that 4:2:0 would have to lose."""
    t = torch.arange(frames).view(-1, 1, 1) / frames
    y = torch.linspace(0, 1, height).view(1, -1, 1)
    x = torch.linspace(0, 1, width).view(1, 1, -1)
    channels = [0.5 + 0.45 * torch.sin(2 * math.pi * (a * x + b * y + t)) for a, b in ((1, 0.5), (0.5, 1.5), (1.5, 1))]
    return torch.stack(channels, dim=1)


@pytest.fixture
def video():
    return smooth_video()


@pytest.fixture
def image():
    return smooth_video(1, 30, 41)[0]


@contextlib.contextmanager
def as_nobody():
    """Root may read everything; give that up for a while."""
    user = os.geteuid()
    if user:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def eight_bit(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


# ---- pictures


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_lossless_pictures_come_back_to_half_a_step(tmp_path, image, suffix):
    write_image(tmp_path / f"a{suffix}", image)
    back = read_image(tmp_path / f"a{suffix}")
    assert back.shape == image.shape
    assert back.dtype == torch.float32
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_written(tmp_path, image, dtype):
    write_image(tmp_path / "a.png", image.to(dtype).requires_grad_())
    assert (read_image(tmp_path / "a.png") - image.to(dtype).float()).abs().max() <= 0.5 / 255 + 1e-6


def test_jpeg_comes_back_close(tmp_path, image):
    write_image(tmp_path / "a.jpg", image)
    assert psnr(read_image(tmp_path / "a.jpg"), image) > 40


def test_exif_orientation_is_applied(tmp_path, image):
    """Every orientation, each stored such that a viewer shows the same picture."""
    upright = eight_bit(image)
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 255
    for orientation, operation in stored.items():
        picture = upright if operation is None else upright.transpose(operation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "a.png", exif=exif)
        assert torch.equal(read_image(tmp_path / "a.png"), expected), orientation


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 51  # a fifth of a dark red
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = torch.tensor([0.2 * 200 / 255 + 0.8, 0.8, 0.8]).view(3, 1, 1).expand(3, 4, 6)
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected)


def test_grey_with_alpha_is_composited_on_white(tmp_path):
    la = np.zeros((4, 6, 2), np.uint8)
    la[:, 3:, 1] = 255
    Image.fromarray(la).save(tmp_path / "a.png")
    back = read_image(tmp_path / "a.png")
    assert back[:, :, :3].eq(1).all()
    assert back[:, :, 3:].eq(0).all()


@pytest.mark.parametrize("transparent", [None, 1])
def test_palette_with_and_without_a_transparent_colour(tmp_path, transparent):
    picture = Image.new("P", (6, 4))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (3, 0, 6, 4))
    picture.save(tmp_path / "a.png", **({} if transparent is None else {"transparency": transparent}))
    back = read_image(tmp_path / "a.png")
    assert back[:, 0, 0].tolist() == [1, 0, 0]
    assert back[:, 0, 5].tolist() == ([0, 0, 1] if transparent is None else [1, 1, 1])


def test_sixteen_bit_grey_keeps_its_precision(tmp_path):
    grey = np.linspace(0, 65535, 4 * 6).astype(np.uint16).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "a.png")
    back = read_image(tmp_path / "a.png")
    expected = torch.from_numpy(grey.astype(np.float64) / 65535).expand(3, 4, 6)
    assert (back.double() - expected).abs().max() < 1e-6


def test_grey_bilevel_and_cmyk_become_rgb(tmp_path):
    Image.new("L", (6, 4), 51).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").sub(0.2).abs().max() < 1e-6
    Image.new("1", (6, 4), 1).save(tmp_path / "bilevel.png")
    assert read_image(tmp_path / "bilevel.png").eq(1).all()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = read_image(tmp_path / "cmyk.jpg")
    assert red.shape == (3, 16, 16)
    torch.testing.assert_close(red.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff.*8 or 16 bits.*floating-point"):
        read_image(tmp_path / "a.tiff")


def test_wide_integers_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 70000, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff.*8 or 16 bits per channel.*70000"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("read", [read_image, read_video])
def test_missing_and_forbidden_files_are_named(tmp_path, read, image):
    path = tmp_path / "a.png"
    with pytest.raises(FileNotFoundError) as missing:
        read(path)
    assert str(missing.value.filename) == str(path)
    write_image(path, image)
    path.chmod(0)
    with as_nobody(), pytest.raises(PermissionError) as forbidden:
        read(path)
    assert str(forbidden.value.filename) == str(path)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        read_image(tmp_path)
    assert str(caught.value.filename) == str(tmp_path)


def test_damaged_pictures_are_named(tmp_path, image):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png.*empty"):
        read_image(path)
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
        read_image(path)
    for suffix in (".png", ".jpg", ".webp"):
        whole = tmp_path / f"whole{suffix}"
        write_image(whole, torch.rand(3, 64, 64))
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"cut\..*cannot be read"):
            read_image(cut)


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match=r"a\.png.*exceeds limit"):
        read_image(tmp_path / "a.png")


# ---- resize_crop


def test_same_size_is_unchanged(image):
    assert resize_crop(image, 30, 41) is image


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (17, 5), (1, 1), (333, 111)])
@pytest.mark.parametrize("source", [(64, 96), (50, 300), (301, 40)])
def test_resize_crop_has_the_size_asked_for(size, source):
    out = resize_crop(torch.rand(2, 3, *source), *size)
    assert out.shape == (2, 3, *size)
    assert out.min() >= 0
    assert out.max() <= 1


def test_resize_crop_covers_and_keeps_the_centre():
    """A wide ramp loses its ends and not its middle; along the other axis nothing is lost."""
    ramp = torch.linspace(0, 1, 400).expand(3, 100, 400)
    out = resize_crop(ramp, 50, 50)
    torch.testing.assert_close(out[0, 25], torch.linspace(0.375, 0.625, 51)[:-1] + 0.0025, atol=2e-3, rtol=0)
    tall = torch.linspace(0, 1, 100).view(1, -1, 1).expand(3, 100, 400)
    assert resize_crop(tall, 50, 50)[0, :, 0].diff().min() > 0.01


def test_resize_crop_is_antialiased_and_differentiable():
    checker = (torch.arange(64).view(-1, 1) + torch.arange(64)).remainder(2).float().expand(3, 64, 64)
    assert resize_crop(checker, 16, 16)[:, 2:-2, 2:-2].sub(0.5).abs().max() < 0.05
    image = torch.rand(3, 20, 30, dtype=torch.float64, requires_grad=True)
    resize_crop(image * 0.8 + 0.1, 10, 10).sum().backward()
    assert image.grad.abs().sum() > 0


def test_resize_crop_keeps_half_precision(image):
    out = resize_crop(image.bfloat16(), 16, 24)
    assert out.dtype == torch.bfloat16
    assert (out.float() - resize_crop(image, 16, 24)).abs().max() < 0.02


# ---- videos


@pytest.mark.parametrize("fps", [8, 24, 15.0, 24000 / 1001, 29.97, 12.5, 60])
def test_frame_rate_and_count_are_true(tmp_path, video, fps):
    write_video(tmp_path / "a.mp4", video, fps)
    back, rate = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert back.dtype == torch.float32
    assert rate == pytest.approx(fps, rel=1e-6)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(len(video) / fps, abs=2e-3)


@pytest.mark.parametrize("frames", [1, 2, 51])
def test_no_frame_is_lost(tmp_path, frames):
    write_video(tmp_path / "a.mp4", smooth_video(frames, 32, 48), 8)
    assert len(read_video(tmp_path / "a.mp4")[0]) == frames


def test_crf_10_is_faithful_and_in_the_right_order(tmp_path, video):
    write_video(tmp_path / "a.mp4", video, 8)
    back, _ = read_video(tmp_path / "a.mp4")
    for index, frame in enumerate(video):
        assert psnr(back[index], frame) > 36  # 33 if chroma is repeated instead of interpolated
    write_video(tmp_path / "b.mp4", video, 8, crf=40)
    assert psnr(read_video(tmp_path / "b.mp4")[0], video) < psnr(back, video) - 3


def test_colours_survive_at_full_saturation(tmp_path):
    """A wrong matrix or range would miss by 5 to 20 per cent."""
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
    video = colours.view(-1, 3, 1, 1).expand(-1, 3, 32, 32)
    write_video(tmp_path / "a.mp4", video, 8)
    back, _ = read_video(tmp_path / "a.mp4")
    assert (back - video).abs().max() < 0.02
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace, context.color_range) == ("yuv420p", 1, 1)


def test_max_frames_reads_the_first_ones(tmp_path, video):
    write_video(tmp_path / "a.mp4", video, 8)
    whole, _ = read_video(tmp_path / "a.mp4")
    first, fps = read_video(tmp_path / "a.mp4", max_frames=2)
    assert torch.equal(first, whole[:2])
    assert fps == 8


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_display_rotation_is_applied(tmp_path, video, degrees):
    """The file's display matrix turns what is stored counter-clockwise by `degrees`, as phones write it."""
    write_video(tmp_path / "a.mp4", video, 8)
    expected = torch.rot90(read_video(tmp_path / "a.mp4")[0], degrees // 90, (2, 3))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one, unit = 1 << 16, 1 << 30
    # row vectors in a frame whose y points down, fixed point 16.16 and 2.30 (ISO 14496-12, 8.3.2)
    content[matrix : matrix + 36] = struct.pack(">9i", cos * one, -sin * one, 0, sin * one, cos * one, 0, 0, 0, unit)
    (tmp_path / "b.mp4").write_bytes(content)
    assert torch.equal(read_video(tmp_path / "b.mp4")[0], expected)


def test_names_that_look_like_protocols_or_patterns(tmp_path, video):
    write_video(tmp_path / "concat:a %03d.mp4", video, 8)
    assert len(read_video(tmp_path / "concat:a %03d.mp4")[0]) == len(video)


def test_a_gif_is_a_video(tmp_path):
    pictures = [Image.new("RGB", (6, 4), (i * 50, 0, 0)) for i in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    video, fps = read_video(tmp_path / "a.gif")
    assert (video[:, 0, 0, 0] * 255).round().tolist() == [0, 50, 100, 150]
    assert fps == pytest.approx(10)


def reencoded(path, video, codec, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = video.shape[-1], video.shape[-2], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_image(eight_bit(frame))))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"movflags": "+faststart"}),
        ("mkv", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
    ],
)
def test_a_truncated_video_is_refused(tmp_path, suffix, codec, options):
    path = tmp_path / f"a.{suffix}"
    torch.manual_seed(0)
    reencoded(path, torch.rand(12, 3, 64, 96), codec, **options)
    assert len(read_video(path)[0]) == 12
    content = path.read_bytes()
    for keep in (0.3, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ValueError, match=rf"a\.{suffix}.*(cut short|damaged|no frames)"):
            read_video(path)


def test_damage_inside_a_video_is_refused_not_patched_up(tmp_path):
    path = tmp_path / "a.mp4"
    torch.manual_seed(0)
    reencoded(path, torch.rand(12, 3, 64, 96), "libx264")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4 + (len(content) - content.index(b"mdat")) // 3
    content[start : start + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4.*damaged"):
        read_video(path)


def test_what_is_no_video_is_named(tmp_path, image):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.mp4.*empty"):
        read_video(path)
    path.write_bytes(os.urandom(2000))
    with pytest.raises(ValueError, match=r"a\.mp4.*not a video"):
        read_video(path)
    (tmp_path / "a.txt").write_text("just some text\n" * 40)
    with pytest.raises(ValueError, match=r"a\.txt.*expected a video"):
        read_video(tmp_path / "a.txt")
    write_image(tmp_path / "a.png", image)
    with pytest.raises(ValueError, match=r"a\.png.*expected a video"):
        read_video(tmp_path / "a.png")


def test_sound_without_pictures_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"a\.wav.*without a video stream"):
        read_video(tmp_path / "a.wav")


# ---- folders of frames


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (0, 2, 9, 10, 11):
        write_image(tmp_path / f"frame_{number}.png", torch.full((3, 4, 6), number / 255))
    (tmp_path / ".hidden_1.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("no picture")
    video, fps = read_video(tmp_path)
    assert (video[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 9, 10, 11]
    assert fps is None
    assert len(read_video(tmp_path, max_frames=2)[0]) == 2


def test_folders_that_are_no_frames(tmp_path, image):
    with pytest.raises(ValueError, match="found no picture"):
        read_video(tmp_path)
    write_image(tmp_path / "0.png", image)
    write_image(tmp_path / "00.png", image)
    with pytest.raises(ValueError, match=r"0\.png and 00\.png|00\.png and 0\.png"):
        read_video(tmp_path)
    (tmp_path / "00.png").rename(tmp_path / "cover.png")
    with pytest.raises(ValueError, match=r"cover\.png.*number"):
        read_video(tmp_path)
    (tmp_path / "cover.png").unlink()
    write_image(tmp_path / "1.png", image[:, 1:])
    with pytest.raises(ValueError, match=r"1\.png.*30 x 41.*29 x 41"):
        read_video(tmp_path)


# ---- strips


def blocks(line, at_least=100):
    """The runs of one colour along a line of pixels that are as wide as a frame, white left out."""
    values, counts = torch.unique_consecutive((line * 255).round(), return_counts=True)
    return [v.item() for v, c in zip(values, counts, strict=True) if c >= at_least and v != 255]


def test_strip_shows_both_ends_and_the_picture_first():
    """Frames of one flat colour each: what is where can be read off the sheet."""
    video = torch.linspace(26, 194, 15).div(255).view(-1, 1, 1, 1).expand(-1, 3, 64, 96)
    rows = [("base", video), ("tuned", video.flip(0))]
    sheet = frame_strip(rows, torch.full((3, 30, 50), 230 / 255), columns=4)
    assert sheet.dtype == torch.float32
    assert sheet.shape[0] == 3
    for (_, clip), line in zip(rows, (sheet.shape[1] // 4, sheet.shape[1] * 3 // 4), strict=True):
        shown = [clip[i, 0, 0, 0].mul(255).round().item() for i in (0, 5, 9, 14)]
        assert blocks(sheet[0, line]) == [230, *shown]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_are_shown_whole(frames):
    clip = torch.linspace(51, 204, frames).div(255).view(-1, 1, 1, 1).expand(-1, 3, 32, 208)
    sheet = frame_strip([("a clip", clip)])
    assert blocks(sheet[0, sheet.shape[1] // 2], 208) == [v.mul(255).round().item() for v in clip[:, 0, 0, 0]]


def test_strip_keeps_long_labels_and_captions_inside():
    clip = torch.zeros(12, 3, 300, 20)
    sheet = frame_strip([("a label much longer than the sheet is wide, " * 20, clip)], clip[0])
    assert sheet[:, :, :14].eq(1).all()
    assert sheet[:, :, -14:].eq(1).all()
    assert sheet[:, :14].eq(1).all()


def test_strips_of_what_cannot_be_compared(video):
    with pytest.raises(ValueError, match="rows: expected at least one"):
        frame_strip([])
    with pytest.raises(ValueError, match=r"rows\[1\].*64 x 96.*32 x 96"):
        frame_strip([("a", video), ("b", video[:, :, :32])])
    with pytest.raises(TypeError, match=r"rows\[0\].*string as label"):
        frame_strip([(1, video)])
    with pytest.raises(ValueError, match="columns"):
        frame_strip([("a", video)], columns=1)
    with pytest.raises(ValueError, match=r"image.*\[3, H, W\]"):
        frame_strip([("a", video)], video)


# ---- bad arguments, and writing whole or not at all


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v[0], ValueError, r"video: expected the shape \[T, 3, H, W\].*\[3, 64, 96\]"),
        (lambda v: v[:, :1], ValueError, r"video: expected the shape"),
        (lambda v: v[:0], ValueError, r"video: expected the shape.*\[0, 3, 64, 96\]"),
        (lambda v: v * 255, ValueError, r"video: expected values in \[0, 1\]"),
        (lambda v: v * 2 - 1, ValueError, r"video: expected values in \[0, 1\]"),
        (lambda v: v * math.nan, ValueError, r"video: expected values in \[0, 1\]"),
        (lambda v: (v * 255).byte(), TypeError, r"video: expected floating point.*uint8"),
        (lambda v: v.numpy(), TypeError, r"video: expected a tensor.*ndarray"),
        (lambda v: v[..., 1:], ValueError, r"video: expected an even height and width, got 64 x 95"),
        (lambda v: v[..., 1:, :], ValueError, r"video: expected an even height and width, got 63 x 96"),
    ],
)
def test_videos_that_cannot_be_written(tmp_path, video, change, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / "a.mp4", change(video), 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"fps": -8}, "fps"),
        ({"crf": 52}, "crf"),
        ({"crf": 1.5}, "crf"),
        ({"path": "a.avi"}, r"suffix \.mp4.*a\.avi"),
    ],
)
def test_settings_that_cannot_be_written(tmp_path, video, arguments, message):
    arguments = {"path": "a.mp4", "fps": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        write_video(video=video, **{**arguments, "path": tmp_path / arguments["path"]})
    with pytest.raises(ValueError, match="max_frames"):
        read_video(tmp_path, max_frames=0)


def test_pictures_that_cannot_be_written(tmp_path, image):
    with pytest.raises(ValueError, match=r"suffix.*a\.xyz"):
        write_image(tmp_path / "a.xyz", image)
    with pytest.raises(ValueError, match=r"image: expected the shape \[3, H, W\].*\[1, 3, 30, 41\]"):
        write_image(tmp_path / "a.png", image[None])
    with pytest.raises(ValueError, match="height"):
        resize_crop(image, 0, 3)
    with pytest.raises(ValueError, match="width"):
        resize_crop(image, 3, 2.5)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, H, W\]"):
        resize_crop(image[:2], 3, 3)


def test_a_missing_folder_is_named(tmp_path, image):
    with pytest.raises(FileNotFoundError) as caught:
        write_image(tmp_path / "absent" / "a.png", image)
    assert caught.value.filename == str(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        write_image(tmp_path / "file" / "a.png", image)
    assert caught.value.filename == str(tmp_path / "file")


def test_writing_replaces_and_leaves_nothing_beside(tmp_path, video, image):
    for _ in range(2):
        write_video(tmp_path / "a.mp4", video, 8)
        write_image(tmp_path / "a.png", image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]
    assert (tmp_path / "a.png").stat().st_mode & 0o444 == 0o444 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


FULL_DISK = """
import resource, sys, torch
from vcd_fast.media import write_image, write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for write in (lambda: write_video(sys.argv[1] + "/a.mp4", torch.rand(4, 3, 64, 96), 8), lambda: write_image(sys.argv[1] + "/a.png", torch.rand(3, 64, 96))):
    try:
        write()
    except OSError as error:
        print(error.errno, error.filename)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The kernel refuses to let files grow beyond 2000 bytes."""
    (tmp_path / "a.mp4").write_text("the old one")
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(media.__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{errno.EFBIG} {tmp_path}/a.mp4", f"{errno.EFBIG} {tmp_path}/a.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "the old one"


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, image, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_may_be_written_to(tmp_path):
    """The three channels of a grey picture do not alias each other."""
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    image[0] = 0
    assert image[1].max() > 0
