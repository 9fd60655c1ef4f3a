"""Batches of one shape each: every sample comes equally often, and nothing is remembered between steps."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ArrayDataset, BucketedDataset, DataConfig, Loader, load


def bucket(count, height, width, first=0):
    """Images that hold their own number."""
    images = np.broadcast_to(np.arange(first, first + count)[:, None, None, None], (count, height, width, 1))
    return ArrayDataset(images.astype(np.uint8), np.zeros(count, np.int32))


SOURCE = BucketedDataset((bucket(37, 2, 2), bucket(11, 2, 4, first=37), bucket(3, 4, 2, first=48)))


def test_every_sample_comes_equally_often():
    loader = Loader(SOURCE, batch_size=8, seed=3)
    # 8 passes over the data are a whole number of batches of every bucket.
    seen = Counter(int(x) for step in range(len(SOURCE)) for x in loader.batch(step).x[:, 0, 0, 0])
    assert seen == dict.fromkeys(range(len(SOURCE)), 8)


def test_a_share_of_a_bucket_comes_instead_of_all_of_it():
    loader = Loader(BucketedDataset(SOURCE.buckets, (37, 4, 6)), batch_size=8, seed=3)
    # 88 passes take the shares 88 times, of which the samples of each bucket have equal parts.
    seen = Counter(int(x) for step in range(37 * 11 + 4 * 11 + 6 * 11) for x in loader.batch(step).x[:, 0, 0, 0])
    assert {number: seen[number] for number in (0, 37, 48)} == {0: 88, 37: 32, 48: 176}
    assert len(set(map(seen.get, range(37)))) == len(set(map(seen.get, range(37, 48)))) == 1


@pytest.mark.parametrize("shares", [(1, 2), (37, 0, 3)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="at least 1 for each of the"):
        BucketedDataset(SOURCE.buckets, shares)


def test_a_bucket_gives_what_a_loader_of_it_gives():
    loader = Loader(SOURCE, batch_size=8, seed=3)
    count = Counter()
    for step in range(40):
        index, before = loader.place(step)
        assert before == count[index]
        count[index] += 1
        expected = Loader(SOURCE.buckets[index], batch_size=8, seed=3).batch(before)
        np.testing.assert_array_equal(loader.batch(step).x, expected.x)
    assert set(count) == {0, 1, 2}


def test_steps_do_not_depend_on_those_before():
    steps = [20, 3, 20, 1000]
    fresh = [Loader(SOURCE, batch_size=8, seed=3).place(step) for step in steps]
    again = Loader(SOURCE, batch_size=8, seed=3)
    assert [again.place(step) for step in steps] == fresh
    assert [Loader(SOURCE, batch_size=8, seed=4).place(step)[0] for step in range(30)] != [
        again.place(step)[0] for step in range(30)
    ]


def test_processes_share_a_batch_of_one_bucket():
    whole = Loader(SOURCE, batch_size=8, seed=0)
    parts = [Loader(SOURCE, batch_size=8, seed=0, process_index=i, process_count=2) for i in (0, 1)]
    for step in range(12):
        both = np.concatenate([part.batch(step).x for part in parts])
        np.testing.assert_array_equal(both, whole.batch(step).x)


def test_a_folder_is_sorted_into_aspect_ratios(tmp_path):
    sizes = [(64, 64), (64, 60), (32, 57), (96, 40), (100, 99), (36, 64)]  # height, width
    for index, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (index, 0, 0)).save(tmp_path / f"{index}.png")
    # Turned upright this one is 64 high and 36 wide.
    turned = Image.new("RGB", (64, 36), (6, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "6.png", exif=exif)
    config = DataConfig(name="folder", path=str(tmp_path), aspects=True, eval_fraction=0.0)
    dataset = load(config, image_size=(64, 64), channels=3, split="train", multiple=8)
    found = {b.event_shape[:2]: sorted(b[np.arange(len(b))].x[:, 0, 0, 0].tolist()) for b in dataset.buckets}
    assert found == {(64, 64): [0, 1, 4], (48, 88): [2, 5], (96, 40): [3], (88, 48): [6]}


def test_unreadable_images_are_left_out_of_buckets_too(tmp_path):
    for index in range(6):
        Image.new("RGB", (48, 32)).save(tmp_path / f"{index}.png")
    (tmp_path / "z.png").write_bytes(b"nothing")
    Image.new("RGB", (96, 40)).save(tmp_path / "y.png")
    whole = (tmp_path / "y.png").read_bytes()
    (tmp_path / "y.png").write_bytes(whole[:-30])
    folder = {"name": "folder", "path": str(tmp_path), "aspects": True, "eval_fraction": 0.0}
    dataset = load(DataConfig(**folder, on_corrupt="skip"), image_size=(32, 32), channels=3, split="train")
    assert [len(bucket) for bucket in dataset.buckets] == [6]
    with pytest.raises(ValueError, match=r"1 image that cannot be read: .*z.png"):
        load(DataConfig(**folder), image_size=(32, 32), channels=3, split="train")


def test_aspects_are_for_folders():
    with pytest.raises(ValueError, match=r"aspects requires name 'folder' or 'tar', not 'digits'"):
        DataConfig(aspects=True)


def test_captions_stand_beside_images(tmp_path):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    config = DataConfig(name="folder", path=str(tmp_path), eval_fraction=0.0)
    (tmp_path / "a.txt").write_text("a  cat\n")
    with pytest.raises(ValueError, match=r"captions for only 1 of 2 files; add '.*b.txt' and 0 more"):
        load(config, image_size=(8, 8), channels=1, split="train")
    (tmp_path / "b.txt").write_text("ein Hündchen", encoding="utf-8-sig")  # with a byte order mark
    assert load(config, image_size=(8, 8), channels=1, split="train").captions == ("a cat", "ein Hündchen")
    (tmp_path / "b.txt").write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"the caption .*b.txt' in data.path is not UTF-8"):
        load(config, image_size=(8, 8), channels=1, split="train")
