"""
The header of a safetensors file, which lists its tensors. A file can come from a stranger, so the
header is checked before a tensor is read. Imports no torch.
"""

import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanochat.base.strangers import open_regular, shown

MOST_HEADER = 2**22  # bytes: some 35,000 tensors
Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> type as safetensors spells it, shape


def read_header(path: Path) -> Header:
    """
    {tensor: (type, shape)} as a safetensors file lists them; no tensor is read. OSError or
    ValueError if the file is not regular, or if its header is too long, malformed or does not cover
    the file exactly.
    """
    with open_regular(path) as file:
        length = struct.unpack("<Q", file.read(8).rjust(8, b"\xff"))[0]
        size = file.seek(0, 2)
    if length > min(MOST_HEADER, size - 8):
        raise ValueError(
            f"its header claims {length:,} bytes, but the file has {size:,} and a header at "
            f"most {MOST_HEADER:,}"
        )
    try:
        with safe_open(path, framework="numpy") as stored:  # checks types, sizes and offsets
            names = stored.keys()
            tensors = [stored.get_slice(name) for name in names]
            entries = [(tensor.get_dtype(), tuple(tensor.get_shape())) for tensor in tensors]
    except SafetensorError as e:
        raise ValueError(shown(str(e), 300)) from e
    return dict(zip(names, entries, strict=True))
