"""Several captions and views of one picture, masks, and how often each is shown."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixart_pack.pixart.commands.encode import parse
from pixart_pack.pixart.commands.variety import source_options, with_variety
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.features import open_features
from pixart_pack.pixart.data.original_features import write_original_features
from pixart_pack.pixart.data.pictures import TensorPicture
from pixart_pack.pixart.data.records import Record, check_records
from pixart_pack.pixart.data.sources import read_dataset
from pixart_pack.pixart.data.streams.writing import write_stream
from pixart_pack.pixart.data.variety.captions import CaptionVariety
from pixart_pack.pixart.data.variety.records import Variety, join, vary
from pixart_pack.pixart.data.variety.views import FOCI, PLAIN, View, ViewVariety
from pixart_pack.pixart.resolution import fit_images

SETTINGS = EncodeSettings(base_px=64, caption_length=20, caption_dtype="fp32")


def encode_text(captions):
    return [torch.tensor([[float(ord(letter)), 1.0] for letter in caption] or [[0.0, 1.0]]) for caption in captions]


def encode_image(pixels):
    means = F.avg_pool2d(pixels.movedim(-1, 1), 8)
    return torch.cat([means, means.sum(1, keepdim=True)], 1), None


def encode(records, folder, settings=SETTINGS, share=None):
    encoder = DatasetEncoder(records, folder, settings, "t5", "vae")
    encoder.encode_captions(encode_text)
    encoder.encode_pictures(encode_image, batch_size=2)
    return encoder.features() if share is None else encoder.write_share(share)


@pytest.mark.parametrize(
    ("fields", "caption", "others", "expected"),
    [
        ({}, "a cat\na dog", ("x",), ("a cat\na dog",)),
        ({"several": True}, "a cat\n\n a dog ", ("x", "a cat"), ("a cat", "a dog", "x")),
        ({"trigger": "sks"}, "a cat", (), ("sks, a cat",)),
        ({"trigger": "sks"}, "a SKS cat", (), ("a SKS cat",)),
        ({"trigger": "sks", "separator": " "}, "a cat", (), ("sks a cat",)),
        ({"prefix": "photo of", "suffix": "4k"}, "a cat", (), ("photo of a cat 4k",)),
        ({"trigger": "sks"}, "", (), ("sks",)),
        ({"drop_tags": 0.99, "variants": 1}, "a, b", (), ("a",)),
    ],
)
def test_captions_are_varied_as_is_said(fields, caption, others, expected):
    assert CaptionVariety(**fields).of(caption, others) == expected


def test_tags_are_shuffled_and_left_out_behind_those_that_stay():
    tags = "sks, cat, " + ", ".join("abcdefgh")
    shuffled = CaptionVariety(shuffle=True, keep_tags=2, variants=20).of(tags)
    assert len(shuffled) == 20 and all(text.startswith("sks, cat, ") for text in shuffled)
    assert {tuple(sorted(text.split(", "))) for text in shuffled} == {tuple(sorted(tags.split(", ")))}
    fewer = CaptionVariety(drop_tags=0.5, keep_tags=1, variants=50).of(tags)
    counts = [len(text.split(", ")) - 1 for text in fewer]
    assert 3.5 < sum(counts) / len(counts) < 5.5 and all(text.startswith("sks") for text in fewer)
    in_order = all(text.split(", ") == sorted(text.split(", "), key=tags.split(", ").index) for text in fewer)
    assert in_order and CaptionVariety(shuffle=True, variants=20, keep_tags=2).of(tags) == shuffled
    lines = CaptionVariety(several=True, shuffle=True, variants=4).of("a, b, c\nd, e, f")
    assert len(lines) <= 4 and {frozenset(line) for line in lines} == {frozenset("a, b, c"), frozenset("d, e, f")}


@pytest.mark.parametrize(
    ("made", "fields", "match"),
    [
        (CaptionVariety, {"variants": 0}, "got 0 as caption variants, expected a number from 1 to 100"),
        (CaptionVariety, {"drop_tags": 1.0}, "share of tags to leave out"),
        (CaptionVariety, {"separator": ""}, "No separator of tags"),
        (ViewVariety, {"zoom": 0.5}, "got 0.5 as zoom of pictures"),
        (ViewVariety, {"focus": "face"}, "Unknown focus: got 'face'"),
        (ViewVariety, {"focus": "1.5, 0"}, "Unknown focus: got '1.5, 0'"),
        (Variety, {"weight": -1}, "Weight out of range: got -1"),
    ],
)
def test_varieties_that_cannot_be(made, fields, match):
    with pytest.raises(ValueError, match=match):
        made(**fields)


def test_a_view_is_cut_where_it_is_said():
    pixels = torch.rand(64, 128, 3)
    middle = fit_images(pixels.movedim(-1, 0)[None], 64, 64, "bicubic")[0].movedim(0, -1)
    assert torch.equal(PLAIN.show(pixels, 64, 64, "bicubic"), middle)
    for x, start in ((0, 0), (0.25, 0), (0.4, 19), (1, 64)):
        assert torch.equal(View(x).show(pixels, 64, 64, "bicubic"), pixels[:, start : start + 64].clamp(0, 1))
    near = View(0.25, 0.25, zoom=2).show(pixels, 32, 64, "bicubic")
    assert torch.equal(near, pixels[:32, :64])
    assert torch.equal(View(0.25, 0.25, 2, flipped=True).show(pixels, 32, 64, "bicubic"), near.flip(1))
    corner = View(1, 1, zoom=4).show(pixels, 16, 32, "bicubic")
    assert torch.equal(corner, pixels[48:, 96:])


def test_colours_change_and_places_do_not():
    grey = torch.full((16, 16, 3), 0.5)
    torch.testing.assert_close(View(saturation=0.2, hue=0.3, contrast=2).show(grey, 16, 16, "bicubic"), grey)
    torch.testing.assert_close(View(brightness=1.2).show(grey, 16, 16, "bicubic"), grey * 1.2)
    red = torch.zeros(16, 16, 3)
    red[..., 0] = 0.8
    turned = View(hue=1 / 3).show(red, 16, 16, "bicubic")
    assert turned.argmax(-1).unique().tolist() != [0]
    torch.testing.assert_close(View(hue=1.0).show(red, 16, 16, "bicubic"), red, atol=1e-3, rtol=0)
    drawn = list(ViewVariety(5, RANDOM := "random", zoom=1.5, flip=0.5, colour=1).of("digest"))
    assert len(set(drawn)) == 5 and drawn == list(ViewVariety(5, RANDOM, 1.5, 0.5, 1).of("digest"))
    assert drawn[0].shape == drawn[0] and drawn[0].zoom == 1 and all(1 <= view.zoom <= 1.5 for view in drawn)
    assert any(view.flipped for view in drawn[1:]) and all(
        View(*map(float, view.name.split())) == view for view in drawn[1:]
    )
    assert list(ViewVariety().of("x")) == [PLAIN] and "random" in FOCI


def records_of(count=3, mask=False):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        size = ((64, 64), (64, 128))[number % 2]
        marked = TensorPicture((torch.rand(*size, 1, generator=generator) > 0.5).float()) if mask else None
        picture = TensorPicture(torch.rand(*size, 3, generator=generator))
        found.append(Record(f"{number}", picture, f"tag{number}, b, c, d", mask=marked))
    return found


VARIETY = Variety(CaptionVariety(shuffle=True, keep_tags=1, variants=3), ViewVariety(2, zoom=1.5, flip=1, colour=0.5))


def test_a_picture_is_drawn_in_one_of_its_views_with_one_of_its_captions(tmp_path):
    dataset = vary(check_records(records_of()), replace(VARIETY, repeats=2.0, weight=0.5))
    assert "captions: 9 are encoded, 3 a picture, such as 'tag0" in dataset.report
    assert "views: 2 of each" in dataset.report and "each picture 2 times an epoch, 6 in all" in dataset.report
    features = encode(dataset.records, tmp_path)
    assert len(features) == 3 and list(features.bins) == [(8, 8), (6, 12), (8, 8)]
    assert features.repeats.tolist() == [2.0] * 3 and features[1].weight == 0.5
    drawn = [features.draw(0, Random(number)) for number in range(40)]
    captions, latents = {each.text for each in drawn}, {tuple(each.latent.flatten().tolist()) for each in drawn}
    assert captions == set(dataset.records[0].captions) and len(latents) == 2
    assert len({(each.text, each.latent.sum().item()) for each in drawn}) == 6  # each with each
    for each in drawn:
        assert torch.equal(each.caption, encode_text([each.text])[0])
    assert features[0].text == dataset.records[0].captions[0]
    assert torch.equal(open_features(tmp_path).draw(0, Random(7)).latent, drawn[7].latent)
    plain = encode(check_records(records_of()).records, tmp_path / "plain")
    assert torch.equal(plain.draw(0, Random(3)).latent, plain[0].latent) and features.identity != plain.identity
    assert torch.equal(plain[2].latent, features[2].latent)
    with pytest.raises(ValueError, match="Original layout cannot hold this dataset: got pictures with group, repeats"):
        write_original_features(features, tmp_path / "original", 64)


def test_a_stream_holds_all_variants(tmp_path):
    dataset = vary(check_records(records_of(mask=True)), replace(VARIETY, repeats=2.5, weight=0.5))
    features = encode((*dataset.records[:2], replace(dataset.records[2], mask=None, repeats=1.0)), tmp_path / "cache")
    write_stream(features, tmp_path / "stream")
    stream = open_features(tmp_path / "stream")
    assert json.loads((tmp_path / "stream" / "stream.json").read_text())["version"] == 2
    for index in range(3):
        own = int(stream.name_of(index))
        assert stream.repeats[index] == features.repeats[own] == (1.0 if own == 2 else 2.5)
        for number in range(8):
            one, other = stream.draw(index, Random(number)), features.draw(own, Random(number))
            assert (one.text, one.weight, one.size_px) == (other.text, other.weight, other.size_px)
            assert torch.equal(one.latent, other.latent) and torch.equal(one.caption, other.caption)
            assert (one.mask is None) == (own == 2) and (own == 2 or torch.equal(one.mask, other.mask))
        assert torch.equal(stream[index].latent, features[own].latent) and stream[index].text == features[own].text
    again = open_features(write_stream(stream, tmp_path / "again").parent)
    assert sorted(len(each[0]) for each in map(again.variants_of, range(3))) == [3, 3, 3]


def test_each_size_and_mirror_has_variants_of_its_own(tmp_path):
    settings = replace(SETTINGS, more_px=(128,), flip=True)
    features = encode(vary(check_records(records_of()), VARIETY).records, tmp_path, settings)
    assert len(features) == 3 * 2 * 2 and len(features.index) == 3 * 2 * 2 * 3
    assert torch.allclose(features[1].latent, features[0].latent.flip(-1), atol=1e-5)
    assert features.bins[2] == (16, 16)


def test_masks_lie_over_what_they_mask(tmp_path):
    records = records_of(mask=True)
    pictures = [replace(each, picture=TensorPicture(each.mask.pixels.repeat(1, 1, 3))) for each in records]
    views = ViewVariety(4, "random", zoom=2, flip=0.5)
    features = encode(vary(check_records(pictures), Variety(views=views)).records, tmp_path)
    for index in range(3):
        for number in range(8):
            example = features.draw(index, Random(number))
            torch.testing.assert_close(example.mask[0].float(), example.latent[0], atol=1e-3, rtol=0)  # fp16
    mask = torch.zeros(64, 128, 1)
    mask[:, 96:] = 1
    middle = [replace(records[1], mask=TensorPicture(mask))]
    dataset = vary(check_records(middle), Variety(views=ViewVariety(focus="mask")))
    focused = encode(dataset.records, tmp_path, replace(SETTINGS, square=True))
    assert focused[0].mask[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def make_files(folder):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 4), dtype=np.uint8)
    for number, each in enumerate(pixels):
        each[:, :, 3] = 255 * (np.arange(64) < 32)
        Image.fromarray(each).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    Image.fromarray(np.full((64, 64), 127, np.uint8)).save(folder / "0-masklabel.png")


def test_masks_are_found_beside_pictures_and_in_their_alpha_channels(tmp_path):
    make_files(tmp_path / "set")
    assert len(read_dataset(tmp_path / "set")) == 3 and not any(each.mask for each in read_dataset(tmp_path / "set"))
    beside = check_records(read_dataset(tmp_path / "set", masks="files"))
    assert beside.report == "2 pictures, 1 with a mask" and beside.records[0].mask.path.name == "0-masklabel.png"
    features = encode(beside.records, tmp_path / "cache")
    assert features[0].mask.unique().tolist() == [pytest.approx(127 / 255, abs=1e-3)] and features[1].mask is None
    alpha = encode(check_records(read_dataset(tmp_path / "set", masks="alpha")).records[:2], tmp_path / "cache")
    assert [alpha[index].mask[0, 0].tolist() for index in range(2)] == [[1] * 4 + [0] * 4] * 2
    (tmp_path / "masks").mkdir()
    (tmp_path / "set" / "0-masklabel.png").rename(tmp_path / "masks" / "1.png")
    folder = check_records(read_dataset(tmp_path / "set", mask_folder=tmp_path / "masks"))
    assert [record.mask is None for record in folder.records] == [True, False]
    (tmp_path / "masks" / "1.png").write_bytes(b"cut")
    broken = check_records(read_dataset(tmp_path / "set", mask_folder=tmp_path / "masks"))
    assert "unreadable  1.png    mask: no format" in broken.report
    with pytest.raises(ValueError, match="Unknown source of masks: got 'sam'"):
        read_dataset(tmp_path / "set", masks="sam")
    with pytest.raises(FileNotFoundError, match="Mask folder not found"):
        read_dataset(tmp_path / "set", mask_folder=tmp_path / "nothing")


def test_folders_say_how_often_their_pictures_are_shown_where_that_is_asked(tmp_path):
    for name in ("10_my cat", "2_dog/more", "rest"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (len(name), 0, 0)).save(tmp_path / "set" / name / "a.png")
    (tmp_path / "set" / "2_dog" / "more" / "a.txt").write_text("a dog")
    assert [each.repeats for each in read_dataset(tmp_path / "set")] == [1, 1, 1]
    found = read_dataset(tmp_path / "set", named_repeats=True)
    assert [(each.repeats, each.caption) for each in found] == [(10, "my cat"), (2, "a dog"), (1, None)]
    (inner,) = read_dataset(tmp_path / "set" / "10_my cat", named_repeats=True)
    assert (inner.repeats, inner.caption) == (10, "my cat")


def test_two_datasets_take_their_shares_of_an_epoch():
    many, few = check_records(records_of(12)), check_records(records_of(3))
    joined = join(many, few, 2)
    shown = [sum(record.repeats for record in part) for part in (joined.records[:12], joined.records[12:])]
    assert shown == [12, 24] and "shares: 1 to 2, by repeats of 1 and 8" in joined.report
    assert join(many, few).records == many.records + few.records


def test_several_captions_of_a_table(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", " ", "two"]}')
    dataset = check_records(read_dataset(tmp_path))
    assert (dataset.records[0].caption, dataset.records[0].others) == ("one", ("two",))
    assert vary(dataset, Variety(CaptionVariety(several=True))).records[0].captions == ("one", "two")


def test_shares_of_several_machines_keep_variants_together(tmp_path):
    dataset = vary(check_records(records_of(7, mask=True)), replace(VARIETY, repeats=3.0))
    records = (*dataset.records[:6], replace(dataset.records[6], mask=None, repeats=1.0))
    whole = encode(records, tmp_path / "whole")
    found = [replace(record, number=number) for number, record in enumerate((*records, records[2]))]
    for which in (2, 1):
        missing = encode(found[which - 1 :: 2], tmp_path / "shares", share=(which, 2))
    features = open_features(tmp_path / "shares")
    assert not missing and features.identity == whole.identity and len(features) == 7
    for index in range(7):
        one, other = (each.draw(index, Random(index)) for each in (features, whole))
        assert one.text == other.text and torch.equal(one.latent, other.latent)
        assert (one.mask is None) == (other.mask is None) == (index == 6)
    assert features.repeats.tolist() == whole.repeats.tolist() == [3.0] * 6 + [1.0]


def test_several_encoded_datasets_in_one_training(tmp_path):
    many, few = records_of(6), vary(check_records(records_of(2, mask=True)), VARIETY).records
    encode([replace(record, caption=f"other {record.name}") for record in many], tmp_path / "many")
    encode(few, tmp_path / "few")
    joined = open_features({tmp_path / "many": 1, tmp_path / "few": 3})
    parts = open_features(tmp_path / "many"), open_features(tmp_path / "few")
    assert len(joined) == 8 and joined.repeats.tolist() == [1.0] * 6 + [9.0] * 2
    assert list(joined.bins) == [*parts[0].bins, *parts[1].bins] and not joined.is_prior.any()
    assert joined.notes == ["6 pictures, each 1 times an epoch", "2 pictures, each 9 times an epoch"]
    assert joined.name_of(7) == "1" and torch.equal(joined[7].latent, parts[1][1].latent)
    assert torch.equal(joined.draw(7, Random(5)).caption, parts[1].draw(1, Random(5)).caption)
    assert torch.equal(joined.null_caption, parts[0].null_caption)
    other = open_features({tmp_path / "many": 1, tmp_path / "few": 2})
    assert len({joined.identity, other.identity, parts[0].identity}) == 3
    with pytest.raises(ValueError, match="Share out of range: got 0"):
        open_features({tmp_path / "many": 1, tmp_path / "few": 0})
    write_stream(parts[0], tmp_path / "stream")
    with pytest.raises(ValueError, match="Streams cannot be mixed"):
        open_features({tmp_path / "stream": 1, tmp_path / "few": 2})


def test_the_command_takes_a_variety():
    options = parse().parse_args(
        "set --output out --text-encoder t5 --vae vae --repeats 2 --shuffle-tags --keep-tags 1 --trigger sks --views 2 "
        "--zoom 1.2 --caption-variants 3 --masks alpha".split()
    )
    assert source_options(options) == {"named_repeats": False, "masks": "alpha", "mask_folder": None}
    (record,) = with_variety(check_records(records_of(1)), options).records
    assert record.repeats == 2 and record.views == ViewVariety(2, zoom=1.2) and len(record.captions) == 3
    assert all(text.startswith("sks, tag0, ") for text in record.captions)
    dataset = check_records(records_of(1))
    assert with_variety(dataset, parse().parse_args("set --output out --text-encoder t5 --vae vae".split())) is dataset
