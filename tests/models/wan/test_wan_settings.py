import pytest
from pydantic import ValidationError

from vcd_fast.models.wan import ModelSettings


def test_defaults_are_the_paper_s():
    settings = ModelSettings()
    assert (settings.num_frames, settings.width, settings.height) == (25, 368, 272)
    assert (settings.guidance_scale, settings.shift, settings.fps, settings.dtype) == (5, 3, 16, "bfloat16")
    assert settings.latent_shape == (7, 34, 46)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("height", 270, "multiple of 16, got 270; the nearest are 256 and 272"),
        ("width", 8, "multiple of 16, got 8; the nearest are 16 and 32"),
        ("num_frames", 24, "4n \\+ 1 frames, got 24; the nearest are 21 and 25"),
        ("num_frames", 2, "the nearest are 5 and 9"),
        ("num_frames", 1, "greater than 1"),
        ("guidance_scale", 0.5, "greater than or equal to 1"),
        ("shift", 0, "greater than 0"),
        ("clip_preprocess", "stretch", "'crop' or 'squash'"),
        ("decode_context", "none", "'exact' or 'truncated'"),
        ("dtype", "float64", "'float32', 'bfloat16' or 'float16'"),
        ("heigth", 272, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(ValidationError, match=message):
        ModelSettings(**{key: value})
