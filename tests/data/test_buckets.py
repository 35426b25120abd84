"""The batches of training: which pictures, in which order, in how many processes, and how they are stacked."""

from itertools import chain, islice

import pytest
import torch

from pixart_pack.pixart.data.buckets import BucketSampler
from pixart_pack.pixart.data.examples import Example, ListFeatures, collate
from pixart_pack.pixart.data.variety.shares import check_repeats, named_folder, repeats_of_shares

BINS = [(8, 8)] * 11 + [(6, 10)] * 3 + [(10, 6)] * 5


def epoch_of(sampler):
    return list(islice(sampler, sampler.batches_per_epoch))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 30])
def test_an_epoch_shows_every_picture_in_full_batches_of_one_size(batch_size):
    sampler = BucketSampler(BINS, batch_size)
    for _ in range(3):
        batches = epoch_of(sampler)
        assert {len(batch) for batch in batches} == {batch_size}
        assert all(len({BINS[index] for index in batch}) == 1 for batch in batches)
        assert set(chain(*batches)) == set(range(len(BINS)))


def test_a_picture_is_repeated_only_to_fill_its_bins_last_batch():
    seen = list(chain(*epoch_of(BucketSampler(BINS, 4))))
    assert len(seen) == 12 + 4 + 8  # 11, 3 and 5 rounded up
    assert max(map(seen.count, seen)) == 2


@pytest.mark.parametrize("priors", [{3}, {0, 5, 18}, set(range(17))])
def test_pictures_of_the_class_and_others_are_shown_equally_often(priors):
    is_prior = [index in priors for index in range(len(BINS))]
    sampler = BucketSampler(BINS, 1, is_prior=is_prior)
    epochs = [list(chain(*epoch_of(sampler))) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert set(epochs[0]) == set(range(len(BINS)))
    shown = sum(is_prior[index] for index in epochs[0])
    assert shown == max(len(priors), len(BINS) - len(priors)) == len(epochs[0]) - shown


@pytest.mark.parametrize("same", [True, False])
def test_pictures_of_one_kind_alone_are_shown_once(same):
    assert epoch_of(BucketSampler(BINS, 2, is_prior=[same] * len(BINS))) == epoch_of(BucketSampler(BINS, 2))


def test_drop_last_gives_no_picture_twice():
    batches = epoch_of(BucketSampler(BINS, 4, drop_last=True))
    assert len(batches) == 2 + 0 + 1
    assert len(set(chain(*batches))) == 12


def test_epochs_and_seeds_differ_and_are_told_by_the_seed_alone():
    sampler, same, other = (
        BucketSampler(BINS, 2, seed=5),
        BucketSampler(BINS, 2, seed=5),
        BucketSampler(BINS, 2, seed=6),
    )
    first, second = epoch_of(sampler), epoch_of(sampler)
    assert first != second and first != epoch_of(other)
    assert [first, second] == [epoch_of(same), epoch_of(same)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_out_the_batches_of_one(world_size, drop_last):
    one = BucketSampler(BINS, 2 * world_size, seed=1, drop_last=drop_last)
    ranks = [BucketSampler(BINS, 2, 1, drop_last, world_size, rank) for rank in range(world_size)]
    for _ in range(3 * one.batches_per_epoch):
        assert next(one) == list(chain(*map(next, ranks)))


@pytest.mark.parametrize("steps", [0, 1, 5, 10, 11, 12, 27])
def test_a_continued_sampler_goes_on_exactly(steps):
    sampler = BucketSampler(BINS, 2, seed=3)
    list(islice(sampler, steps))
    state = sampler.state_dict()
    continued = BucketSampler(BINS, 2, seed=99)
    continued.load_state_dict(state)
    assert list(islice(continued, 40)) == list(islice(sampler, 40))


def test_a_state_moves_between_numbers_of_processes():
    one = BucketSampler(BINS, 4, seed=3)
    list(islice(one, 5))
    ranks = [BucketSampler(BINS, 2, world_size=2, rank=rank) for rank in range(2)]
    for each in ranks:
        each.load_state_dict(one.state_dict())
    assert next(one) == list(chain(*map(next, ranks)))


def test_a_state_of_other_data_is_refused():
    state = BucketSampler(BINS, 2).state_dict()
    with pytest.raises(ValueError, match="cannot be continued with other data: got {'bins'"):
        BucketSampler(BINS[1:], 2).load_state_dict(state)
    with pytest.raises(ValueError, match="got {'global_batch': 4}, expected {'global_batch': 2}"):
        BucketSampler(BINS, 4).load_state_dict(state)


def test_bad_samplers():
    with pytest.raises(ValueError, match="Empty dataset"):
        BucketSampler([], 1)
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        BucketSampler(BINS, 0)
    with pytest.raises(ValueError, match="none of whose sizes has 40 of them"):
        BucketSampler(BINS, 40, drop_last=True)


def example(length=3, size=(8, 6), width=5, **fields):
    shape = (4, *size)
    return Example(torch.randn(shape), torch.randn(length, width), (64, 48), 64 / 48, **fields)


def test_captions_of_different_length_are_padded_under_a_mask():
    examples = [example(1), example(4, is_prior=True), example(2)]
    batch = collate(examples)
    assert len(batch) == 3 and batch.caption.shape == (3, 4, 5)
    assert batch.caption_mask.sum(1).tolist() == [1, 4, 2]
    assert not batch.caption[~batch.caption_mask].any()
    assert torch.equal(batch.caption[2, :2], examples[2].caption)
    assert batch.resolution.tolist() == [[64.0, 48.0]] * 3 and batch.aspect_ratio.shape == (3, 1)
    assert batch.is_prior.tolist() == [False, True, False]
    assert batch.deviation is None and batch.hint is None


def test_a_batch_moves_with_sizes_left_in_float32():
    full = {"deviation": torch.ones(4, 8, 6), "hint": torch.ones(4, 8, 6)}
    batch = collate([example(**full), example(**full)]).to("cpu", torch.bfloat16)
    assert {batch.latent.dtype, batch.caption.dtype, batch.deviation.dtype, batch.hint.dtype} == {torch.bfloat16}
    assert batch.resolution.dtype == batch.aspect_ratio.dtype == torch.float32
    assert batch.caption_mask.dtype == batch.is_prior.dtype == torch.bool


def test_what_cannot_be_stacked():
    with pytest.raises(ValueError, match="Empty batch"):
        collate([])
    with pytest.raises(ValueError, match=r"Different latent sizes in one batch: got \(4, 6, 8\) and \(4, 8, 6\)"):
        collate([example(), example(size=(6, 8))])
    with pytest.raises(ValueError, match="Different caption widths in one batch: got 5 and 7"):
        collate([example(), example(width=7)])
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        collate([example(), example(hint=torch.ones(4, 8, 6))])


def test_features_in_memory():
    features = ListFeatures([example(), example(size=(2, 4))])
    assert len(features) == 2 and features.bins == [(8, 6), (2, 4)] and features[1].latent.shape == (4, 2, 4)
    assert features.null_caption is None


def test_pictures_are_repeated_as_often_as_is_said():
    repeats = [3.0] * 11 + [0.5] * 3 + [1.4] * 5
    sampler = BucketSampler(BINS, 1, repeats=repeats)
    epochs = [list(chain(*epoch_of(sampler))) for _ in range(40)]
    assert {len(epoch) for epoch in epochs} == {33 + 2 + 7}
    shown = [sum(epoch.count(index) for epoch in epochs) / 40 for index in range(19)]
    assert shown[:11] == [3.0] * 11
    assert sum(shown[11:14]) == 2 and all(abs(each - 2 / 3) < 0.3 for each in shown[11:14])
    assert all(set(epoch) >= set(range(14, 19)) for epoch in epochs) and all(
        abs(each - 1.4) < 0.3 for each in shown[14:]
    )
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 10  # other ones by turns
    assert epoch_of(BucketSampler(BINS, 2, repeats=[1.0] * 19)) == epoch_of(BucketSampler(BINS, 2))


@pytest.mark.parametrize("is_prior", [(), [index % 3 == 0 for index in range(19)]])
def test_repeats_go_on_exactly_and_are_shared_out(is_prior):
    repeats = [0.3 + index % 4 for index in range(19)]
    one = BucketSampler(BINS, 4, seed=7, repeats=repeats, is_prior=is_prior)
    ranks = [BucketSampler(BINS, 2, 7, world_size=2, rank=rank, repeats=repeats, is_prior=is_prior) for rank in (0, 1)]
    for _ in range(3 * one.batches_per_epoch + 1):
        expected = next(one)
        assert expected == list(chain(*map(next, ranks)))
    continued = BucketSampler(BINS, 4, seed=99, repeats=repeats, is_prior=is_prior)
    continued.load_state_dict(one.state_dict())
    assert list(islice(continued, 20)) == list(islice(one, 20))
    if is_prior:
        epoch = list(chain(*epoch_of(BucketSampler(BINS, 1, repeats=repeats, is_prior=is_prior))))
        assert 2 * sum(is_prior[index] for index in epoch) == len(epoch)
    with pytest.raises(ValueError, match="other data"):
        BucketSampler(BINS, 4).load_state_dict(one.state_dict())


def test_shares_become_repeats():
    assert repeats_of_shares([100, 20, 40], [1, 1, 2]) == [1, 5, 5]
    names = ("10_my cat", "cat_10", "0_x", "10_", "3_a_b")
    assert list(map(named_folder, names)) == [(10, "my cat"), None, None, None, (3, "a_b")]
    with pytest.raises(ValueError, match="Share out of range: got -1"):
        repeats_of_shares([1, 2], [1, -1])
    for wrong in (0, float("nan"), 1e5):
        with pytest.raises(ValueError, match="Repeats out of range: got"):
            check_repeats(wrong)


def test_masks_and_weights_are_stacked():
    mask = torch.rand(1, 8, 6)
    batch = collate([example(mask=mask, weight=0.5), example()])
    assert torch.equal(batch.mask, torch.stack([mask, torch.ones(1, 8, 6)])) and batch.weight.tolist() == [0.5, 1.0]
    assert collate([example()]).mask is None and collate([example()]).weight is None
