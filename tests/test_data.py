"""Folders of pictures and prompts."""

import collections
import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from vcd_fast.data import DataSettings, PictureFolder
from vcd_fast.media import read_image, resize_crop, write_video

EXAMPLES = Path(__file__).parents[1] / "examples" / "pictures"
HEIGHT, WIDTH = 32, 48


def picture(path, seed=0, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_rows(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def open_folder(folder, height=HEIGHT, width=WIDTH, **settings):
    return PictureFolder(DataSettings(pictures=str(folder), **settings), height, width)


def problems(folder, height=HEIGHT, width=WIDTH, **settings):
    """What the table lists, with line breaks and repeated spaces taken out."""
    with pytest.raises(ValueError, match="problem") as caught:
        open_folder(folder, height, width, **settings)
    return re.sub(r"\s+", " ", str(caught.value))


@pytest.fixture
def folder(tmp_path):
    """Five pictures, the last held out."""
    for index in range(5):
        picture(tmp_path / f"{index}.png", index)
    rows = [{"image": f"{index}.png", "prompt": f"picture {index}"} for index in range(5)]
    rows[4]["held_out"] = True
    write_rows(tmp_path, *rows)
    return tmp_path


# ---- what is read


def test_rows_become_samples(folder):
    data = open_folder(folder)
    assert len(data) == 5
    assert [sample.index for sample in data.samples] == [0, 1, 2, 3, 4]
    assert [sample.name for sample in data.samples] == ["0", "1", "2", "3", "4"]
    assert [sample.prompt for sample in data.samples] == [f"picture {i}" for i in range(5)]
    assert data.samples[0].negative_prompt is None
    assert data.samples[3].path == folder / "3.png"
    assert data.training == (0, 1, 2, 3)
    assert data.held_out == (4,)


def test_pictures_are_cropped_to_the_size_asked_for(folder):
    data = open_folder(folder, 16, 16)
    whole = read_image(folder / "2.png")
    assert torch.equal(data.image(2), resize_crop(whole, 16, 16))
    assert torch.equal(data.image(2, HEIGHT, WIDTH), whole)
    data.image(2).zero_()
    assert data.image(2).max() > 0, "the caller's tensor is the cached one"


@pytest.mark.parametrize("image", ["image", "image_path", "image_file", "file_name", "filename", "path"])
@pytest.mark.parametrize("prompt", ["prompt", "text", "caption"])
def test_aliases(folder, image, prompt):
    write_rows(folder, {image: "0.png", prompt: "a", "negative_prompt": "blurry", "width": 48})
    (sample,) = open_folder(folder, held_out=0).samples
    assert (sample.path.name, sample.prompt, sample.negative_prompt) == ("0.png", "a", "blurry")


@pytest.mark.parametrize(
    ("mark", "out"),
    [
        ({"held_out": True}, True),
        ({"held_out": False}, False),
        ({"split": "validation"}, True),
        ({"split": "test"}, True),
        ({"split": "held-out"}, True),
        ({"split": "train"}, False),
        ({"split": "test", "held_out": True}, True),
        ({}, False),
    ],
)
def test_marks_of_the_split(folder, mark, out):
    write_rows(
        folder,
        {"image": "0.png", "prompt": "a", **mark},
        {"image": "1.png", "prompt": "a", "held_out": True},
        {"image": "2.png", "prompt": "a", "held_out": False},
    )
    data = open_folder(folder)
    assert data.held_out == ((0, 1) if out else (1,))
    assert data.training == ((2,) if out else (0, 2))


def test_first_frame_of_a_video_is_the_condition(folder):
    video = torch.linspace(0.2, 0.8, 4).view(-1, 1, 1, 1).expand(-1, 3, HEIGHT, WIDTH)
    write_video(folder / "clip.mp4", video, 8)
    for index in (9, 10):
        picture(folder / "frames" / f"frame_{index}.png", index)
    write_rows(
        folder,
        {"video": "clip.mp4", "prompt": "a"},
        {"file_name": "clip.mp4", "prompt": "b"},
        {"video": "frames", "prompt": "c"},
        {"image": "1.png", "video": "clip.mp4", "prompt": "d"},
    )
    data = open_folder(folder, held_out=0)
    assert (data.image(0) - 0.2).abs().max() < 0.01
    assert torch.equal(data.image(0), data.image(1))
    assert torch.equal(data.image(2), read_image(folder / "frames" / "frame_9.png"))
    assert torch.equal(data.image(3), read_image(folder / "1.png"))


def test_csv(folder):
    (folder / "metadata.jsonl").unlink()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "negative_prompt", "held_out"])
        writer.writerow(["0.png", 'a "quoted", long\nprompt', "", "false"])
        writer.writerow(["1.png", "b", "blurry", "true"])
        writer.writerow(["2.png", "c", "", ""])
    data = open_folder(folder)
    assert [sample.prompt for sample in data.samples] == ['a "quoted", long\nprompt', "b", "c"]
    assert [sample.negative_prompt for sample in data.samples] == [None, "blurry", None]
    assert data.held_out == (1,)


def test_text_files(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "README.txt").write_text("not a prompt")
    for index in range(5):
        (folder / f"{index}.txt").write_text(f"picture {index}\nsecond line\n")
    write_video(folder / "clip.mp4", torch.rand(3, 3, HEIGHT, WIDTH), 8)
    (folder / "clip.txt").write_text("a clip")
    data = open_folder(folder, held_out=0.2)
    assert [sample.name for sample in data.samples] == ["0", "1", "2", "3", "4", "clip"]
    assert data.samples[1].prompt == "picture 1 second line"
    assert len(data.held_out) == 1


def test_jsonl_goes_before_csv_before_text_files(folder):
    (folder / "metadata.csv").write_text("image,prompt\n0.png,from csv\n")
    (folder / "0.txt").write_text("from text")
    assert open_folder(folder).samples[0].prompt == "picture 0"
    (folder / "metadata.jsonl").unlink()
    assert [sample.prompt for sample in open_folder(folder, held_out=0).samples] == ["from csv"]


def test_byte_order_mark_blank_lines_and_line_separators(folder):
    rows = [
        "",
        json.dumps({"image": "0.png", "prompt": "a\u2028b"}, ensure_ascii=False),
        "  ",
        '{"image":"1.png","text":"c"}',
    ]
    (folder / "metadata.jsonl").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    assert [sample.prompt for sample in open_folder(folder, held_out=0).samples] == ["a\u2028b", "c"]


def test_names_are_unique_and_fit_for_files(folder):
    picture(folder / "sub" / "0.png", 10)
    picture(folder / "0.jpg", 11)
    write_rows(
        folder,
        {"image": "0.png", "prompt": "a"},
        {"image": "0.png", "prompt": "b"},
        {"image": "0.jpg", "prompt": "c"},
        {"image": "./sub/0.png", "prompt": "d"},
    )
    assert [s.name for s in open_folder(folder, held_out=0).samples] == ["0", "0_2", "0_3", "sub_0"]


def test_exif_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGBA", (HEIGHT, WIDTH), (0, 0, 0, 0)).save(tmp_path / "a.png", exif=exif)
    write_rows(tmp_path, {"image": "a.png", "prompt": "a"})
    image = open_folder(tmp_path, held_out=0).image(0)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.eq(1).all()


# ---- identity and order


def test_hash_changes_with_what_matters_and_only_then(folder):
    def changed(**row):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        rows[1].update(row)
        write_rows(folder, *rows)
        value = open_folder(folder).data_hash
        rows[1] = {"image": "1.png", "prompt": "picture 1"}
        write_rows(folder, *rows)
        return value

    before = open_folder(folder).data_hash
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    assert changed() == before
    assert len({before, changed(prompt="other"), changed(negative_prompt="bad"), changed(held_out=True)}) == 4
    moved = folder / "elsewhere"
    moved.mkdir()
    for index in range(5):
        (moved / f"renamed{index}.png").write_bytes((folder / f"{index}.png").read_bytes())
    text = (folder / "metadata.jsonl").read_text().replace('"image": "', '"image": "renamed')
    (moved / "metadata.jsonl").write_text(text)
    assert open_folder(moved).data_hash == before
    picture(folder / "3.png", 99)
    assert open_folder(folder).data_hash != before


def test_every_pass_takes_each_training_sample_once(folder):
    data = open_folder(folder)
    passes = [[data.order(7, 4 * epoch + i) for i in range(4)] for epoch in range(40)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len({tuple(one) for one in passes}) > 12, "of 24 possible orders"
    first = collections.Counter(one[0] for one in passes)
    assert set(first) == {0, 1, 2, 3}


def test_order_depends_on_seed_and_position_alone(folder):
    data, other = open_folder(folder), open_folder(folder)
    forward = [data.order(3, position) for position in range(60)]
    backward = [other.order(3, position) for position in reversed(range(60))]
    assert forward == backward[::-1]
    assert forward != [data.order(4, position) for position in range(60)]
    # written down once: no machine or version may see another order
    assert forward[:12] == [1, 2, 0, 3, 0, 1, 2, 3, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="position"):
        data.order(3, -1)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.4, 2), (0.8, 4)])
def test_fraction_held_out(folder, fraction, count):
    rows = [{"image": f"{index}.png", "prompt": f"picture {index}"} for index in range(5)]
    write_rows(folder, *rows)
    data = open_folder(folder, held_out=fraction)
    assert len(data.held_out) == count
    assert sorted(data.training + data.held_out) == list(range(5))
    write_rows(folder, *rows[::-1])
    turned = open_folder(folder, held_out=fraction)
    assert {turned.samples[i].name for i in turned.held_out} == {data.samples[i].name for i in data.held_out}


def test_a_picture_with_two_prompts_is_on_one_side_of_the_split(folder):
    write_rows(folder, *[{"image": f"{i}.png", "prompt": p} for i in range(5) for p in ("a", "b")])
    data = open_folder(folder, held_out=0.4)
    assert len(data.held_out) == 4
    assert not {data.samples[i].path for i in data.held_out} & {data.samples[i].path for i in data.training}


# ---- what is refused


def test_everything_wrong_is_reported_at_once(folder, tmp_path):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:1500])
    picture(folder / "small.png", 20, (HEIGHT - 1, WIDTH))
    write_rows(
        folder,
        {"image": "absent.png", "prompt": "a"},
        '{"image": "0.png", "prompt": }',
        '["0.png", "a"]',
        {"image": "0.png"},
        {"image": "0.png", "prompt": "  "},
        {"image": "0.png", "prompt": 3},
        {"prompt": "a"},
        {"image": 5, "prompt": "a"},
        {"image": "empty.png", "prompt": "a"},
        {"image": "text.png", "prompt": "a"},
        {"image": "cut.png", "prompt": "a"},
        {"image": "small.png", "prompt": "a"},
        {"image": "0.png", "prompt": "a", "negative_promt": "b"},
        {"image": "0.png", "prompt": "a", "text": "b"},
        {"image": "0.png", "prompt": "a", "split": "sometimes"},
        {"image": "0.png", "prompt": "a", "held_out": "maybe"},
        {"image": "0.png", "prompt": "a", "held_out": True, "split": "train"},
        {"image": "0.png", "prompt": "a", "negative_prompt": []},
    )
    found = problems(folder)
    for line, what in {
        1: "absent.png: no such file",
        2: "not JSON: Expecting value at column 30",
        3: 'expected {"image": ..., "prompt": ...}, got',
        4: "no prompt: expected a key prompt, text or caption, got image",
        5: "the prompt is empty",
        6: "the prompt: expected text, got 3",
        7: "no picture: expected a key image, file_name or video, got prompt",
        8: "the picture: expected a path relative to the folder, got 5",
        9: "empty.png: the file is empty (0 bytes)",
        10: "text.png: expected a picture",
        11: "cut.png: the picture cannot be read",
        12: "small.png: 31 x 48 pixels (height x width), the video has 32 x 48",
        13: "unknown key 'negative_promt'; did you mean 'negative_prompt'?",
        14: "prompt and text say different things",
        15: "split: expected one of train, training, held_out, validation, val, test, eval, got 'sometimes'",
        16: "held_out: expected true or false, got 'maybe'",
        17: "split and held_out say different things",
        18: "negative_prompt: expected text, got []",
    }.items():
        assert f"metadata.jsonl, line {line} {what}" in found
    assert found.startswith(f"{folder}: 18 problems")


def test_paths_may_not_leave_the_folder(tmp_path):
    folder = tmp_path / "data"
    picture(folder / "0.png")
    picture(tmp_path / "outside.png")
    picture(tmp_path / "outside" / "0.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "frames").mkdir()
    (folder / "frames" / "0.png").symlink_to(tmp_path / "outside.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    bad = [
        "../outside.png",
        str(folder / "0.png"),
        "link.png",
        "linked/0.png",
        "linked",
        "frames",
        "self.png",
        "pipe.png",
    ]
    write_rows(folder, *[{"image": file, "prompt": "a"} for file in [*bad, "a\0b.png", "frames/../0.png"]])
    found = problems(folder, held_out=0)
    assert found.startswith(f"{folder}: 9 problems")
    assert "line 1 ../outside.png: leads out of the folder" in found
    assert "line 2 /" in found
    assert "expected a path relative to the folder, got an absolute one" in found
    for line, file in ((3, "link.png"), (4, "linked/0.png"), (5, "linked"), (6, "frames")):
        assert f"line {line} {file}: leads out of the folder by a symbolic link" in found
    assert "line 7 self.png: " in found
    assert "line 8 pipe.png: not a file" in found
    assert "line 9 a" in found


def test_text_may_not_come_from_outside(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("secret")
    (folder / "metadata.jsonl").unlink()
    for index in range(4):
        (folder / f"{index}.txt").write_text("a")
    (folder / "4.txt").symlink_to(outside)
    found = problems(folder, held_out=0)
    assert found.startswith(f"{folder}: 1 problem ")
    assert "4.txt leads out of the folder by a symbolic link" in found
    (folder / "metadata.jsonl").symlink_to(outside)
    assert "metadata.jsonl leads out of the folder by a symbolic link" in problems(folder)


def test_links_within_the_folder_and_to_it_are_fine(folder, tmp_path_factory):
    (folder / "link.png").symlink_to("0.png")
    write_rows(folder, {"image": "link.png", "prompt": "a"}, {"image": "sub/../1.png", "prompt": "b"})
    (folder / "sub").mkdir()
    link = tmp_path_factory.mktemp("links") / "data"
    link.symlink_to(folder)
    assert len(open_folder(link, held_out=0)) == 2


def test_repetitions_and_leaks(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    write_rows(
        folder,
        {"image": "0.png", "prompt": "a"},
        {"image": "copy.png", "prompt": "a"},
        {"image": "copy.png", "prompt": "b"},
        {"image": "1.png", "prompt": "a"},
        {"image": "1.png", "prompt": "b", "held_out": True},
    )
    found = problems(folder)
    assert found.startswith(f"{folder}: 2 problems")
    assert "line 2 copy.png: the same picture and prompt stand at metadata.jsonl, line 1 (0.png)" in found
    assert "line 5 1.png: the same picture is trained on at metadata.jsonl, line 4 (1.png)" in found


def test_splits_that_leave_nothing(folder):
    write_rows(folder, {"image": "0.png", "prompt": "a", "held_out": True})
    assert "no sample is left for training" in problems(folder)
    assert "use one of them" in problems(folder, held_out=0.5)
    write_rows(folder, {"image": "0.png", "prompt": "a"})
    assert "no sample is held out: mark rows" in problems(folder)
    write_rows(folder, {"image": "0.png", "prompt": "a"}, {"image": "absent.png", "prompt": "a"})
    assert "2 problems" in problems(folder)
    write_rows(folder, {"image": "0.png", "prompt": "a"}, {"image": "absent.png", "prompt": "a", "held_out": True})
    assert "1 problem " in problems(folder), "the missing picture is held out, so there is one"
    write_rows(folder, {"image": "0.png", "prompt": "a"})
    assert "no sample is left for training" in problems(folder, held_out=0.5)


def test_folders_without_samples(tmp_path):
    assert "no samples: expected metadata.jsonl, metadata.csv, or pictures" in problems(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert "no samples" in problems(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        open_folder(tmp_path / "absent")
    assert "pictures: expected a folder" in str(caught.value)
    assert str(tmp_path / "absent") in str(caught.value)
    with pytest.raises(NotADirectoryError):
        open_folder(tmp_path / "metadata.jsonl")


def test_bad_csv(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("image,prompt\n0.png\n1.png,a,b\n2.png,fine\n")
    found = problems(folder, held_out=0)
    assert found.startswith(f"{folder}: 2 problems")
    assert "metadata.csv, line 2 expected 2 columns" in found
    assert "metadata.csv, line 3 expected 2 columns" in found
    (folder / "metadata.csv").write_text('image,prompt\n0.png,"never closed\n')
    assert "not CSV: unexpected end of data" in problems(folder, held_out=0)


def test_text_that_is_not_utf8(folder):
    (folder / "metadata.jsonl").write_bytes('\n{"image": "0.png", "prompt": "café"}'.encode("latin-1"))
    assert "metadata.jsonl, line 2 expected UTF-8 text, found byte 0xe9" in problems(folder)


def test_bad_text_files(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text(" \n")
    for index in (1, 2, 3):
        (folder / f"{index}.txt").write_text("a")
    picture(folder / "a, line b.png", 9)
    found = problems(folder, held_out=0.2)
    assert found.startswith(f"{folder}: 3 problems")
    assert "0.txt the prompt is empty" in found
    assert "4.png no prompt: expected 4.txt beside it" in found


def test_small_pictures_are_enlarged_on_request(folder):
    found = problems(folder, 64, 96)
    assert "line 5 4.png: 32 x 48 pixels (height x width), the video has 64 x 96" in found
    assert found.endswith("or set enlarge")
    assert open_folder(folder, 64, 96, enlarge=True).image(0).shape == (3, 64, 96)


def test_long_tables_are_cut_and_say_so(folder):
    write_rows(folder, *[{"image": f"absent{i}.png", "prompt": "a"} for i in range(130)])
    found = problems(folder, held_out=0)
    assert "130 problems" in found
    assert "line 100 absent99.png" in found
    assert "line 101" not in found
    assert found.endswith("and 30 more")


def test_settings():
    with pytest.raises(ValidationError):
        DataSettings(pictures="a", picturs="b")
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValidationError):
            DataSettings(pictures="a", held_out=bad)
    assert all(field.description for field in DataSettings.model_fields.values())


# ---- the examples


def test_example_pictures():
    data = open_folder(EXAMPLES, 480, 640)
    assert 6 <= len(data) <= 8
    assert len(data.held_out) == 2
    assert len({sample.prompt for sample in data.samples}) == len(data)
    sources = (EXAMPLES / "SOURCES.md").read_text()
    for sample in data.samples:
        with Image.open(sample.path) as image:
            assert (image.format, image.size) == ("JPEG", (640, 480))
        assert f"`{sample.path.name}`" in sources
    assert {path.name for path in EXAMPLES.glob("*.jpg")} == {sample.path.name for sample in data.samples}
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 1_000_000
