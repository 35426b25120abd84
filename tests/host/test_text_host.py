"""T5 encoders of every file layout through ComfyUI's own classes, against transformers; and the text nodes."""

import functools
import importlib
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pixart_pack.pixart.config import CONFIGS
from pixart_pack.pixart.text import clean_prompt, load_tokenizer, tokenize
from pixart_pack.tests import hostile_texts, tiny_t5
from pixart_pack.tests.spiece import write_spiece

NOISE = 1e-5  # float32 of two implementations: 3.1e-6 measured, 2.4e-6 of it from float64, states of deviation 1.1
PROMPTS = ["a small cactus with a happy face", "a cat", "", "two dogs; one asleep, one awake, under the old oak tree"]


@pytest.fixture(scope="module")
def models(comfy):
    """The host's folder of models, with all folders that are looked through."""
    folder_paths = importlib.import_module("folder_paths")
    root = Path(folder_paths.get_folder_paths("text_encoders")[0]).parent
    for name in ("text_encoders", "clip", "diffusers", "embeddings"):
        (root / name).mkdir(parents=True, exist_ok=True)
    yield root
    for name in ("text_encoders", "clip", "diffusers"):
        shutil.rmtree(root / name)
        (root / name).mkdir()
    folder_paths.filename_list_cache.clear()  # the host remembers folders that are gone


@pytest.fixture(scope="module")
def nodes(comfy):
    return importlib.import_module("pixart_pack.nodes.text")


@pytest.fixture(scope="module")
def t5():
    return tiny_t5.make_t5()


@pytest.fixture(scope="module")
def weights(t5):
    return tiny_t5.weights_of(t5)


@pytest.fixture(scope="module")
def vocabulary(comfyui):
    return comfyui / "comfy" / "text_encoders" / "t5_tokenizer"


cached_tokenizer = functools.cache(load_tokenizer)


def reference(model, vocabulary, prompts, length):
    """transformers' states of a padded, masked batch, and the mask."""
    ids, mask = tokenize(prompts, cached_tokenizer(vocabulary), length)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask


def run(node, **inputs):
    with torch.inference_mode():
        return node.execute(**inputs)


def load(nodes, name, **options):
    return run(nodes.LoadT5, text_encoder=name, **options)[0]


def encode(nodes, clip, text, **options):
    """(states, dict) of one conditioning."""
    ((states, extra),) = run(nodes.TextEncode, clip=clip, text=text, **options)[0]
    return states, extra


def assert_equals_reference(nodes, clip, model, vocabulary, noise=NOISE):
    states, extra = encode(nodes, clip, "\n".join(filter(None, PROMPTS)), batch_lines=True)
    expected, mask = reference(model, vocabulary, list(filter(None, PROMPTS)), 40)
    longest = int(mask.sum(1).max())
    assert torch.equal(extra["attention_mask"], mask[:, :longest])
    kept = mask[:, :longest]
    torch.testing.assert_close(states[kept], expected[:, :longest][kept], atol=noise, rtol=0)
    assert not states[~kept].any()


def write_single(models, name, weights, metadata=None):
    save_file(weights, models / "text_encoders" / name, metadata=metadata)
    return name


def single_fp32(models, weights, t5):
    return write_single(models, "t5_fp32.safetensors", weights)


def whole_model(models, weights, t5):
    return write_single(models, "t5_whole.safetensors", tiny_t5.with_decoder(weights))


def prefixed_in_clip_folder(models, weights, t5):
    renamed = {f"t5xxl.transformer.{key}": value for key, value in weights.items()}
    save_file({**renamed, "logit_scale": torch.zeros(())}, models / "clip" / "t5_saved.safetensors")
    return "t5_saved.safetensors"


def with_metadata(models, weights, t5):
    config = json.dumps({**tiny_t5.SIZES, "vocab_size": tiny_t5.VOCAB_SIZE})
    return write_single(models, "t5_metadata.safetensors", weights, {"t5_config": config})


def torch_file(models, weights, t5):
    torch.save(weights, models / "text_encoders" / "t5.bin")
    return "t5.bin"


def sharded_bin(models, weights, t5):
    folder = models / "text_encoders" / "t5-v1_1-bin"
    tiny_t5.write_shards(folder, weights, ".bin")
    (folder / "config.json").write_text(tiny_t5.read_config(t5))
    return "t5-v1_1-bin/"


def sharded_safetensors(models, weights, t5):
    tiny_t5.write_shards(models / "text_encoders" / "deep" / "t5-sharded", weights, ".safetensors")
    return "deep/t5-sharded/"


def diffusers_folder(models, weights, t5):
    t5.save_pretrained(models / "diffusers" / "Tiny-PixArt" / "text_encoder")
    return "Tiny-PixArt/text_encoder/"


LAYOUTS = [
    single_fp32,
    whole_model,
    prefixed_in_clip_folder,
    with_metadata,
    torch_file,
    sharded_bin,
    sharded_safetensors,
    diffusers_folder,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_equals_transformers(nodes, models, weights, t5, vocabulary, layout):
    name = layout(models, weights, t5)
    assert name in nodes.list_text_encoders()
    assert_equals_reference(nodes, load(nodes, name), t5, vocabulary)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_files(nodes, models, weights, t5, vocabulary, dtype):
    """The host computes in float32, so that only the rounding of the file remains."""
    rounded = {key: value.to(dtype) for key, value in weights.items()}
    clip = load(nodes, write_single(models, f"t5_{dtype}.safetensors".replace("torch.", ""), rounded))
    model = tiny_t5.make_t5()
    model.load_state_dict({key: value.float() for key, value in rounded.items()}, strict=False)
    assert_equals_reference(nodes, clip, model, vocabulary)


def test_scaled_fp8(nodes, models, weights, vocabulary):
    scaled, read_back = tiny_t5.scale_to_fp8(weights)
    clip = load(nodes, write_single(models, "t5_fp8_scaled.safetensors", scaled))
    model = tiny_t5.make_t5()
    model.load_state_dict(read_back, strict=False)
    assert_equals_reference(nodes, clip, model, vocabulary)


def test_shards_are_not_offered_alone(nodes, models, weights, t5):
    sharded_bin(models, weights, t5)
    assert not [name for name in nodes.list_text_encoders() if "-00001-of-" in name]


@pytest.fixture(scope="module")
def clip(nodes, models, weights, t5):
    return load(nodes, single_fp32(models, weights, t5))


def test_the_cpu_device(nodes, models, weights, t5, vocabulary):
    on_cpu = load(nodes, single_fp32(models, weights, t5), device="cpu")
    assert on_cpu.patcher.load_device == on_cpu.patcher.offload_device == torch.device("cpu")
    assert_equals_reference(nodes, on_cpu, t5, vocabulary)


def test_the_host_can_load_it_again(clip):
    function, arguments = clip.patcher.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    for key, value in clip.patcher.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)


def test_tokenizer_folders(nodes, models, weights, t5, vocabulary):
    """spiece.model by sentencepiece, tokenizer.json by transformers, and the one that lies with the encoder."""
    name = diffusers_folder(models, weights, t5)
    beside = models / "diffusers" / "Tiny-PixArt" / "tokenizer"
    shutil.copytree(vocabulary, beside, dirs_exist_ok=True)
    piece = models / "text_encoders" / "spiece"
    piece.mkdir(exist_ok=True)
    write_spiece(vocabulary / "tokenizer.json", piece / "spiece.model")
    assert {"auto", "built-in", "Tiny-PixArt/tokenizer/", "spiece/"} <= set(nodes.list_tokenizers())
    path = nodes.find_text_encoder(name)
    assert nodes.find_tokenizer("auto", path) == beside
    for tokenizer in ("auto", "built-in", "Tiny-PixArt/tokenizer/", "spiece/"):
        assert_equals_reference(nodes, load(nodes, name, tokenizer=tokenizer), t5, vocabulary)


def test_a_vocabulary_of_its_own(nodes, models):
    """An encoder with another vocabulary needs the tokenizer that belongs to it."""
    sentencepiece = importlib.import_module("sentencepiece")
    model = tiny_t5.make_t5(vocab_size=32)
    name = write_single(models, "t5_own.safetensors", tiny_t5.weights_of(model))
    with pytest.raises(
        ValueError, match="Vocabulary mismatch: got 32 rows in t5_own.safetensors, expected about 32100"
    ):
        load(nodes, name)
    folder = models / "text_encoders" / "own"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small cat on a red mat", "two dogs under the old tree"] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=24,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    states, extra = encode(nodes, load(nodes, name, tokenizer="own/"), "a small cat")
    expected, mask = reference(model, folder, ["a small cat"], 12)
    torch.testing.assert_close(states, expected[:, mask[0]], atol=NOISE, rtol=0)


def wrong_file(models, name, tensors):
    save_file(tensors, models / "text_encoders" / name)


def test_wrong_files(nodes, models, weights):
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    files = {
        "clip_l.safetensors": {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)},
        "lora.safetensors": {"lora_te1_encoder_block_0.lora_down.weight": torch.zeros(2, 2)},
        "decoder.safetensors": {
            k.replace("encoder.", "decoder."): v for k, v in weights.items() if k.startswith("encoder.")
        },
        "umt5.safetensors": {**weights, bias.format(1): weights[bias.format(0)].clone()},
        "mt5.safetensors": {**weights, "shared.weight": torch.zeros(50000, tiny_t5.SIZES["d_model"])},
        "half.safetensors": {k: v for k, v in weights.items() if "block.1.layer.1" not in k},
        "misfit.safetensors": {**weights, "encoder.block.2.layer.0.SelfAttention.o.weight": torch.zeros(24, 9)},
    }
    for name, tensors in files.items():
        wrong_file(models, name, tensors)
        with pytest.raises(ValueError, match=name):
            load(nodes, name)


def test_damaged_files(nodes, models, weights):
    folder = models / "text_encoders"
    whole = folder / "whole.safetensors"
    save_file(weights, whole)
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.safetensors").write_bytes(b"<html>sign in</html>")
    torch.save(weights, folder / "whole.bin")
    (folder / "cut.bin").write_bytes((folder / "whole.bin").read_bytes()[:-5000])
    torch.save({"weights": list, "model": 3}, folder / "pickle.bin")
    for name in ("cut.safetensors", "empty.safetensors", "page.safetensors", "cut.bin", "pickle.bin"):
        with pytest.raises(ValueError, match=name):
            load(nodes, name)
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load(nodes, "absent.safetensors")


def test_damaged_folders(nodes, models, weights):
    folder = models / "text_encoders" / "broken"
    tiny_t5.write_shards(folder, weights, ".safetensors")
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors"):
        load(nodes, "broken/")
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../whole.safetensors"}}))
    with pytest.raises(ValueError, match=r"\.\./whole.safetensors"):
        load(nodes, "broken/")
    index.unlink()
    with pytest.raises(FileNotFoundError, match="got 2 of 3 like 'model-00001-of-00003.safetensors'"):
        load(nodes, "broken/")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_ff": 1000}))
    tiny_t5.write_shards(folder, weights, ".safetensors")
    with pytest.raises(ValueError, match="got d_ff 1000 for broken, expected 56"):
        load(nodes, "broken/")


def test_core_text_nodes_take_the_clip(core_nodes, nodes, clip, t5, vocabulary):
    core = {name: core_nodes[name]() for name in ("CLIPTextEncode", "ConditioningConcat", "CLIPSetLastLayer")}
    with torch.inference_mode():
        (cat,) = core["CLIPTextEncode"].encode(clip, "a cat")
        expected, mask = reference(t5, vocabulary, ["a cat"], 10)
        torch.testing.assert_close(cat[0][0], expected[:, mask[0]], atol=NOISE, rtol=0)
        (both,) = core["ConditioningConcat"].concat(cat, run(nodes.TextEncode, clip=clip, text="a dog")[0])
        assert both[0][0].shape[1] > cat[0][0].shape[1]
        (earlier,) = core["CLIPSetLastLayer"].set_last_layer(clip, -2)
        before_last, _ = encode(nodes, earlier, "a cat")
    assert before_last.shape == cat[0][0].shape and not torch.allclose(before_last, cat[0][0], atol=1e-2)


def test_prompt_weights(nodes, clip):
    plain, _ = encode(nodes, clip, "a red ball")
    one, _ = encode(nodes, clip, "a (red:1.0) ball")
    strong, extra = encode(nodes, clip, "a (red:1.3) ball")
    assert one.shape == plain.shape == strong.shape
    torch.testing.assert_close(one, plain, atol=NOISE, rtol=0)
    changed = (strong - plain).abs().amax(-1)[0] > 1e-3
    assert changed.any() and not changed[0] and not changed[-1]
    assert extra["attention_mask"].all()


def test_loras_reach_the_encoder(nodes, clip):
    lora = importlib.import_module("comfy.sd")
    layer = "encoder.block.0.layer.1.DenseReluDense.wo"
    down, up = torch.randn(2, tiny_t5.SIZES["d_ff"]), torch.randn(tiny_t5.SIZES["d_model"], 2)
    for key in (f"text_encoders.t5xxl.transformer.{layer}", f"lora_te1_{layer.replace('.', '_')}"):
        state_dict = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        _, patched = lora.load_lora_for_models(None, clip, state_dict, 1.0, 1.0)
        assert list(patched.patcher.patches) == [f"t5xxl.transformer.{layer}.weight"]
    assert not torch.allclose(encode(nodes, patched, "a cat")[0], encode(nodes, clip, "a cat")[0], atol=1e-3)


def test_truncation_is_said(nodes, clip, caplog, t5, vocabulary):
    text = " ".join(["a tall lighthouse above the sea"] * 40)
    with caplog.at_level(logging.WARNING):
        output = run(nodes.TextEncode, clip=clip, text=text, caption_length="120")
    states, extra = output[0][0]
    assert states.shape[1] == 120 and extra["attention_mask"].shape == (1, 120)
    expected, mask = reference(t5, vocabulary, [text], 120)
    torch.testing.assert_close(states, expected, atol=NOISE, rtol=0)
    (notice,) = output.ui.as_dict()["text"]
    assert "tokens cut (limit 120)" in notice and notice.endswith("above the sea'") and notice in caplog.text
    assert run(nodes.TextEncode, clip=clip, text="a cat", caption_length="120").ui.value == "4 of 120 tokens"


def fake_model(name="alpha-1024", null=True, channels=None):
    config = CONFIGS[name]
    if channels:
        config = type(config)(**{**config.__dict__, "caption_channels": channels})
    return SimpleNamespace(model=SimpleNamespace(pixart_config=config, has_null_caption=null))


@pytest.mark.parametrize("cleaning", ["off", "official"])
@pytest.mark.parametrize("name", hostile_texts.PROMPTS)
def test_a_prompt_that_means_harm_is_cut_or_refused_in_words(nodes, clip, name, cleaning):
    """Weights in deep brackets raised RecursionError in the host, and the cleaning held its lock for minutes."""
    start = time.perf_counter()
    try:
        output = run(nodes.TextEncode, clip=clip, text=hostile_texts.PROMPTS[name], clean_caption=cleaning)
    except ValueError as error:
        assert "Brackets too deep" in str(error) and len(str(error)) < 400
    else:
        assert output[0][0][0].shape[1] <= 300 and len(output.ui.as_dict()["text"][0]) < 1000
    assert time.perf_counter() - start < 3  # of which T5 takes some


def test_a_batch_of_captions_is_bounded_and_so_is_what_is_said_of_it(nodes, clip):
    with pytest.raises(ValueError, match="Too many captions: got 100000, expected at most 4096"):
        run(nodes.TextEncode, clip=clip, text="cat\n" * 100_000, batch_lines=True)
    notice = run(nodes.TextEncode, clip=clip, text="cat\n" * 100, batch_lines=True).ui.as_dict()["text"][0]
    assert notice.endswith("and 68 more captions")


def test_caption_length_comes_from_the_model(nodes, clip):
    text = "tree " * 400
    width = tiny_t5.SIZES["d_model"]
    for name, expected in (("alpha-512", 120), ("sigma-1024", 300)):
        assert encode(nodes, clip, text, model=fake_model(name, channels=width))[0].shape[1] == expected
    unknown = run(nodes.TextEncode, clip=clip, text=text)
    assert unknown[0][0][0].shape[1] == 300 and "PixArt-alpha takes 120 tokens" in unknown.ui.value
    assert encode(nodes, clip, text, caption_length="custom", custom_length=7)[0].shape[1] == 7


def test_wrong_wiring(nodes, clip):
    with pytest.raises(ValueError, match="Caption width mismatch: got 24, expected 4096"):
        encode(nodes, clip, "a cat", model=fake_model())
    with pytest.raises(ValueError, match="Not a PixArt model of this pack: got SimpleNamespace"):
        encode(nodes, clip, "a cat", model=SimpleNamespace(model=SimpleNamespace()))
    other = SimpleNamespace(tokenize=lambda text: {"l": [], "g": []})
    with pytest.raises(ValueError, match="got the tokens of l, g, expected those of t5xxl alone"):
        encode(nodes, other, "a cat")
    with pytest.raises(ValueError, match="got width 512 and height 0, expected both or neither"):
        encode(nodes, clip, "a cat", width=512)


def test_official_cleaning(nodes, clip):
    text = "A <b>Big</b> (red:1.3) BALL"
    output = run(nodes.TextEncode, clip=clip, text=text, clean_caption="official")
    assert "has removed the prompt weights" in output.ui.value
    assert torch.equal(output[0][0][0], encode(nodes, clip, clean_prompt(text))[0])


def test_sizes(nodes, clip):
    _, extra = encode(nodes, clip, "a cat", width=1344, height=768, aspect_ratio=0.57)
    assert extra["pixart_size"] == (768, 1344) and extra["pixart_ratio"] == 0.57
    assert not {"pixart_size", "pixart_ratio"} & encode(nodes, clip, "a cat")[1].keys()


def snapshot(conditioning):
    return [(states.clone(), dict(extra)) for states, extra in conditioning]


def test_negative_modes(nodes, clip, t5, vocabulary):
    positive = run(nodes.TextEncode, clip=clip, text="a cat\na small grey dog", batch_lines=True, width=64, height=96)[
        0
    ]
    before = snapshot(positive)
    empty = run(nodes.Negative, mode="empty", clip=clip, positive=positive)[0]
    expected, mask = reference(t5, vocabulary, [""], 4)
    torch.testing.assert_close(empty[0][0], expected[:, :1], atol=NOISE, rtol=0)
    assert empty[0][1]["attention_mask"].tolist() == [[True]] and empty[0][1]["pixart_size"] == (96, 64)
    text = run(nodes.Negative, mode="text", clip=clip, text="blurry")[0]
    assert torch.equal(text[0][0], encode(nodes, clip, "blurry")[0])
    null = run(nodes.Negative, mode="learned null", positive=positive, model=fake_model())[0]
    assert null[0][1]["pixart_null"] is True and null[0][0].shape == positive[0][0].shape
    assert torch.equal(null[0][1]["attention_mask"], positive[0][1]["attention_mask"])
    for (states, extra), (old_states, old_extra) in zip(positive, before, strict=True):
        assert torch.equal(states, old_states) and extra.keys() == old_extra.keys()


def test_negative_says_what_is_missing(nodes, clip):
    with pytest.raises(ValueError, match="got no clip, expected it for the mode 'empty'"):
        run(nodes.Negative, mode="empty")
    with pytest.raises(ValueError, match="got no positive and no model"):
        run(nodes.Negative, mode="learned null", clip=clip)
    positive = run(nodes.TextEncode, clip=clip, text="a cat")[0]
    with pytest.raises(ValueError, match="No learned null caption"):
        run(nodes.Negative, mode="learned null", positive=positive, model=fake_model(null=False))


@pytest.mark.parametrize(
    ("client", "features", "expected"),
    [
        ("editor", {"supports_preview_metadata": True}, [("4 of 300 tokens", "7", "editor")]),
        ("script", {}, []),  # such a client takes every binary message for a picture
        (None, {}, []),  # and without one all would get it
    ],
)
def test_text_is_shown_on_the_node(nodes, clip, monkeypatch, client, features, expected):
    shown = []
    instance = SimpleNamespace(
        send_progress_text=lambda *message: shown.append(message),
        client_id=client,
        sockets_metadata={client: {"feature_flags": features}},
    )
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    monkeypatch.setattr(nodes.TextEncode, "hidden", SimpleNamespace(unique_id="7"))
    run(nodes.TextEncode, clip=clip, text="a cat")
    assert shown == expected
