"""What other programs wrap around a PixArt: the files are made by their own classes, and give exactly the model."""

import dataclasses
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pixart_pack.pixart.checkpoint import to_original
from pixart_pack.pixart.weights.reading import read_checkpoint

pytestmark = pytest.mark.peer

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "sample_size": 16,
}


def make_network(seed, micro=False):
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(**TINY, use_additional_conditions=micro)


TRAINED, AVERAGED = (make_network(seed).state_dict() for seed in (1, 2))


def network_with(state_dict):
    network = make_network(0)
    network.load_state_dict(state_dict)
    return network


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read(tmp_path, content, **options):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    return read_checkpoint(path, num_heads=2, **options)


def averaged_by_torch():
    network = AveragedModel(network_with(TRAINED), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    network.update_parameters(network_with(AVERAGED))  # the first update copies
    return network.state_dict()


def averaged_by_ema_pytorch():
    network = EMA(network_with(TRAINED), beta=0.5, update_after_step=0)
    network.ema_model.load_state_dict(AVERAGED)
    return network.state_dict()


def averaged_by_diffusers(micro=False):
    averaged = EMAModel(make_network(2, micro).parameters(), decay=0.5)
    return averaged.state_dict()


class Lightning(torch.nn.Module):
    """A module of several networks, as Lightning saves them together."""

    def __init__(self):
        super().__init__()
        self.transformer = network_with(TRAINED)
        self.vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
        self.text_encoder = torch.nn.Linear(3, 3)


PREFIXED = {f"x.{name}": tensor for name, tensor in TRAINED.items()}
WRAPPED = {
    f"_fsdp_wrapped_module.{name.replace('blocks.0', 'blocks.0._orig_mod')}": tensor for name, tensor in TRAINED.items()
}
# wrapper: (content, place of what is read, whether that is the average)
WRAPPERS = {
    "DMD": ({"generator": TRAINED, "critic": AVERAGED, "step": 3}, "generator", False),
    "BasicSR": ({"params": TRAINED, "params_ema": AVERAGED}, "params_ema", True),
    "net": ({"net": TRAINED}, "net", False),
    "transformer": ({"transformer": TRAINED, "epoch": 7}, "transformer", False),
    "ema_state_dict": ({"ema_state_dict": AVERAGED, "state_dict": TRAINED}, "ema_state_dict", True),
    "deep": ({"a": {"model": {"0": {"net.module": PREFIXED}}}}, "a.model.0.net.module.x", False),
    "pair": (({"transformer": TRAINED}, 7), "0.transformer", False),
    "decays": ({"model": TRAINED, "ema": {0.999: AVERAGED}}, "ema.0.999", True),
    "AveragedModel": (averaged_by_torch(), "module", True),
    "ema-pytorch": (averaged_by_ema_pytorch(), "ema_model", True),
    "EMAModel": (averaged_by_diffusers(), "shadow_params", True),
    "EMAModel beside": ({"model": TRAINED, "ema": averaged_by_diffusers()}, "ema.shadow_params", True),
    "Lightning": ({"state_dict": Lightning().state_dict(), "optimizer_states": []}, "state_dict.transformer", False),
    "FSDP": (WRAPPED, "", False),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_is_found_in_its_wrapper(tmp_path, name):
    content, place, is_average = WRAPPERS[name]
    checkpoint = read(tmp_path, content)
    assert checkpoint.place == place
    assert same(checkpoint.state_dict, to_original(AVERAGED if is_average else TRAINED))


@pytest.mark.parametrize("name", ["BasicSR", "ema_state_dict", "decays", "ema-pytorch", "EMAModel beside"])
def test_the_trained_weights_are_taken_where_they_are_asked_for(tmp_path, name):
    checkpoint = read(tmp_path, WRAPPERS[name][0], weights="model")
    assert same(checkpoint.state_dict, to_original(TRAINED))
    assert checkpoint.others == (WRAPPERS[name][1],)


def test_several_models_are_not_guessed_between(tmp_path):
    content = {"one": TRAINED, "two": AVERAGED}
    with pytest.raises(ValueError, match="Several models in this file: got them at one, two.*Name the one"):
        read(tmp_path, content)
    assert same(read(tmp_path, content, weights="two").state_dict, to_original(AVERAGED))
    assert read(tmp_path, {"one": TRAINED, "two": TRAINED}).place == "one"
    with pytest.raises(ValueError, match="Unknown choice of weights: got 'three', expected .* one of one, two"):
        read(tmp_path, content, weights="three")


def test_what_lies_beside_a_model_is_named(tmp_path):
    left = read(tmp_path, WRAPPERS["Lightning"][0]).left
    assert any("vae" in each for each in left) and any("text_encoder" in each for each in left)
    optimizer = torch.optim.AdamW(network_with(TRAINED).parameters()).state_dict()
    assert read(tmp_path, {"net": TRAINED, "optimizer": optimizer}).left == ()


@pytest.mark.parametrize("micro", [False, True])
def test_a_list_without_names_is_in_the_order_of_diffusers(tmp_path, micro):
    checkpoint = read(tmp_path, averaged_by_diffusers(micro))
    assert same(checkpoint.state_dict, to_original(make_network(2, micro).state_dict()))


def test_a_list_in_an_order_that_nothing_tells_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a list of 57 weights without names at 'shadow_params'.*copy_to"):
        read(tmp_path, {"shadow_params": [torch.zeros(2, 2, 2)] * 57})


def test_a_whole_module_is_refused_and_the_remedy_named(tmp_path):
    for content in (network_with(TRAINED), {"model": network_with(TRAINED), "epoch": 1}):
        with pytest.raises(ValueError, match=r"whole pickled object.*torch\.save\(model\.state_dict\(\)"):
            read(tmp_path, content)


@pytest.mark.parametrize("both", [True, False])
def test_fused_projections_are_read_as_they_are(tmp_path, both):
    network = network_with(TRAINED)
    network.fuse_qkv_projections()
    fused = network.state_dict()
    if not both:
        parts = ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.", "attn2.to_k.", "attn2.to_v.")
        fused = {name: tensor for name, tensor in fused.items() if not any(part in name for part in parts)}
    assert same(read(tmp_path, fused).state_dict, to_original(TRAINED))


def test_fused_projections_that_were_trained_on_are_refused(tmp_path):
    network = network_with(TRAINED)
    network.fuse_qkv_projections()
    with torch.no_grad():
        network.transformer_blocks[1].attn2.to_kv.weight += 1
    with pytest.raises(ValueError, match=r"Two versions of blocks\.1\.cross_attn\.kv_linear\.weight"):
        read(tmp_path, network.state_dict())


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    path = tmp_path_factory.mktemp("dcp") / "checkpoint"
    dcp.save({"model": TRAINED, "ema": AVERAGED, "step": 3}, checkpoint_id=path, no_dist=True)
    return path


def test_a_distributed_folder_is_read(distributed, tmp_path):
    assert same(read_checkpoint(distributed, num_heads=2).state_dict, to_original(AVERAGED))
    assert same(read_checkpoint(distributed, num_heads=2, weights="model").state_dict, to_original(TRAINED))
    dcp_to_torch_save(distributed, tmp_path / "whole.pt")
    assert same(read_checkpoint(tmp_path / "whole.pt", num_heads=2).state_dict, to_original(AVERAGED))


def test_parts_of_several_processes_are_put_together(tmp_path):
    metadata, whole = fake_shards(tmp_path, TRAINED)
    assert same(read_checkpoint(tmp_path, num_heads=2).state_dict, to_original(whole))
    name = "adaln_single.linear.weight"
    metadata.state_dict_metadata[name].chunks.pop()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="Parts do not fill a tensor"):
        read_checkpoint(tmp_path, num_heads=2)


def fake_shards(path, tensors):
    """What two processes write: the rows of every tensor in two files, by torch's own writer."""
    halves = []
    for rank in (0, 1):
        part = {}
        for name, tensor in tensors.items():
            middle = len(tensor) // 2
            part[name] = (tensor[:middle], tensor[middle:])[rank].clone()
        dcp.save(part, checkpoint_id=path / str(rank), no_dist=True)
        halves.append(pickle.loads((path / str(rank) / ".metadata").read_bytes()))
        (path / str(rank) / "__0_0.distcp").rename(path / f"__{rank}_0.distcp")
    metadata, second = halves
    for info in second.storage_data.values():
        info.relative_path = "__1_0.distcp"
    for index, info in second.storage_data.items():
        middle, rest = len(tensors[index.fqn]) // 2, [0] * (tensors[index.fqn].ndim - 1)
        moved = dataclasses.replace(index, offset=torch.Size([middle, *rest]), index=1)
        metadata.storage_data[moved] = info
        chunk = second.state_dict_metadata[index.fqn].chunks[0]
        whole = metadata.state_dict_metadata[index.fqn]
        whole.chunks.append(dataclasses.replace(chunk, offsets=torch.Size([middle, *rest])))
        whole.size = tensors[index.fqn].shape
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata, tensors


@pytest.mark.parametrize("fault", ["cut", "empty", "foreign", "missing", "outside"])
def test_a_damaged_distributed_folder_is_refused(distributed, tmp_path, fault):
    folder = tmp_path / "x"
    shutil.copytree(distributed, folder)
    data = (folder / ".metadata").read_bytes()
    changed = {"cut": data[: len(data) // 2], "empty": b"", "foreign": pickle.dumps({"a": print}), "missing": data}
    changed["outside"] = data.replace(b"__0_0.distcp", b"../0.distcp_"[:12])
    (folder / ".metadata").write_bytes(changed[fault])
    if fault == "missing":
        (folder / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match="x"):
        read_checkpoint(folder, num_heads=2)
