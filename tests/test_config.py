import itertools

import pytest
import yaml

from vcd_fast.config import compose, load_file, load_preset, parse, preset_names, section_types
from vcd_fast.models.base import FAMILIES

PICTURES = {"data": {"pictures": "somewhere"}}


def test_option_names_are_unique_over_all_sections():
    for family in FAMILIES:
        names = [name for kind in section_types(family).values() for name in kind.model_fields]
        assert len(names) == len(set(names))


def test_every_field_of_every_section_is_described():
    for family in FAMILIES:
        for section, kind in section_types(family).items():
            undescribed = [name for name, field in kind.model_fields.items() if not field.description]
            assert not undescribed, (family, section)


@pytest.mark.parametrize(("family", "preset"), [(f, p) for f in FAMILIES for p in preset_names(f)])
def test_presets_are_whole(family, preset):
    assert compose(family, preset, PICTURES).preset == preset


def test_later_overlays_win_key_by_key():
    config = compose("wan", "tiny", PICTURES, {"training": {"seed": 3, "zero": 1}}, {"training": {"seed": 4}})
    assert (config.training.seed, config.training.zero) == (4, 1)
    assert config.model.num_frames == load_preset("wan", "tiny")["model"]["num_frames"]


def test_a_written_config_gives_the_same_config_again():
    config = compose("wan", "tiny", PICTURES, {"training": {"learning_rate": 1e-3}})
    content = yaml.safe_load(yaml.safe_dump(config.as_dict()))
    assert compose(content.pop("family"), content.pop("preset"), content) == config


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"training": {"learning_rat": 1}}, "unknown key training.learning_rat; did you mean training.learning_rate?"),
        ({"trainig": {"seed": 1}}, "unknown section trainig; did you mean training?"),
        ({"training": 3}, "section training: expected keys and values, got 3"),
        ({"training": {"zero": 5}}, "training.zero: input should be 0, 1, 2 or 3, got 5"),
        ({"model": {"height": 100}}, "model.height: expected a multiple of 16, got 100"),
        ({"rollout": {"backprop": "first:1"}}, "rollout.backprop: expected last:K"),
        ({"lora": {"rank": "many"}}, "lora.rank: input should be a valid integer"),
    ],
)
def test_what_is_wrong_is_named(overlay, message):
    with pytest.raises(ValueError, match="configuration: ") as error:
        compose("wan", "tiny", PICTURES, overlay)
    assert message in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="configuration") as error:
        compose("wan", "tiny", {"training": {"seed": -1, "tempo": 3}, "lora": {"rank": 0}})
    assert all(name in str(error.value) for name in ("training.seed", "training.tempo", "lora.rank", "data.pictures"))


def test_unknown_presets_and_families_list_those_there_are():
    with pytest.raises(ValueError, match=r"preset: expected one of .*tiny.*got 'huge'"):
        compose("wan", "huge")
    with pytest.raises(ValueError, match="model: expected one of wan, opensora, got 'hunyuan'"):
        compose("hunyuan")


class TestCommandLine:
    def options(self, *words):
        return parse(["--model", "wan", "--preset", "tiny", "--pictures", "p", *words], prog="train.py")

    def test_options_are_converted_by_the_settings(self):
        config, arguments = self.options(
            "--learning-rate", "1e-3", "--zero", "2", "--tensorboard", "--chunk-frames", "none"
        )
        assert (config.training.learning_rate, config.training.zero, config.training.tensorboard) == (1e-3, 2, True)
        assert config.reward.chunk_frames is None
        assert not arguments.dry_run

    def test_lists_and_names_for_the_same_option(self):
        assert self.options("--targets", "to_q", "to_k")[0].lora.targets == ["to_q", "to_k"]
        assert self.options("--targets", "default")[0].lora.targets == "default"

    def test_options_win_over_the_file_and_the_file_over_the_preset(self, tmp_path):
        (tmp_path / "c.yaml").write_text("training: {seed: 5, max_train_steps: 7}\nmodel: {num_frames: 5}\n")
        config, _ = self.options("--config", str(tmp_path / "c.yaml"), "--seed", "6")
        assert (config.training.seed, config.training.max_train_steps, config.model.num_frames) == (6, 7, 5)

    def test_family_and_preset_may_stand_in_the_file(self, tmp_path):
        (tmp_path / "c.yaml").write_text("family: wan\npreset: tiny\ndata: {pictures: p}\n")
        config, _ = parse(["--config", str(tmp_path / "c.yaml")], prog="train.py")
        assert (config.family, config.preset) == ("wan", "tiny")

    def test_the_launchers_rank_is_accepted(self):
        assert self.options("--local_rank=1")[1].local_rank == 1

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("--learning-rat", "did you mean --learning-rate"),
            ("--max-train-step", "did you mean --max-train-steps"),
            ("--xyzzy", "--xyzzy"),
        ],
    )
    def test_abbreviations_and_unknown_options_are_refused(self, word, message):
        with pytest.raises(ValueError, match=f"unknown option {word}") as error:
            self.options(word, "3")
        assert message in str(error.value)

    def test_what_sections_contradict_one_another_in(self):
        with pytest.raises(ValueError, match="frames_per_step: expected at most 8 for a clip of 9 frames, got 9"):
            self.options("--frames-per-step", "9")
        with pytest.raises(ValueError, match="expected bfloat16 or float32 for training"):
            self.options("--dtype", "float16")

    def test_patches_that_do_not_fit_are_refused_before_anything_is_loaded(self):
        size = ["--height", "64", "--width", "96", "--distance", "fdl"]
        with pytest.raises(ValueError, match=r"at least 5×5 for 'fdl', got 4×6 \(relu5_4 of 64×96 frames\)"):
            self.options(*size)
        config, _ = self.options(*size, "--feature-layers", "relu1_2", "relu4_4")
        assert config.reward.config.layers == ("relu1_2", "relu4_4")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["relu1_1", "relu9_9"], r"reward\.feature_layers: expected names from relu1_1 to relu5_4, not relu9_9"),
            (["relu1_1", "relu1_1"], r"reward\.feature_layers: expected at least one name, each once"),
        ],
    )
    def test_feature_layers_nobody_has(self, names, message):
        with pytest.raises(ValueError, match=message):
            self.options("--feature-layers", *names)

    def test_no_model_is_said(self):
        with pytest.raises(ValueError, match="model: expected --model with one of wan, opensora"):
            parse(["--seed", "1"], prog="train.py")

    @pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00"])
    def test_a_file_that_is_no_configuration(self, tmp_path, content):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"c\.yaml: expected"):
            load_file(tmp_path / "c.yaml")

    def test_help_shows_every_key_in_its_group(self, capsys):
        with pytest.raises(SystemExit):
            parse(["--help"], prog="train.py")
        text = capsys.readouterr().out
        fields = itertools.chain.from_iterable(kind.model_fields for kind in section_types("wan").values())
        assert all(f"--{name.replace('_', '-')}" in text for name in fields)
        assert text.index("rollout: how") < text.index("--sampling-steps") < text.index("training: how")


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"rollout": {"offload": "window"}}, "rollout.offload: expected none or decode with training.zero 3"),
        ({"model": {"quantization": "nf4"}}, "model.quantization: expected none with training.zero 3"),
    ],
)
def test_what_does_not_go_with_sharded_weights(overlay, message):
    base = {"data": {"pictures": "p"}}
    with pytest.raises(ValueError, match=message):
        compose("wan", "tiny", base, overlay, {"training": {"zero": 3}})
    compose("wan", "tiny", base, overlay, {"training": {"zero": 2}})
