"""GGUF files of tiny models, written by the package `gguf`."""

import gguf


def write_gguf(path, weights, kind_of, architecture="t5encoder", fields=()):
    """kind_of: (name, tensor) -> the type of its blocks, None for F32. fields: (name, text) pairs."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "</s>", "a"])
    for name, value in fields:
        writer.add_string(name, value)
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[kind_of(name, tensor) or "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def matrices(kind):
    """For write_gguf: that type for what a linear layer or a table of words holds, numbers for all else."""

    def kind_of(name, tensor):
        fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        return kind if fits and "rel_b" not in name and "table" not in name else None

    return kind_of
