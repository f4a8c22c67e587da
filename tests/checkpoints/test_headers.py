# SPDX-License-Identifier: Apache-2.0
"""Safetensors headers without torch: what is read, and every way in which files can be bad."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_nvfp4.checkpoints.headers import INDEX, read_file_header, read_headers
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.testing.checkpoints import edit_json, extract_fixture, split_into_shards

NAME = "modelopt/nvfp4-kv8-llama"
TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return extract_fixture(NAME, tmp_path)


@pytest.fixture
def sharded(folder):
    return split_into_shards(folder)


def write_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_headers_are_those_of_the_safetensors_library(folder):
    headers = read_headers(folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    with safe_open(path, "pt") as tensors:
        assert set(headers) == set(tensors.keys())
        for name, header in headers.items():
            view = tensors.get_slice(name)
            assert (header.dtype, list(header.shape)) == (view.get_dtype(), view.get_shape())
            value = tensors.get_tensor(name)
            stored = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            assert raw[header.start : header.end] == stored
            assert header.num_bytes == len(stored)


def test_shards_are_read_by_the_index(sharded):
    headers = read_headers(sharded)
    files = {header.file for header in headers.values()}
    assert files == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    # A file that the index does not name is no part of the checkpoint.
    shutil.copy(sharded / min(files), sharded / "adapter.safetensors")
    assert read_headers(sharded) == headers


def test_neither_torch_nor_vllm_is_imported(folder):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vllm_nvfp4.checkpoints.headers import read_headers\n"
        f"assert read_headers(Path({str(folder)!r}))\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        read_headers(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no \*\.safetensors file; needed model\.safetensors"
    ):
        read_headers(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"only {name} \(pickle\).*can run code.*Convert"):
        read_headers(tmp_path)


def test_a_consolidated_copy_is_left_out(folder):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert {h.file for h in read_headers(folder).values()} == {"model.safetensors"}


@pytest.mark.parametrize("size", [0, 5, 8, 100, 60_000])
def test_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated.*Download") as error:
        read_headers(folder)
    assert str(size) in str(error.value)


def test_a_file_with_bytes_to_spare(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 7)
    with pytest.raises(CheckpointError, match="file length: found"):
        read_headers(folder)


def test_a_git_lfs_pointer_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_headers(folder)


def test_a_header_longer_than_the_limit(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse
    with pytest.raises(CheckpointError, match="header length of 200000000"):
        read_headers(tmp_path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "a JSON object"),
        (b"\xff\xfe{}", "a JSON object"),
        ([1], "found b'\\['"),
        ({"a": 3}, "a: found 3; needed a table"),
        ({"a": {**F32, "dtype": "F31"}}, "dtype 'F31'; needed one of BOOL"),
        ({"a": {**F32, "shape": [-2]}}, "non-negative"),
        ({"a": {**F32, "shape": "2"}}, "non-negative"),
        ({"a": {**F32, "shape": [True]}}, "non-negative"),
        ({"a": {**F32, "data_offsets": [0]}}, "non-negative"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "-8 bytes; needed 8 bytes"),
        ({"a": {**F32, "shape": [3]}}, r"8 bytes; needed 12 bytes for F32 of shape \[3\]"),
        ({"a": {**F32, "data_offsets": [4, 12]}}, "truncated"),
        ({"a": F32, "b": F32}, "b: found data at byte"),
        ({"a": {**F32, "shape": [2**62, 2**62]}}, "8 bytes; needed"),
    ],
)
def test_a_header_that_says_nonsense(tmp_path, header, words):
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=words):
        read_headers(tmp_path)


def test_a_file_without_tensors(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    with pytest.raises(CheckpointError, match="tensors: found none; needed at least one"):
        read_headers(tmp_path)


def test_a_header_with_a_gap(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}
    write_raw(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"data at byte \d+; needed at byte"):
        read_file_header(tmp_path / "x.safetensors", "x.safetensors")


def test_empty_tensors_and_metadata_are_fine(tmp_path):
    save_file(
        {"a": torch.zeros(0, 4), "b": torch.ones(2)},
        str(tmp_path / "model.safetensors"),
        metadata={"format": "pt"},
    )
    assert read_headers(tmp_path)["a"].num_bytes == 0


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"model-00002-of-00002\.safetensors: file: found nothing.*{INDEX}"
    ):
        read_headers(sharded)


def test_a_tensor_that_is_not_in_its_shard(sharded):
    edit_json(
        sharded / INDEX,
        lambda index: index["weight_map"].update({"extra": "model-00001-of-00002.safetensors"}),
    )
    with pytest.raises(CheckpointError, match="extra: found no such tensor"):
        read_headers(sharded)


def test_a_tensor_in_the_other_shard(sharded):
    def swap(index):
        files = sorted(set(index["weight_map"].values()))
        old = index["weight_map"][TENSOR]
        index["weight_map"][TENSOR] = files[1 - files.index(old)]

    edit_json(sharded / INDEX, swap)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: found it in model-0000"):
        read_headers(sharded)


def test_a_tensor_in_two_files(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-copy.safetensors")
    with pytest.raises(CheckpointError, match=r"a second copy, also in model-copy\.safetensors"):
        read_headers(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: .*weight_map|index\.json: contents"):
        read_headers(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b", "..\\b"])
def test_an_index_that_leaves_the_folder(sharded, name):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"x": name}))
    with pytest.raises(CheckpointError, match="a path that leaves the folder"):
        read_headers(sharded)


def test_links_lead_only_into_the_folder_or_its_own_hub_blobs(folder, tmp_path):
    original = folder / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    original.rename(outside)
    original.symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"a link to .*outside\.safetensors"):
        read_headers(folder)

    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = repository / "blobs" / "0123"
    blob.parent.mkdir()
    outside.rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert read_headers(snapshot)
    (repository / "other").mkdir()
    other = shutil.copy(blob, repository / "other" / "0123")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other)
    with pytest.raises(CheckpointError, match="the blobs folder of the same"):
        read_headers(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    link = tmp_path / "link"
    link.symlink_to(snapshot)  # the user named the folder: that it is a link is their business
    assert read_headers(link)


def test_a_broken_link(folder):
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match="a broken link"):
        read_headers(folder)
