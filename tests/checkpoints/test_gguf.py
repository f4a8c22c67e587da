# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile GGUF files: one clear error, before a library is given their counts."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from vllm_nvfp4.checkpoints.gguf import gguf_to_folder
from vllm_nvfp4.checkpoints.gguf_parts import check_gguf
from vllm_nvfp4.checkpoints.spec import CheckpointError

STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + data


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


BASE = (
    entry("general.architecture", STRING, text("llama")),
    entry("llama.block_count", UINT32, struct.pack("<I", 1)),
)


def head(entries=(), tensors=(), num_entries=None, num_tensors=None, tail=b"") -> bytes:
    entries, counts = (*BASE, *entries), (num_tensors, num_entries)
    counts = [len(x) if n is None else n for x, n in zip((tensors, entries), counts, strict=True)]
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join((*entries, *tensors)) + tail


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file as the gguf package writes it, with a vocabulary and two types of tensors."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list([f"token {i}" for i in range(300)])
    writer.add_token_scores([0.5] * 300)
    writer.add_bool("llama.flag", True)
    for name, dtype in (("token_embd.weight", np.float32), ("blk.0.attn_q.weight", np.float16)):
        writer.add_tensor(name, np.ones((64, 32), dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def outcome(data: bytes, folder) -> str:
    """ "accepted", or the one line of the refusal."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    try:
        check_gguf(path)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def test_what_the_library_writes_is_accepted(whole, tmp_path):
    assert outcome(whole, tmp_path) == "accepted"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF", "found 4 bytes"),
        (b"GGML" + bytes(40), "found b'GGML' version 0"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (head(num_entries=2**63), "at most the file's last 0"),
        (head(num_tensors=2**63), "at most the file's last 0"),
        (head([entry("a", 99, b"")]), "a: found a value of type 99"),
        (head([text(b"x")[:4]], num_entries=3), "at most the file's last"),
        (head([entry("a", STRING, struct.pack("<Q", 2**62))]), f"found {2**62} bytes"),
        (head([entry("a", ARRAY, array(UINT8, 2**40))]), f"an array of {2**40}"),
        (head([entry("a", ARRAY, array(STRING, 1000, text("b")))]), "at most the file's last"),
        (head([entry("a", ARRAY, array(ARRAY, 1) * 5000)]), "an array of type 9"),
        (head([entry("a", UINT8, b"1"), entry("a", UINT8, b"1")]), "found it twice"),
        (head([], [tensor("w", (2**40, 2**40))], tail=bytes(64)), "an end at byte"),
        (head([], [tensor("w", (1,) * 5)]), "5 dimensions"),
        (head([], [tensor("w", (8,), kind=4096)]), "type 4096"),
        (head([], [tensor("w", (33,), kind=2)], tail=bytes(64)), "rows of 33"),
        (head([], [tensor("w", (8,)), tensor("w", (8,))]), "found it twice"),
        (head([entry("general.alignment", UINT32, bytes(4))]), "a power of two"),
        (head(), "llama.block_count"),
        (
            head([entry("llama.expert_count", UINT32, b"\xff" * 4)], [tensor("w", (8,))],
                 tail=bytes(96)),
            "llama.expert_count",
        ),
    ],
)  # fmt: skip
def test_the_refusal_says_what_it_is(data, words, tmp_path):
    assert words in outcome(data, tmp_path)


def test_every_truncation_is_refused(whole, tmp_path):
    num_bytes = len(whole)
    for end in [*range(0, 4000, 37), *range(4000, num_bytes - 1, 997), num_bytes - 1]:
        assert outcome(whole[:end], tmp_path) != "accepted", end


def test_damage_is_refused_or_read_by_the_library_in_bounded_memory(whole, tmp_path):
    """Numbers of the head overwritten: what passes has no length that leads a reader astray."""
    chance = random.Random(0)
    end_of_head = whole.index(b"blk.0.attn_q.weight") + 60
    values = [b"\xff" * 8, struct.pack("<Q", 2**40), bytes(8), b"\x01" + bytes(7)]
    counts = {"accepted": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(800):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(4, end_of_head)
            if chance.random() < 0.5:
                data[at] ^= 1 << chance.randrange(8)
            else:
                value = chance.choice(values)[: chance.choice([1, 4, 8])]
                data[at : at + len(value)] = value
        if (line := outcome(bytes(data), tmp_path)) != "accepted":
            assert "\n" not in line
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        if counts["accepted"] % 20 == 0:
            GGUFReader(tmp_path / "model.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(counts.values()) > 60
    assert peak < 200 * len(whole)


def test_a_file_that_only_looks_whole_is_refused_in_one_line(whole, tmp_path):
    """It passes the head's check, and transformers finds no model in it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="a whole GGUF file of an architecture that") as error:
        gguf_to_folder(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
