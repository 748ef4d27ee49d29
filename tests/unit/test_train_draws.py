"""Random draws are functions of the seed and of a sample's place, of nothing else."""

from __future__ import annotations

import torch

from hydit_core.train.draws import TrainingDraws, validation_draws
from hydit_core.train.sections import ObjectiveSection

SHAPE = (4, 3, 5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    draws = TrainingDraws(ObjectiveSection(timesteps="stratified", dropout_bert=0.5), 7, 8)
    whole = draws(3, range(8), SHAPE)
    part = draws(3, [5, 2], SHAPE)
    assert torch.equal(part.noise, whole.noise[[5, 2]])
    assert torch.equal(part.posterior_noise, whole.posterior_noise[[5, 2]])
    assert torch.equal(part.t, whole.t[[5, 2]])
    assert part.drop_bert == [whole.drop_bert[5], whole.drop_bert[2]]


def test_steps_and_seeds_differ() -> None:
    objective = ObjectiveSection()
    first = TrainingDraws(objective, 7, 8)(3, range(8), SHAPE)
    for other in (
        TrainingDraws(objective, 7, 8)(4, range(8), SHAPE),
        TrainingDraws(objective, 8, 8)(3, range(8), SHAPE),
    ):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t, other.t)
    assert not torch.equal(first.noise, first.posterior_noise)


def test_stratified_timesteps_cover_a_step_of_several_micro_batches() -> None:
    draws = TrainingDraws(ObjectiveSection(timesteps="stratified"), 0, 10)
    t = torch.cat([draws(2, range(start, start + 5), SHAPE).t for start in (0, 5)])
    assert sorted((t // 100).tolist()) == list(range(10))
    assert t.tolist() != sorted(t.tolist())


def test_dropout_rates_and_noise_offset() -> None:
    objective = ObjectiveSection(dropout_bert=0.3, dropout_t5=0.1, dropout_joint=0.2, noise_offset=0.5)
    draws = TrainingDraws(objective, 0, 4000)(0, range(4000), (4, 4, 4))
    bert, t5 = torch.tensor(draws.drop_bert), torch.tensor(draws.drop_t5)
    assert abs(bert.float().mean() - (1 - 0.7 * 0.8)) < 0.03
    assert abs(t5.float().mean() - (1 - 0.9 * 0.8)) < 0.03
    assert abs((bert & t5).float().mean() - (0.2 + 0.8 * 0.3 * 0.1)) < 0.03
    # One common number per channel plane: its variance adds to that of the plane's mean.
    assert abs(draws.noise.mean((2, 3)).var() - (0.25 + 1 / 16)) < 0.02


def test_posterior_mean_needs_no_noise() -> None:
    draws = TrainingDraws(ObjectiveSection(), 0, 2, sample_posterior=False)(0, [0, 1], SHAPE)
    assert not draws.posterior_noise.any() and draws.noise.any()


def test_validation_noise_belongs_to_the_picture_and_timesteps_to_a_grid() -> None:
    keys = [f"picture {i}" for i in range(10)]
    whole = validation_draws(keys, range(10), 10, SHAPE)
    part = validation_draws(keys[4:6], [4, 5], 10, SHAPE)
    assert torch.equal(part.noise, whole.noise[4:6]) and torch.equal(part.t, whole.t[4:6])
    assert sorted(whole.t.tolist()) == list(range(50, 1000, 100))
    assert not any(whole.drop_bert + whole.drop_t5) and not whole.posterior_noise.any()


def test_few_pictures_are_measured_at_many_timesteps() -> None:
    """All together an even grid, and that of each picture is one too; each time with another noise."""
    keys = ["one", "two", "three"]
    times = [validation_draws(keys, range(3), 3, SHAPE, numbers=[n] * 3, count=8) for n in range(8)]
    together = torch.stack([draws.t for draws in times])
    assert sorted(together.flatten().tolist()) == [int((slot + 0.5) * 1000 / 24) for slot in range(24)]
    for one in together.T:
        gaps = one.sort().values.diff()
        assert gaps.min() >= 124 and gaps.max() <= 126
    noises = torch.stack([draws.noise for draws in times]).flatten(0, 1)
    assert len(torch.unique(noises.flatten(1), dim=0)) == 24
    assert torch.equal(times[0].noise, validation_draws(keys, range(3), 3, SHAPE).noise)
