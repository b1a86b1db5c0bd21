"""
The header of a safetensors file, which lists its tensors. A file can come from a stranger, so the
header is checked before a tensor is read. Imports no torch.
"""

import struct
from pathlib import Path

from nanochat.base.strangers import LARGEST, mismatch, missing, open_regular, parse_json, shown

MOST_HEADER = 2**22  # bytes: some 35,000 tensors
Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> type as safetensors spells it, shape
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32}
_BITS |= {"I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}


def read_header(path: Path) -> Header:
    """
    {tensor: (type, shape)} as a safetensors file lists them; no tensor is read. OSError or
    ValueError if the file is not regular, or if its header is too long, malformed or does not cover
    the file exactly.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = struct.unpack("<Q", file.read(8).rjust(8, b"\xff"))[0]
        if length > min(MOST_HEADER, size - 8):
            raise ValueError(
                f"its header claims {length:,} bytes, but the file has {size:,} and a header at "
                f"most {MOST_HEADER:,}"
            )
        entries = parse_json(file.read(length))
    if not isinstance(entries, dict):
        raise ValueError("its header is not an object")
    entries.pop("__metadata__", None)
    form = {"dtype": str, "shape": [int], "data_offsets": [int]}
    header, spans = {}, []
    for name, entry in entries.items():
        fault = mismatch(entry, form, f"the entry of {name}") or missing(entry, list(form))
        if fault:
            raise ValueError(fault)
        begin, end = (*entry["data_offsets"], -1, -1)[:2]
        elements = 1
        for n in entry["shape"]:
            elements = min(elements * n, LARGEST)
        bits = _BITS.get(entry["dtype"], 0)
        if bits and (end - begin) * 8 != elements * bits:
            raise ValueError(
                f"{name[:100]} of shape {shown(entry['shape'])} has {end - begin} bytes"
            )
        header[name] = entry["dtype"], tuple(entry["shape"])
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at or end < begin:
            raise ValueError("its tensors overlap or leave gaps")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"it holds {size - 8 - length:,} bytes of tensors instead of {at:,}")
    return header
