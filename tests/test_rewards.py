import pytest
import torch

from vcd_fast.distance import PRESETS, VCDLoss, VGG19Features
from vcd_fast.rewards.base import RewardInput
from vcd_fast.rewards.vcd import VCDReward, VCDRewardSettings

SETTINGS = {"vgg19": "random", "num_projections": 8}


@pytest.fixture(scope="module")
def reward():
    with pytest.warns(UserWarning, match="random"):
        return VCDReward(VCDRewardSettings(frames_per_step=2, reward_scale=3.0, **SETTINGS))


def clip(batch=2, frames=5):
    return torch.rand(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def judged(reward, video, index, step=0):
    inputs = RewardInput(
        video[:, index], torch.tensor(index), video.shape[1], video[:, 0], ["", ""], 16.0, step, torch.Generator()
    )
    return reward(inputs)


def test_the_reward_is_minus_the_scaled_distance(reward):
    video = clip()
    loss = VCDLoss("vcd", extractor=reward._extractor, num_projections=8)
    expected = loss(video[:, [1, 3]], video[:, 0], frame_index=torch.tensor([1, 3]), num_frames=5, reduction="none")
    output = judged(reward, video, [1, 3])
    torch.testing.assert_close(output.reward, -3.0 * expected.mean(dim=1))
    assert output.metrics["vcd"] == pytest.approx(expected.mean().item())


def test_a_clip_that_stands_still_has_the_largest_reward(reward):
    still = clip()[:, :1].expand(-1, 5, -1, -1, -1)
    assert judged(reward, still, [1, 4]).reward.abs().max() < 1e-5
    assert judged(reward, clip(), [1, 4]).reward.max() < -0.1


def test_the_score_is_the_distance_over_all_frames(reward):
    video = clip()
    loss = VCDLoss("vcd", extractor=reward._extractor, num_projections=8)
    torch.testing.assert_close(reward.score(video, video[:, 0]), loss(video, video[:, 0], reduction="none").mean(dim=1))


def test_frames_are_distinct_ascending_and_never_the_picture(reward):
    drawn = [reward.frames_wanted(5, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert all(frames.tolist() == sorted(set(frames.tolist())) for frames in drawn)
    assert {frame for frames in drawn for frame in frames.tolist()} == {1, 2, 3, 4}


def test_more_frames_than_there_are_is_an_error(reward):
    with pytest.raises(ValueError, match="frames_per_step: expected at most 1 for a clip of 2 frames, got 2"):
        reward.frames_wanted(2, torch.Generator())


def test_the_layers_chosen_are_the_ones_compared():
    with pytest.warns(UserWarning, match="random"):
        reward = VCDReward(VCDRewardSettings(feature_layers=["relu2_1", "relu1_1"], **SETTINGS))
    video, layers = clip(), ("relu1_1", "relu2_1")
    loss = VCDLoss("vcd", extractor=reward._extractor, num_projections=8, layers=layers)
    assert reward._extractor.layers == layers
    torch.testing.assert_close(reward.score(video, video[:, 0]), loss(video, video[:, 0], reduction="none").mean(dim=1))


def test_directions_are_redrawn_only_on_request(reward):
    video = clip()
    fixed = [judged(reward, video, [1, 2], step).reward for step in (0, 1)]
    assert torch.equal(*fixed)
    with pytest.warns(UserWarning, match="random"):
        redrawing = VCDReward(VCDRewardSettings(redraw_projections=True, **SETTINGS))
    drawn = [judged(redrawing, video, [1, 2], step).reward for step in (0, 1)]
    assert not torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore:VGG19 has random weights")
@pytest.mark.parametrize("distance", PRESETS)
def test_every_distance_is_a_reward(distance):
    video = torch.rand(1, 3, 3, 80, 80, generator=torch.Generator().manual_seed(0))  # relu5_4 of FDL has 5×5 patches
    reward = VCDReward(VCDRewardSettings(distance=distance, **SETTINGS))
    loss = VCDLoss(distance, extractor=VGG19Features("random", layers=PRESETS[distance].layers), num_projections=8)
    torch.testing.assert_close(reward.score(video, video[:, 0])[0], loss(video, video[:, 0]))
