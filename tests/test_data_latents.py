"""Encoded data: what was written is what training reads, and damage is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tolerances import LAYER, assert_close

from flowgen.conditioning import TextCondition
from flowgen.data import ArrayDataset, BucketedDataset, Moments, from_uint8, read_latents
from flowgen.data.latent_files import LatentWriter
from flowgen.data.latents import LatentDataset, Shard, encode, merged


def images(count=10, height=4, width=4, captions=True):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, height, width, 1), np.uint8)
    texts = tuple(f"image {index}" for index in range(count)) if captions else ()
    return ArrayDataset(images, np.arange(count, dtype=np.int32) % 3, class_names=("a", "b", "c"), captions=texts)


def moments(images):
    """A codec of 2 x 2 pixels: their mean, and half their spread."""
    blocks = images.reshape(len(images), images.shape[1] // 2, 2, images.shape[2] // 2, 2, 1)
    return blocks.mean(axis=(2, 4)), blocks.std(axis=(2, 4)) / 2


def texts(captions):
    """Two tokens of three features: the length of the caption, and nothing."""
    features = np.zeros((len(captions), 2, 3), np.float32)
    features[:, 0] = np.array([len(caption) for caption in captions])[:, None]
    return features, np.broadcast_to(np.array([True, False]), (len(captions), 2))


NULL = TextCondition(*texts([""]))


def write(directory, splits, null=None):
    writer = LatentWriter(directory)
    for split, shards in splits.items():
        for shard in shards:
            writer.add(split, shard, kind="image", null=null)
    writer.finish(class_names=("a", "b", "c"))


def read(directory, split="train"):
    return read_latents(directory, split)


def test_what_is_written_is_read(tmp_path):
    data = images()
    write(tmp_path / "set", {"train": encode(data, moments, texts, size=4)}, null=NULL)
    dataset = read(tmp_path / "set")
    assert len(dataset) == 10
    assert (dataset.kind, dataset.event_shape) == ("image", (2, 2, 1))
    assert dataset.class_names == ("a", "b", "c")
    indices = np.array([7, 0, 9, 3, 4])
    batch = dataset[indices]
    mean, std = moments(np.asarray(from_uint8(data.x)))
    np.testing.assert_array_equal(batch.x.mean, mean.astype(np.float32)[indices])
    np.testing.assert_array_equal(batch.x.std, std.astype(np.float32)[indices])
    np.testing.assert_array_equal(batch.context.embeddings[:, 0, 0], len("image 3"))
    assert batch.context.mask.tolist() == [[True, False]] * 5
    labelled = dataclasses.replace(dataset, use_texts=False)
    np.testing.assert_array_equal(labelled[indices].context, data.labels[indices])
    np.testing.assert_array_equal(dataset.null.embeddings, NULL.embeddings)


def test_mirrored_images_are_encoded_too():
    data = images()
    shards = list(encode(data, moments, flip=True, size=4))
    dataset = LatentDataset(tuple(shards))
    assert len(dataset) == 20
    mirrored, _ = moments(np.asarray(from_uint8(data.x[:, :, ::-1])))
    np.testing.assert_array_equal(shards[1].moments.mean, mirrored[:4].astype(np.float32))
    assert shards[0].texts is None


class Bare:
    """A user's dataset without captions."""

    event_shape, class_names = (4, 4, 1), ("a", "b", "c")

    def __len__(self):
        return 4

    def __getitem__(self, indices):
        return images()[indices]


def test_class_names_stand_in_for_captions_and_nothing_is_refused():
    (shard,) = encode(Bare(), moments, texts)
    np.testing.assert_array_equal(shard.texts.embeddings[:, 0, 0], 1)
    nameless = ArrayDataset(images(2).x, np.full(2, -1, np.int32))
    with pytest.raises(ValueError, match=r"neither captions nor class names to use as texts; add a .txt"):
        list(encode(nameless, moments, texts))


def test_shapes_become_buckets_and_splits_stay_apart(tmp_path):
    square, wide = images(6), images(5, width=8)
    train = [*encode(square, moments), *encode(wide, moments)]
    write(tmp_path / "set", {"train": train, "eval": encode(images(3), moments)})
    dataset = read_latents(tmp_path / "set", "train")
    assert isinstance(dataset, BucketedDataset)
    assert {bucket.event_shape: len(bucket) for bucket in dataset.buckets} == {(2, 2, 1): 6, (2, 4, 1): 5}
    assert len(read_latents(tmp_path / "set", "eval")) == 3
    assert len(read_latents(tmp_path / "set", "all")) == 14


def test_half_a_data_set_and_damage_are_refused(tmp_path):
    directory = tmp_path / "set"
    with pytest.raises(
        FileNotFoundError, match=r"has no complete cache of latents: dataset.json, which is written last, is missing"
    ):
        read(directory)
    writer = LatentWriter(directory)
    (shard,) = encode(images(), moments)
    writer.add("train", shard, kind="image")
    with pytest.raises(
        FileNotFoundError, match=r"has no complete cache of latents: dataset.json, which is written last, is missing"
    ):
        read(directory)
    writer.finish(class_names=())
    with pytest.raises(
        ValueError, match=r"no latents in the split .eval.; encode the data again with data.eval_fraction"
    ):
        read(directory, "eval")
    mean = directory / "train-00000" / "mean.npy"
    whole = mean.read_bytes()
    mean.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"mean.npy' is truncated or damaged .*; encode the data again"):
        read(directory)
    np.save(mean, shard.moments.mean[:5])
    with pytest.raises(ValueError, match=r"has shape .5, 2, 2, 1., but there are 10 samples"):
        read(directory)
    np.save(mean, np.zeros((10, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match=r"mean.npy' does not have the shape that"):
        read(directory)
    mean.unlink()
    with pytest.raises(FileNotFoundError, match=r"mean.npy' is missing; encode the data again"):
        read(directory)
    np.save(mean, shard.moments.mean)
    np.save(directory / "train-00000" / "label.npy", np.full(10, 7, np.int32))
    whole = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps({**whole, "class_names": ["a"]}))
    with pytest.raises(ValueError, match=r"label.npy' has labels out of range for 1 classes"):
        read(directory)
    (directory / "dataset.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ValueError, match="is not an index in the format 'flowgen latents 3'"):
        read(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": [{"folder": "train-00000"}]},
        {"class_names": 3},
        {"provenance": "me"},
        {"provenance": {"text": "t5"}},
        {"provenance": {"text": {}}},
        {"provenance": {"codec": {}}},
    ],
)
def test_an_index_that_is_not_whole_is_refused(tmp_path, change):
    write(tmp_path / "set", {"train": encode(images(), moments)})
    index = tmp_path / "set" / "dataset.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(ValueError, match=r"dataset.json' is damaged or was edited by hand .*; encode the data again"):
        read(tmp_path / "set")


def test_texts_need_the_empty_text_beside_them(tmp_path):
    write(tmp_path / "set", {"train": encode(images(), moments, texts)}, null=NULL)
    path = tmp_path / "set" / "train-00000" / "null.npz"
    for damage in (b"", b"no archive"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"null.npz' is truncated or damaged .*; encode the data again"):
            read(tmp_path / "set")
    np.savez(path, text=NULL.embeddings[0, :1], mask=NULL.mask[0, :1])
    with pytest.raises(ValueError, match=r"null.npz' has a different shape from the texts next to it"):
        read(tmp_path / "set")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"null.npz' is missing; encode the data again"):
        read(tmp_path / "set")
    (shard,) = encode(images(), moments, texts)
    with pytest.raises(ValueError, match=r"null, the encoded empty text, is required if the shard has texts"):
        LatentWriter(tmp_path / "other").add("train", shard, kind="image")


def test_data_encoded_into_the_same_place_are_read_anew(tmp_path):
    write(tmp_path / "set", {"train": encode(images(), moments)})
    before = read(tmp_path / "set")[np.arange(10)].x.mean
    shutil.rmtree(tmp_path / "set")
    write(tmp_path / "set", {"train": encode(images(), lambda images: (moments(images)[0] + 1, moments(images)[1]))})
    assert_close(read(tmp_path / "set")[np.arange(10)].x.mean, before + 1, LAYER)


def test_many_shards_need_few_open_files(tmp_path):
    import resource

    (shard,) = encode(images(1), moments)
    write(tmp_path / "set", {"train": [shard] * 200})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 250, limits[1]))
    try:
        dataset = read(tmp_path / "set")
        batch = dataset[np.arange(200)[::-1]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert batch.size == 200


def test_blocks_are_joined_to_shards():
    blocks = list(encode(images(10), moments, texts, size=3))
    size = blocks[0].nbytes
    joined = list(merged(blocks, size=2 * size))
    assert [shard.size for shard in joined] == [6, 4]
    np.testing.assert_array_equal(
        np.concatenate([s.moments.mean for s in joined]), np.concatenate([b.moments.mean for b in blocks])
    )
    np.testing.assert_array_equal(
        np.concatenate([s.texts.mask for s in joined]), np.concatenate([b.texts.mask for b in blocks])
    )


def test_what_is_not_finite_is_not_encoded():
    with pytest.raises(ValueError, match="samples 0 to 9 have latents or text features that are not finite"):
        list(encode(images(), lambda images: (moments(images)[0] * np.nan, moments(images)[1])))
    with pytest.raises(ValueError, match="are not finite"), np.errstate(over="ignore"):
        list(encode(images(), moments, lambda captions: (texts(captions)[0] * 1e6, texts(captions)[1])))


def test_shards_of_one_array_are_gathered_in_order():
    shards = tuple(
        Shard(
            Moments(np.full((n, 1, 1, 1), n, np.float32), np.zeros((n, 1, 1, 1), np.float32)),
            np.arange(n, dtype=np.int32),
        )
        for n in (3, 1, 2)
    )
    batch = LatentDataset(shards)[np.array([5, 0, 3, 2, 4])]
    assert batch.x.mean.ravel().tolist() == [2, 3, 1, 3, 2]
    assert batch.context.tolist() == [1, 0, 0, 2, 0]
