"""Data sets and captioning models of strangers, written into a folder."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SECRET = "the-secret-line"


def write_secret(folder: Path) -> Path:
    """A file outside of the data set, with SECRET in it."""
    path = folder / "secret.csv"
    path.write_text(f"picture,text,{SECRET}\n{SECRET}.png,{SECRET},c\n")
    return path


def good(folder: Path) -> Path:
    """A picture with a caption, beside which the bad ones lie."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (120, 50, 90)).save(folder / "good.png")
    (folder / "good.txt").write_text("a good picture")
    return folder


def bad(folder: Path) -> Path:
    """The caption of one more picture, which the caller writes."""
    Image.new("RGB", (64, 64), (20, 150, 90)).save(folder / "bad.png")
    return folder / "bad.txt"


def pipe(folder, _secret):
    os.mkfifo(bad(good(folder)))


def device(folder, _secret):
    bad(good(folder)).symlink_to("/dev/zero")


def link_out(folder, secret):
    bad(good(folder)).symlink_to(secret)


def giant_caption(folder, _secret):
    with open(bad(good(folder)), "wb") as file:
        file.truncate(10**10)


def picture_pipe(folder, _secret):
    os.mkfifo(good(folder) / "other.png")


def picture_link_out(folder, secret):
    (good(folder) / "other.png").symlink_to(secret)


def bomb(folder, _secret):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 1, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (good(folder) / "other.png").write_bytes(content)


def table_link_out(folder, secret):
    folder.mkdir()
    (folder / "table.csv").symlink_to(secret)


def giant_table(folder, _secret):
    folder.mkdir()
    with open(folder / "table.csv", "wb") as file:
        file.truncate(10**10)


def deep_list(folder, _secret):
    (good(folder) / "data_info.json").write_text("[" * 10**6)


def state_leads_out(folder, secret):
    state = {"_data_files": [{"filename": os.path.relpath(secret, folder)}], "_split": "train"}
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def claiming_features(folder, _secret):
    captions, latents = folder / "caption_feature_wmask", folder / "img_vae_features_64resolution" / "noflip"
    for each in (captions, latents):
        each.mkdir(parents=True)
    np.savez(captions / "a.npz", caption_feature=np.zeros((1, 2, 64), np.float32), attention_mask=np.ones((1, 2)))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((8, 8, 8), np.float32))
    content = buffer.getvalue().replace(b"(8, 8, 8), }  ", b"(8, 9**9,8), }")
    (latents / "a.npy").write_bytes(content.replace(b"9**9", b"9999"))


# Of a dataset: how it is written, whether the rest of it is used, and what is said of it.
DATASETS = {
    "a caption that is a pipe": (pipe, True, "a pipe named 'bad.txt'"),
    "a caption that is a device": (device, True, "bad.txt"),
    "a caption that is a link out": (link_out, True, "A link leads out of its folder: got 'bad.txt'"),
    "a caption of 10 GB": (giant_caption, True, "File too large"),
    "a picture that is a pipe": (picture_pipe, True, "a pipe named 'other.png'"),
    "a picture that is a link out": (picture_link_out, True, "other.png"),
    "a picture of gigapixels": (bomb, True, "other.png"),
    "a table that is a link out": (table_link_out, False, "A link leads out of its folder"),
    "a table of 10 GB": (giant_table, False, "File too large"),
    "a list of a million brackets": (deep_list, False, "data_info.json"),
    "a state that leads out": (state_leads_out, False, "state.json"),
}


def change(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def own_code(folder):
    (folder / "own.py").write_text("raise SystemExit\nclass Own: pass\n")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def endless_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )


def piped_config(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def weights_link_out(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "moved.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "moved.safetensors")


# Of a captioning model: what is changed in a good one's folder, and what is said of it.
CAPTIONERS = {
    "code of its own": (own_code, "code of its own"),
    "weights in pickles": (pickles, ".bin files alone"),
    "an endless chat template": (endless_template, "template"),
    "weights that are a link out": (weights_link_out, "A link leads out of its folder"),
    "a size that fills the memory": (lambda folder: change(folder / "config.json", image_seq_length=10**12), "10000"),
    "a configuration that is a pipe": (piped_config, ""),  # then it is no captioning model, and not in the list
}
