import json
import math
import sys

import pytest
import torch
from PIL import Image

from vcd_fast import VCDLoss
from vcd_fast.cli import main as cli
from vcd_fast.evaluation.score import Score, as_json, choose_frames, score_video, write_plot
from vcd_fast.media import write_image, write_video


def two_maps(images):
    return {"one": images * 2, "two": images[..., ::2, ::2].sqrt()}


@pytest.fixture
def loss():
    return VCDLoss(extractor=two_maps, layers=("one", "two"), num_projections=4, chunk_frames=2)


def clip(frames=6, height=24, width=32, seed=0):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("frames", "every", "want"),
    [
        (None, None, tuple(range(10))),
        (None, 3, (0, 3, 6, 9)),
        (None, 20, (0,)),
        (1, None, (0, 9)),
        (3, None, (0, 3, 6, 9)),
        (4, None, (0, 2, 4, 7, 9)),
        (9, None, tuple(range(10))),
        (50, None, tuple(range(10))),
    ],
)
def test_choosing_frames(frames, every, want):
    assert choose_frames(10, frames=frames, every=every) == want


@pytest.mark.parametrize("n", range(2, 30))
def test_chosen_frames_are_distinct_and_end_with_the_last(n):
    for frames in range(1, n):
        chosen = choose_frames(n, frames=frames)
        assert len(set(chosen)) == frames + 1
        assert (chosen[0], chosen[-1]) == (0, n - 1)


@pytest.mark.parametrize("options", [{"frames": 2, "every": 2}, {"frames": 0}, {"every": -1}])
def test_choosing_frames_wrongly(options):
    with pytest.raises(ValueError, match="expected"):
        choose_frames(10, **options)


def test_score_is_that_of_the_loss(loss):
    video, image = clip(), clip(1, seed=1)[0]
    done = []
    score = score_video(loss, video, image, on_frames=done.append)
    details = loss.details(video[None], image[None])
    assert score.total == pytest.approx(details.loss.item(), rel=1e-6)
    torch.testing.assert_close(score.terms, details.terms[0])
    torch.testing.assert_close(score.per_frame, details.per_frame[0])
    assert score.frame_index == (1, 2, 3, 4, 5)
    assert done == [2, 2, 1]
    assert score.of_frames("phase") == pytest.approx(details.terms[0, :, :, 1].sum(1).tolist())
    assert score.of_layers("amplitude") == pytest.approx(details.terms[0, :, :, 0].mean(0).tolist())
    assert set(score.seconds) == {"condition", "frames"}


def test_without_an_image_the_first_frame_stands_for_it(loss):
    video = clip()
    torch.testing.assert_close(score_video(loss, video).per_frame, score_video(loss, video, video[0]).per_frame)


def test_some_frames_keep_their_weights(loss):
    video = clip()
    every = score_video(loss, video)
    some = score_video(loss, video[[0, 2, 5]], frame_index=(0, 2, 5), num_frames=6)
    torch.testing.assert_close(some.per_frame, every.per_frame[[1, 4]])
    assert some.frame_index == (2, 5)


def test_too_few_frames(loss):
    with pytest.raises(ValueError, match="video: expected at least two frames"):
        score_video(loss, clip(1), clip(1)[0])
    with pytest.raises(ValueError, match="image: expected one, because frame 0"):
        score_video(loss, clip(2), frame_index=(2, 3), num_frames=6)


def test_json_holds_every_term(loss):
    score = score_video(loss, clip(3))
    content = json.loads(as_json(score, fps=8.0, about={"video": "a.mp4"}))
    assert content["vcd"] == score.total
    assert content["video"] == "a.mp4"
    assert set(content["versions"]) == {"vcd_fast", "torch", "python"}
    assert [f["frame"] for f in content["frames"]] == [1, 2]
    assert content["frames"][1]["seconds"] == 0.25
    assert content["frames"][1]["terms"]["two"]["phase"] == score.terms[1, 1, 1].item()
    assert content["layers"]["one"]["amplitude"] == score.of_layers("amplitude")[0]
    assert json.loads(as_json(score, fps=None, about={}))["frames"][0]["seconds"] is None


@pytest.mark.parametrize("preset", ["vcd", "vcd_amp", "vcd_feature"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(tmp_path, preset, suffix):
    loss = VCDLoss(preset, extractor=two_maps, layers=("one", "two"), num_projections=4)
    path = tmp_path / f"plot{suffix}"
    write_plot(path, score_video(loss, clip(3)), title="a against b")
    if suffix == ".png":
        with Image.open(path) as picture:
            assert picture.size[0] >= 1000
            assert len(picture.getcolors(1 << 20)) > 10
    else:
        assert path.read_text().lstrip().startswith("<?xml")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plot_of_a_still_video(tmp_path, loss):
    write_plot(tmp_path / "plot.png", score_video(loss, clip(1).expand(3, -1, -1, -1)), title="still")


def test_plot_of_an_unknown_kind(tmp_path, loss):
    with pytest.raises(ValueError, match=r"plot: expected a suffix among \.png, \.svg, \.pdf"):
        write_plot(tmp_path / "plot.jpg", score_video(loss, clip(3)), title="")


def test_a_nan_does_not_stop_the_plot(tmp_path):
    terms = torch.full((2, 1, 1), math.nan)
    score = Score((1, 2), ("x",), ("feature",), terms, torch.ones(2), terms[:, 0, 0], {})
    write_plot(tmp_path / "plot.png", score, title="")


# The command


@pytest.fixture
def files(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(5, 32, 48), 8)
    write_image(tmp_path / "image.png", clip(1, 40, 60, seed=1)[0])
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(clip(3, 32, 48)):
        write_image(folder / f"frame_{i}.png", frame)
    return tmp_path


@pytest.fixture
def run(files, monkeypatch, capsys):
    """run("clip.mp4", "--image", …) -> (exit code, stdout, stderr), in the folder of `files`, with random weights and few directions."""

    def command(*arguments, weights="random"):
        monkeypatch.chdir(files)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["vcd", "score", *arguments, "--weights", weights, "--device", "cpu"])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    monkeypatch.delenv("VCD_FAST_TRACEBACK", raising=False)
    return command


@pytest.mark.filterwarnings("ignore:VGG19 has random weights:UserWarning")
class TestCommand:
    def test_table_json_and_plot(self, run, files):
        code, out, err = run(
            "clip.mp4", "--image", "image.png", "--projections", "8", "--json", "s.json", "--plot", "s.png"
        )
        assert code == 0, err
        content = json.loads((files / "s.json").read_text())
        assert f"VCD of clip.mp4 to image.png: {content['vcd']:.6g}" in out
        assert "the image is 60×40; scaled and cropped to 48×32" in out
        assert "random VGG19 weights" in out
        assert all(word in out for word in ("amplitude", "phase", "relu5_1", "weight", "frames/s", "0.50 s"))
        assert len(content["frames"]) == 4
        assert content["frames"][0]["weight"] == pytest.approx(0.8)
        assert content["vgg19"]["source"] == "random"
        assert len(content["vgg19"]["sha256"]) == 64
        assert content["config"]["num_projections"] == 8
        assert (content["fps"], content["num_frames"], content["height"], content["width"]) == (8, 5, 32, 48)
        with Image.open(files / "s.png") as picture:
            assert picture.format == "PNG"

    def test_folder_of_frames_without_an_image(self, run):
        code, out, err = run("frames", "--projections", "4", "--preset", "vcd_phase")
        assert code == 0, err
        assert "VCD of frames to its first frame" in out
        assert "amplitude" not in out

    def test_size_and_frames(self, run, files):
        code, out, err = run("clip.mp4", "--size", "24x16", "--frames", "2", "--projections", "4", "--json", "s.json")
        assert code == 0, err
        content = json.loads((files / "s.json").read_text())
        assert (content["height"], content["width"]) == (16, 24)
        assert [f["frame"] for f in content["frames"]] == [2, 4]
        assert content["frames"][1]["weight"] == pytest.approx(0.2)
        assert "scaled" not in out

    def test_seed(self, run):
        outputs = [
            run("frames", "--projections", "4", "--seed", seed)[1].split("\nVCD of")[1] for seed in ("0", "1", "0")
        ]
        figures = [text.split("  ")[0] for text in outputs]
        assert figures[0] == figures[2] != figures[1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("gone.mp4",), "No such file or directory: gone.mp4"),
            (("image.png",), "expected a video, found a file without a video stream"),
            (("clip.mp4", "--image", "clip.mp4"), "clip.mp4: expected a picture"),
            (("clip.mp4", "--image", "gone.png"), "No such file or directory: gone.png"),
            (("clip.mp4", "--preset", "vdc"), "config: expected one of vcd, vcd_amp"),
            (("clip.mp4", "--size", "large"), "size: expected WIDTHxHEIGHT such as 368x272, got 'large'"),
            (("clip.mp4", "--size", "24x8"), "expected images of at least 16×16 pixels, got 8×24"),
            (("clip.mp4", "--frames", "2", "--every", "2"), "frames and every: expected one of them, got both"),
            (("clip.mp4", "--every", "9"), "video: expected at least two frames"),
            (("clip.mp4", "--projections", "0"), "num_projections: expected at least 1, got 0"),
            (("clip.mp4", "--backend", "cuda"), "backend: expected one of auto, reference, simd, triton"),
            (("clip.mp4", "--json", "no/s.json"), "json: expected a file in an existing folder, got no/s.json"),
            (("clip.mp4", "--plot", "s.jpg"), "plot: expected a suffix among .png, .svg, .pdf"),
            (("clip.mp4", "--preset", "fdl"), "expected feature maps of at least 5×5"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_mistakes_end_in_one_message(self, run, files, arguments, message):
        before = sorted(p.name for p in files.iterdir())
        code, _, err = run(*arguments)
        assert code == 1
        assert message in err
        assert "Traceback" not in err
        assert sorted(p.name for p in files.iterdir()) == before

    def test_missing_weights(self, run):
        code, _, err = run("clip.mp4", weights="gone.pth")
        assert code == 1
        assert "expected a file of weights (.safetensors or .pth), got gone.pth" in err
