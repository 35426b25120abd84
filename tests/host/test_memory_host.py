"""What a small card holds at once: ComfyUI's own memory management over a card that is played by the CPU."""

import importlib

import pytest
import torch

from pixart_pack.demo.train import VAE_FILE
from pixart_pack.tests.host.graph import write_t5
from pixart_pack.tests.host.test_model import CONFIG, sample
from pixart_pack.tests.tiny_pixart import make_weights

KIB = 1024
RESERVE = 20 * KIB  # for activations, which ComfyUI keeps free beside the weights


class Card:
    """A device apart, with so many bytes; `peak` is the most that weights took, `order` what came and left."""

    device = torch.device("cpu", 0)

    def __init__(self, management, size):
        self.management, self.size, self.peak, self.order = management, size, 0, []

    def used(self, coming=None):
        """The bytes of weights on the card. coming: a LoadedModel that is not yet among the host's."""
        loaded = [*self.management.current_loaded_models]
        if coming is not None and not any(each is coming for each in loaded):
            loaded.append(coming)
        return sum(each.model.loaded_size() for each in loaded if each.device == self.device and each.model is not None)

    def free(self, device=None, torch_free_too=False):
        """As management.get_free_memory."""
        room = self.size - self.used()
        return (room, room) if torch_free_too else room

    def note(self, event, method):
        """The method of LoadedModel, and a note of it."""

        def noted(loaded, *args, **kwargs):
            found = method(loaded, *args, **kwargs)
            self.order.append((event, type(loaded.model.model).__name__ if loaded.model else None))
            self.peak = max(self.peak, self.used(loaded))
            return found

        return noted


@pytest.fixture
def make_card(comfy, pack, monkeypatch):
    """A function that puts a card of so many bytes in, as the GPU of this process."""
    management = importlib.import_module("comfy.model_management")

    def make(size):
        management.unload_all_models()
        card = Card(management, size)
        changes = {
            "vram_state": management.VRAMState.NORMAL_VRAM,
            "get_torch_device": lambda: card.device,
            "text_encoder_device": lambda: card.device,
            "is_device_cpu": lambda device: device == torch.device("cpu"),
            "get_free_memory": card.free,
            "minimum_inference_memory": lambda: RESERVE,
            "extra_reserved_memory": lambda: 0,
            "MIN_WEIGHT_MEMORY_RATIO": 0.0,
        }
        for name, value in changes.items():
            monkeypatch.setattr(management, name, value)
        loaded = management.LoadedModel
        monkeypatch.setattr(loaded, "model_load", card.note("load", loaded.model_load))
        monkeypatch.setattr(loaded, "model_unload", card.note("unload", loaded.model_unload))
        return card

    yield make
    management.unload_all_models()


@pytest.fixture
def t5_file(tmp_path):
    write_t5(tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


def draw(comfy, t5_file, config=CONFIG):
    """Text, then picture, as a workflow does; the encoder stays connected. Returns the latent and both models."""
    modules = ("denoiser.model", "text.t5", "text.captions")
    host_model, t5, text = (importlib.import_module(f"pixart_pack.nodes.host.{name}") for name in modules)
    clip = t5.load_t5(t5_file)
    model = host_model.make_patcher(make_weights(config), config, dtype=torch.float32)
    model.model.memory_required = lambda *_, **__: RESERVE
    conds = [text.encode_captions(clip, [words], config.caption_length)[0][0] for words in ("a red circle", "")]
    return sample(comfy, model, *conds), clip.patcher, model


@pytest.fixture
def sizes(comfy, pack, t5_file, monkeypatch):
    """(latent, bytes of the T5, bytes of the transformer) without any shortage."""
    monkeypatch.setenv("PIXART_PROMPT_CACHE", "0")
    latent, t5, model = draw(comfy, t5_file)
    return latent, t5.model_size(), model.model_size()


def test_with_room_for_both_nothing_leaves(comfy, sizes, make_card, t5_file):
    latent, t5_size, model_size = sizes
    card = make_card(2 * (t5_size + model_size) + 4 * RESERVE)
    assert torch.equal(draw(comfy, t5_file)[0], latent)
    assert card.peak >= t5_size + model_size
    assert not [event for event, _ in card.order if event == "unload"]


def test_the_text_encoder_leaves_before_the_transformer_comes(comfy, sizes, make_card, t5_file):
    """On a card that holds either, and not both."""
    latent, t5_size, model_size = sizes
    card = make_card(int(1.15 * max(t5_size, model_size)) + 2 * RESERVE)
    assert card.size < t5_size + model_size
    found, t5, _ = draw(comfy, t5_file)
    events = [event for event, name in card.order if name != "PixArtModel"]
    assert events.index("unload") < card.order.index(("load", "PixArtModel"))
    assert t5.loaded_size() < 0.2 * t5_size
    assert card.peak <= card.size
    assert torch.equal(found, latent)


@pytest.mark.parametrize("share", [0.6, 0.2])
def test_a_card_too_small_for_either_gets_layer_by_layer(comfy, sizes, make_card, t5_file, share):
    """Weights that do not fit stay in the computer's memory, and are sent as each layer is called."""
    latent, t5_size, model_size = sizes
    card = make_card(int(share * min(t5_size, model_size)) + 2 * RESERVE)
    found, _, model = draw(comfy, t5_file)
    assert model.model.model_lowvram
    assert model.loaded_size() < model_size
    assert card.peak <= card.size
    torch.testing.assert_close(found, latent, atol=2e-3, rtol=1e-4)


def test_the_counted_memory_is_what_the_models_have(comfy, pack):
    memory = importlib.import_module("pixart_pack.benchmarks.memory")
    config = memory.CONFIGS["sigma-1024"]
    with torch.device("meta"):
        net = importlib.import_module("pixart_pack.pixart.transformer").PixArt(config)
    counted, block = memory.count_transformer("sigma-1024")
    assert counted == sum(tensor.numel() for tensor in net.state_dict().values())
    assert block == sum(tensor.numel() for tensor in net.blocks[0].state_dict().values())
    for side in memory.SIDES_PX:  # what ComfyUI keeps free is enough, and not for nothing
        needed = memory.count_activations("sigma-1024", side)
        assert needed < memory.estimate_activations("sigma-1024", side) < 5 * needed
    rows = {stage: weights + activations for stage, weights, activations in memory.measure("sigma-1024")}
    fits = {stage for stage, needed in rows.items() if needed < 6.5 * memory.GIB}  # an 8 GB card less the desktop
    assert rows.keys() - fits == {"T5-XXL, fp16", "VAE, fp16, 2048 px"}  # fp8 or streaming, and tiles


def test_tiles_of_a_2k_picture_need_little(comfy, pack):
    """By ComfyUI's own estimate, and as the host decodes them; sizes whose tiles do not come out even."""
    vae = importlib.import_module("pixart_pack.nodes.host.loading").read_vae(VAE_FILE)
    whole, tile = ((1, 4, side, side) for side in (256, 64))
    estimates = [vae.memory_used_decode(shape, torch.float16) for shape in (whole, tile)]
    assert estimates[1] < 1.5 * 2**30 < 8 * 2**30 < estimates[0]  # an 8 GB card takes tiles of 512 px alone
    latent = torch.randn(1, 4, 37, 50, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = vae.decode(latent)
        tiled = vae.decode_tiled(latent, tile_x=24, tile_y=24, overlap=8)
    assert tiled.shape == exact.shape == (1, 296, 400, 3)
    # Three tilings are averaged; only what lies near a tile's edge differs.
    assert (tiled - exact).abs().mean() < 0.02
