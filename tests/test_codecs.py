"""Frozen networks against diffusers and transformers at random weights, codecs as maps, texts as conditions."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_files import publish, write_safetensors
from tolerances import NETWORK, assert_close

from flowgen import backend, codecs, convert, text
from flowgen.nn import init
from flowgen.text.t5 import relative_buckets
from flowgen.text.tokenizers import tokenize

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import codec_weights as cw

# float32 sums in another order; features and pixels are of order 1.
RECORDED = cw.recorded()


@pytest.fixture(scope="module")
def autoencoder():
    return convert.autoencoder_kl(cw.state_dict("autoencoder"), cw.AUTOENCODER)


def test_the_autoencoder_is_that_of_diffusers(autoencoder):
    network, variables = autoencoder
    mean, log_variance = jax.jit(lambda x: network.apply(variables, x, method="encode"))(cw.images())
    assert_close(mean, RECORDED["mean"], NETWORK)
    assert_close(log_variance, RECORDED["log_variance"], NETWORK)
    decoded = jax.jit(lambda z: network.apply(variables, z, method="decode"))(RECORDED["mean"])
    assert_close(decoded, RECORDED["decoded"], NETWORK)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_text_encoders_are_those_of_transformers(kind):
    import_encoder = {"t5": convert.t5_encoder, "bert": convert.bert_encoder}[kind]
    config = {"t5": cw.T5, "bert": cw.BERT}[kind]
    network, variables = import_encoder(cw.state_dict(kind), config)
    mask = np.arange(16) < cw.LENGTHS[:, None]
    features = jax.jit(network.apply)(variables, cw.ids(config["vocab_size"]), mask)
    assert_close(features, RECORDED[f"{kind}_features"], NETWORK)
    assert (np.asarray(features)[~mask] == 0).all()


def test_older_files_of_the_same_autoencoder_load_alike(autoencoder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, x in cw.state_dict("autoencoder").items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = x[:, :, None, None] if "attentions" in name and x.ndim == 2 else x
    _, variables = convert.autoencoder_kl(old, cw.AUTOENCODER)
    jax.tree.map(np.testing.assert_array_equal, variables, autoencoder[1])


def test_what_else_a_checkpoint_holds_is_left_out_by_name():
    t5 = cw.state_dict("t5") | {
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros(3, np.float32),
        "lm_head.weight": np.zeros(3, np.float32),
    }
    convert.t5_encoder(t5, cw.T5)
    bert = {f"bert.{name}": x for name, x in cw.state_dict("bert").items()}
    convert.bert_encoder(bert | {"cls.predictions.bias": np.zeros(3, np.float32)}, cw.BERT)
    with pytest.raises(convert.MappingError, match=r"'encoder.something' is not expected"):
        convert.t5_encoder(t5 | {"encoder.something": np.zeros(3, np.float32)}, cw.T5)


@pytest.mark.parametrize(
    ("importer", "kind", "config", "change", "message"),
    [
        ("autoencoder_kl", "autoencoder", cw.AUTOENCODER, {"_class_name": "VQModel"}, "it must be 'AutoencoderKL'"),
        ("autoencoder_kl", "autoencoder", cw.AUTOENCODER, {"use_quant_conv": False}, "use_quant_conv is False"),
        ("autoencoder_kl", "autoencoder", cw.AUTOENCODER, {"latent_channels": 8}, "The weights do not fit the model"),
        (
            "autoencoder_kl",
            "autoencoder",
            cw.AUTOENCODER,
            {"out_channels": 1},
            "in_channels is 3 and out_channels is 1",
        ),
        ("t5_encoder", "t5", cw.T5, {"feed_forward_proj": "relu"}, "as in T5 v1.1 and Flan-T5"),
        ("t5_encoder", "t5", cw.T5, {"model_type": "umt5"}, "it must be 't5'"),
        ("bert_encoder", "bert", cw.BERT, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_networks_that_are_not_ours_are_refused(importer, kind, config, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(convert, importer)(cw.state_dict(kind), config | change)


def test_published_sizes():
    def size(network):
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(network, jax.random.key(0)))))

    published = codecs.AUTOENCODER_PRESETS["sd_vae"]
    assert size(codecs.Autoencoder(published)) == 83_653_863
    assert size(text.T5Encoder(text.T5Config())) == 1_223_527_424
    # 22,713,216 with the pooler of 384 · 385.
    assert size(text.BertEncoder(text.BertConfig())) == 22_713_216 - 384 * 385


def test_relative_buckets_are_told_apart_where_published():
    buckets = relative_buckets(200, 32, 128)
    assert buckets[0, :9].tolist() == [0, *range(17, 24), 24]
    assert buckets[150, 149] == 1
    assert buckets[0, 127] == buckets[0, 199] == 31
    assert buckets[199, 0] == 15
    assert set(buckets.ravel()) == set(range(32)) - {16}


# Codecs


def make_codec(autoencoder):
    network, variables = autoencoder
    normalisation = codecs.LatentNormalisation(shift=np.array([0.1, -0.2, 0.3, 0.0], np.float32), scale=0.5)
    return codecs.AutoencoderCodec(network, variables, normalisation)


def test_an_autoencoder_codec_normalises_and_undoes_it(autoencoder):
    codec = make_codec(autoencoder)
    assert (codec.factor, codec.channels, codec.pixel_channels) == (4, 4, 3)
    mean, std = codec.moments(cw.images())
    shift = np.array([0.1, -0.2, 0.3, 0.0])
    assert_close(mean, (RECORDED["mean"] - shift) * 0.5, NETWORK)
    assert_close(std, np.exp(0.5 * RECORDED["log_variance"]) * 0.5, NETWORK)
    assert_close(codec.decode(mean), RECORDED["decoded"], NETWORK)
    assert isinstance(codec, codecs.Codec)


def test_a_codec_gives_the_same_in_any_parts(autoencoder, monkeypatch):
    codec = make_codec(autoencoder)
    images = np.tile(cw.images()[:, :8, :8], (3, 1, 1, 1))[:5]
    whole = codec.moments(images)[0]
    monkeypatch.setattr(backend, "IMAGES_AT_ONCE", 2)
    assert_close(codec.moments(images)[0], whole, NETWORK)


def test_blocks_of_pixels_are_a_codec():
    codec = codecs.PixelCodec(pixel_channels=3, factor=4)
    mean, std = codec.moments(cw.images())
    assert mean.shape == (2, 4, 6, 48)
    assert not std.any()
    np.testing.assert_array_equal(codec.decode(mean), cw.images())
    assert isinstance(codec, codecs.Codec)


def test_images_and_latents_that_do_not_fit_are_refused(autoencoder):
    codec = make_codec(autoencoder)
    with pytest.raises(ValueError, match=r"images have shape \(2, 8, 8, 1\); this codec needs .*, 3\)"):
        codec.moments(np.zeros((2, 8, 8, 1)))
    with pytest.raises(ValueError, match="images are 10 x 8; this codec needs sides that are multiples of 4"):
        codec.moments(np.zeros((2, 10, 8, 3)))
    with pytest.raises(ValueError, match=r"latents have shape \(2, 8, 8, 16\); this codec needs .*, 4\)"):
        codec.decode(np.zeros((2, 8, 8, 16)))


def test_a_config_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"widths contains 30, which is not a multiple of num_groups 32"):
        codecs.AutoencoderConfig(widths=(30,))
    with pytest.raises(ValueError, match=r"widths has 0 entries"):
        codecs.AutoencoderConfig(widths=())


# Texts


def word_piece(path):
    """A tokenizer.json with the words of the recorded texts, as BERT's."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "two", "dogs", "and", "the", "red", "apple"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(path))


def test_the_sentence_piece_tokenizer_is_that_of_t5():
    tokenizer = text.SentencePieceTokenizer(cw.HERE / "spiece.model")
    rows = [tokenizer(text) for text in cw.TEXTS]
    assert [row + [0] * (RECORDED["spiece_ids"].shape[1] - len(row)) for row in rows] == RECORDED["spiece_ids"].tolist()
    assert rows[1] == [1]


def test_the_json_tokenizer_ignores_the_lengths_in_its_file(tmp_path):
    word_piece(tmp_path / "tokenizer.json")
    tokenizer = text.JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer("A photo of a cat") == [2, 4, 5, 6, 4, 7, 3]
    assert tokenizer("") == [2, 3]
    ids, mask = tokenize(tokenizer, ["a photo of a cat", ""], 7, truncate=False)
    assert ids[1].tolist() == [2, 3, 0, 0, 0, 0, 0]
    assert mask.sum(axis=1).tolist() == [7, 2]


def test_a_text_that_is_too_long_is_refused_or_cut(tmp_path):
    word_piece(tmp_path / "tokenizer.json")
    tokenizer = text.JsonTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="the text 'a photo of a cat' has 7 tokens, but the limit is 5; shorten it"):
        tokenize(tokenizer, ["a cat", "a photo of a cat"], 5, truncate=False)
    ids, _ = tokenize(tokenizer, ["a photo of a cat"], 5, truncate=True)
    assert ids[0].tolist() == [2, 4, 5, 6, 3]


# Checkpoints trained on these features must keep their meaning.
RED = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0]


def test_hashed_words_are_the_same_everywhere():
    encoder = text.HashedWords(length=4, dim=8)
    features, mask = encoder(["red apple", "", "Apple red"])
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True, True, True, False]]
    np.testing.assert_array_equal(features[0, 0], features[2, 1])
    np.testing.assert_array_equal(features[0, 2], features[1, 0])
    assert features[0, 0].tolist() == RED
    assert (features[0, 0] != features[0, 1]).any()
    with pytest.raises(ValueError, match="has 5 tokens, but the limit is 4"):
        encoder(["one two three four"])
    assert encoder(["one two three four"], truncate=True).mask.all()
    assert isinstance(encoder, text.TextEncoder)


# Published folders


def test_an_autoencoder_loads_by_its_folder_and_by_its_pipeline(tmp_path, autoencoder):
    name = "diffusion_pytorch_model.safetensors"
    publish(tmp_path / "pipeline" / "vae", cw.AUTOENCODER, cw.state_dict("autoencoder"), name)
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        codec = convert.load_autoencoder(path)
        assert_close(codec.moments(cw.images())[0], 0.18215 * RECORDED["mean"], NETWORK)


def test_a_text_encoder_loads_by_its_folder(tmp_path):
    folder = tmp_path / "t5"
    publish(folder, cw.T5, cw.state_dict("t5"), "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer; put tokenizer.json or spiece.model there"):
        convert.load_text_encoder(folder, length=16)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    encoder = convert.load_text_encoder(folder, length=48)
    assert encoder.dim == 24
    features, mask = encoder(cw.TEXTS)
    assert features.shape == (4, 48, 24)
    np.testing.assert_array_equal(mask.sum(axis=1), (RECORDED["spiece_ids"] != 0).sum(axis=1))
    assert not np.asarray(features)[~np.asarray(mask)].any()
    alone = encoder(cw.TEXTS[2:3])
    assert_close(alone.embeddings[0], features[2], NETWORK)


def test_weights_in_parts_load_alike(tmp_path):
    tensors = cw.state_dict("bert")
    publish(tmp_path / "bert", cw.BERT, {}, "rest.safetensors")
    names = list(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, inside in halves.items():
        write_safetensors(tmp_path / "bert" / file, {name: tensors[name] for name in inside})
    index = {"weight_map": {name: file for file, inside in halves.items() for name in inside}}
    (tmp_path / "bert" / "model.safetensors.index.json").write_text(json.dumps(index))
    word_piece(tmp_path / "bert" / "tokenizer.json")
    encoder = convert.load_text_encoder(tmp_path / "bert", length=16)
    features = encoder.network.apply(
        encoder.variables, jnp.asarray(cw.ids(40)), jnp.asarray(np.arange(16) < cw.LENGTHS[:, None])
    )
    assert_close(features, RECORDED["bert_features"], NETWORK)
    with pytest.raises(ValueError, match=r"model.text_length is 21, but '.*' accepts at most 20 tokens"):
        convert.load_text_encoder(tmp_path / "bert", length=21)


def test_folders_that_are_not_what_they_should_be_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The folder '.*nowhere' of the autoencoder does not exist"):
        convert.load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="the path of the text encoder is not set; give the published folder with --text-encoder"
    ):
        convert.load_text_encoder("", length=8)
    with pytest.raises(FileNotFoundError, match=r"has no config.json, so it is not a published autoencoder"):
        convert.load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(cw.AUTOENCODER))
    with pytest.raises(FileNotFoundError, match="has no weights for the autoencoder"):
        convert.load_autoencoder(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, cw.state_dict("autoencoder"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        convert.load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="has model_type 'gpt2'; give a text encoder of type t5 or bert"):
        convert.load_text_encoder(tmp_path, length=8)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        convert.load_autoencoder(tmp_path)
