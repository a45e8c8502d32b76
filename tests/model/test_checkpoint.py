"""Checkpoints: both layouts load; everything malformed is refused before anything is allocated."""

from __future__ import annotations

import json
import os
import random
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_configs import CASES, build, hf_model, make_tokens, packed

from llama4_triton.model import checkpoint, safetensors_file
from llama4_triton.model.checkpoint import (
    INDEX_NAME,
    CheckpointError,
    expected_shapes,
    load_config,
    load_model,
    load_state,
    scan,
)
from llama4_triton.model.config import MAVERICK, SCOUT, ConfigError, tiny_maverick, tiny_scout
from llama4_triton.model.reference import Llama4
from llama4_triton.model.tiny import save_tiny_checkpoint, tiny_state

pytestmark = pytest.mark.no_kernels

CONFIG = tiny_maverick(num_hidden_layers=2)


@pytest.fixture
def directory(tmp_path):
    return save_tiny_checkpoint(tmp_path / "tiny", CONFIG, shards=2)


@pytest.fixture
def nothing_allocated(monkeypatch):
    """The data of no tensor is read: every check comes before it."""

    def fail(*_):
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(checkpoint, "read_tensor", fail)


@pytest.mark.parametrize("name", ["scout", "maverick", "tied", "bias", "all-dense"])
@pytest.mark.parametrize("nested, shards", [(False, 1), (True, 3)], ids=["text-only", "nested"])
def test_loaded_model_is_the_saved_one(tmp_path, name, nested, shards):
    save_tiny_checkpoint(tmp_path, CASES[name], seed=3, shards=shards, nested=nested)
    model = load_model(tmp_path, Llama4, dtype=torch.float32)
    tokens = make_tokens(CASES[name], [9])
    want = packed(build(Llama4, CASES[name], seed=3), tokens)[0]
    assert torch.equal(packed(model, tokens)[0], want)
    assert not any(p.requires_grad for p in model.parameters())


def test_transformers_reads_what_is_saved_and_the_other_way_round(tmp_path):
    from transformers import Llama4ForCausalLM

    config = CASES["scout"]
    save_tiny_checkpoint(tmp_path / "ours", config)
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in tiny_state(config).items():
        assert torch.equal(theirs.get_parameter(name).data, tensor)
    hf_model(config, seed=5).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / INDEX_NAME).exists()
    state = dict(load_state(tmp_path / "theirs", load_config(tmp_path / "theirs")))
    want = tiny_state(config, seed=5)
    assert list(state) == list(want)
    assert all(torch.equal(state[name], want[name]) for name in want)


def test_vision_tensors_are_skipped(tmp_path):
    save_tiny_checkpoint(tmp_path, CONFIG, shards=1, nested=True)
    state = load_file(tmp_path / "model.safetensors")
    state["vision_model.class_embedding"] = torch.zeros(5)
    state["multi_modal_projector.linear_1.weight"] = torch.zeros(2, 3)
    save_file(state, tmp_path / "model.safetensors")
    assert list(scan(tmp_path, CONFIG)) == list(expected_shapes(CONFIG))


def test_cast_progress_and_options(directory):
    seen = []
    model = load_model(
        directory,
        Llama4,
        dtype=torch.float16,
        progress=lambda done, total: seen.append((done, total)),
        parity="hf",
    )
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.model.rotary.period is None
    assert model.model.rotary.inv_freq.dtype == torch.float32
    total = 4 * CONFIG.parameter_counts()["text"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_expected_shapes_add_up_to_the_parameter_count(config):
    shapes = expected_shapes(config)
    counts = config.parameter_counts()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == counts["text"]
    assert shapes["model.layers.1.feed_forward.experts.gate_up_proj"] == (
        config.num_local_experts,
        5120,
        16384,
    )


def test_hugging_face_cache_layout_is_read(tmp_path):
    """snapshots/<revision>/<name> is a link to ../../blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    save_tiny_checkpoint(blobs, CONFIG)
    snapshot.mkdir(parents=True)
    for file in list(blobs.iterdir()):
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert len(dict(load_state(snapshot, load_config(snapshot)))) == len(expected_shapes(CONFIG))


def _shard(directory, number=1):
    return directory / f"model-{number:05d}-of-00002.safetensors"


def _rewrite_header(path, change):
    """Apply `change` to the header's dict (or replace the text) and keep the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _edit_index(directory, change):
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    changed = change(index)
    path.write_text(changed if isinstance(changed, str) else json.dumps(index))


def _edit_tensors(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


EMBED = "model.embed_tokens.weight"  # in shard 1, like every first, third, ... tensor


def _set(key, value):
    return lambda header: header[EMBED].__setitem__(key, value)


def _one_byte_off(header):
    last = max(header, key=lambda name: header[name].get("data_offsets", [0, 0])[1])
    header[last]["data_offsets"] = [i + 1 for i in header[last]["data_offsets"]]


def _overlap(header):
    first, second = [n for n in header if header[n].get("shape") == [CONFIG.hidden_size]][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


HEADERS = {
    "not JSON": (lambda h: b"{", "must be JSON"),
    "not UTF-8": (lambda h: b'{"\xff": 1}', "must be JSON"),
    "not an object": (lambda h: b"[1]", "must be a JSON object, got list"),
    "nested too deep": (lambda h: b"[" * 200_000, "must be JSON"),
    "duplicate tensor": (lambda h: b'{"a": 1, "a": 2}', "got duplicate key"),
    "NaN": (lambda h: b'{"a": NaN}', "got NaN or Infinity"),
    "huge integer": (lambda h: b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),
    "entry not an object": (lambda h: h.__setitem__(EMBED, 1), "must have dtype, shape and"),
    "extra key": (_set("bits", 1), "must have dtype, shape and data_offsets"),
    "no dtype": (lambda h: h[EMBED].pop("dtype"), "must have dtype, shape and"),
    "unknown dtype": (_set("dtype", "F4"), "dtype of .* must be one of"),
    "dtype not text": (_set("dtype", ["F32"]), "dtype of .* must be one of"),
    "negative dimension": (_set("shape", [-512, -64]), "shape of .* must be at most 8 integers"),
    "fractional dimension": (_set("shape", [512.0, 64]), "shape of .* must be at most 8"),
    "boolean dimension": (_set("shape", [True, 64]), "shape of .* must be at most 8"),
    "9 dimensions": (_set("shape", [1] * 9), "shape of .* must be at most 8"),
    "huge dimensions": (_set("shape", [2**30, 2**30]), "must have <= 1099511627776 elements"),
    "huge and empty": (_set("shape", [0, 2**50]), "must have <= 1099511627776 elements"),
    "short offsets": (_set("data_offsets", [0]), "data_offsets of .* must span"),
    "offsets not of the shape": (
        _set("data_offsets", [0, 4]),
        "data_offsets of .* must span 131072",
    ),
    "negative offsets": (_set("data_offsets", [-131072, 0]), "data_offsets of .* must span"),
    "a hole": (_one_byte_off, "without holes and overlaps"),
    "an overlap": (_overlap, "without holes and overlaps"),
    "other shape": (_set("shape", [64, 512]), r"must have shape \(512, 64\), got \(64, 512\)"),
    "other type": (
        lambda h: h[EMBED].update(dtype="F16", shape=[1024, 64]),
        r"must have shape \(512, 64\), got \(1024, 64\)",
    ),
    "integers": (_set("dtype", "I32"), "must be F32, F16 or BF16, got I32"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_bad_header(directory, nothing_allocated, fault):
    change, match = HEADERS[fault]
    _rewrite_header(_shard(directory), change)
    with pytest.raises(CheckpointError, match=match):
        load_state(directory, CONFIG)


def _truncate(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def _link_out(path):
    outside = path.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def _map_first(value):
    def change(index):
        index["weight_map"][next(iter(index["weight_map"]))] = value

    return lambda d: _edit_index(d, change)


FILES = {
    "empty file": (lambda d: _truncate(_shard(d), 0), "must be as long as its header says"),
    "7 bytes": (lambda d: _truncate(_shard(d), 7), "must be as long as its header says"),
    "header cut": (lambda d: _truncate(_shard(d), 100), "must be as long as its header says"),
    "data cut": (
        lambda d: _truncate(_shard(d), _shard(d).stat().st_size - 1),
        r"must have \d+ bytes as its header says",
    ),
    "data appended": (
        lambda d: _truncate(_shard(d), _shard(d).stat().st_size + 1),
        "with something appended",
    ),
    "header longer than any file": (
        lambda d: _shard(d).write_bytes(b"\xff" * 64),
        "must be as long as its header says",
    ),
    "sparse giant header": (
        lambda d: (
            _shard(d).write_bytes(struct.pack("<Q", 2**35)),
            _truncate(_shard(d), 2**35 + 8),
        ),
        "header of .* must be <= 104857600 bytes",
    ),
    "missing shard": (lambda d: _shard(d).unlink(), "must exist, got no such file"),
    "shard is a directory": (
        lambda d: (_shard(d).unlink(), _shard(d).mkdir()),
        "must be a regular file",
    ),
    "shard is a pipe": (
        lambda d: (_shard(d).unlink(), os.mkfifo(_shard(d))),
        "must be a regular file",
    ),
    "link out of the directory": (lambda d: _link_out(_shard(d)), "got a link out of it"),
    "link to itself": (
        lambda d: (_shard(d).unlink(), _shard(d).symlink_to(_shard(d).name)),
        "must exist, got no such file",
    ),
    "absolute path": (_map_first("/etc/a.safetensors"), "file names must be plain"),
    "parent path": (_map_first("../a.safetensors"), "file names must be plain"),
    "folder": (_map_first("a/b.safetensors"), "file names must be plain"),
    "backslash": (_map_first("a\\b.safetensors"), "file names must be plain"),
    "NUL": (_map_first("a\0.safetensors"), "file names must be plain"),
    "pickle shard": (_map_first("model.bin"), r"must be \.safetensors files, got 'model\.bin'"),
    "name not text": (_map_first(7), "must have an object weight_map of file names"),
    "empty index": (lambda d: _edit_index(d, lambda i: i["weight_map"].clear()), "got 0"),
    "no weight_map": (lambda d: _edit_index(d, lambda i: i.clear()), "an object weight_map"),
    "index not JSON": (lambda d: _edit_index(d, lambda i: "{"), "must be JSON"),
    "index with duplicates": (
        lambda d: _edit_index(d, lambda i: '{"weight_map": {"a": "b", "a": "c"}}'),
        "got duplicate key",
    ),
    "index names the other shard": (
        _map_first("model-00002-of-00002.safetensors"),
        "must be listed in model.safetensors.index.json under the file that holds it",
    ),
    "index does not know a tensor": (
        lambda d: _edit_index(d, lambda i: i["weight_map"].pop(EMBED) and None),
        "must be listed in",
    ),
    "index promises a tensor": (
        lambda d: _edit_index(
            d, lambda i: i["weight_map"].__setitem__("model.extra", _shard(d).name)
        ),
        "must hold 'model.extra' as",
    ),
    "only pickles": (
        lambda d: [p.rename(p.with_suffix(".bin")) for p in d.iterdir() if "model" in p.name],
        "must be safetensors, got pickle files",
    ),
    "nothing": (lambda d: [p.unlink() for p in d.iterdir()], "got 0 files and no index"),
    "shards without an index": (lambda d: (d / INDEX_NAME).unlink(), "got 2 files and no index"),
}


@pytest.mark.parametrize("fault", FILES)
def test_bad_files(directory, nothing_allocated, fault):
    change, match = FILES[fault]
    change(directory)
    with pytest.raises(CheckpointError, match=match):
        load_state(directory, CONFIG)


TENSORS = {
    "missing": (lambda s: s.pop("model.norm.weight"), r"none named 'model\.norm\.weight' and 0"),
    "unmapped": (
        lambda s: s.update({"model.layers.0.extra": torch.ones(1)}),
        r"must belong to the config's model, got 'model\.layers\.0\.extra'",
    ),
    "one layer too many": (
        lambda s: s.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
        "must belong to the config's model",
    ),
    "twice under two names": (
        lambda s: s.update({"language_model.model.norm.weight": torch.ones(64)}),
        r"'model\.norm\.weight' must be given once",
    ),
    "fp8 scales": (
        lambda s: s.update({"model.layers.1.feed_forward.w_scale": torch.ones(1)}),
        r"of FP8, weight_scale of projections is known",
    ),
    "very long name": (
        lambda s: s.update({"x" * 100_000: torch.ones(1)}),
        r"got 'x{93}\.\.\.'$",
    ),
    "float64": (
        lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}),
        "must be F32, F16 or BF16, got F64",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_bad_tensors(tmp_path, nothing_allocated, fault):
    change, match = TENSORS[fault]
    save_tiny_checkpoint(tmp_path, CONFIG, shards=1)
    _edit_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=match):
        load_state(tmp_path, CONFIG)


def test_total_bytes_are_limited(directory, nothing_allocated):
    total = 4 * CONFIG.parameter_counts()["text"]
    scan(directory, CONFIG, max_bytes=total)
    with pytest.raises(
        CheckpointError, match=f"declared bytes must be <= {total - 1}, got {total}"
    ):
        load_model(directory, Llama4, max_bytes=total - 1)


def test_numbers_of_shards_and_tensors_are_limited(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARDS", 1)
    with pytest.raises(CheckpointError, match=r"must have 1\.\.1 shards, got 2"):
        scan(directory, CONFIG)
    monkeypatch.setattr(checkpoint, "MAX_SHARDS", 2)
    # 24 tensors, 12 per file: the first limit is of a file, the second of all.
    for module, limit in ((safetensors_file, 11), (checkpoint, 23)):
        monkeypatch.setattr(module, "MAX_TENSORS", limit)
        with pytest.raises(CheckpointError, match=f"must have <= {limit} tensors"):
            scan(directory, CONFIG)
        monkeypatch.undo()


def test_config_of_another_model(directory, nothing_allocated):
    with pytest.raises(CheckpointError, match=r"must have shape \(512, 32\), got \(512, 64\)"):
        load_model(directory, Llama4, config=replace(CONFIG, hidden_size=32))
    with pytest.raises(CheckpointError, match="must belong to the config's model"):
        scan(directory, replace(CONFIG, tie_word_embeddings=False, moe_layers=()))
    with pytest.raises(CheckpointError, match="got none named"):
        scan(directory, replace(CONFIG, attention_bias=True))


def test_tied_checkpoint_may_repeat_the_head(tmp_path):
    config = tiny_scout(num_hidden_layers=1, tie_word_embeddings=True)
    save_tiny_checkpoint(tmp_path, config, shards=1)
    path = tmp_path / "model.safetensors"
    _edit_tensors(path, lambda s: s.update({"lm_head.weight": s[EMBED].clone()}))
    model = load_model(tmp_path, Llama4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _edit_tensors(path, lambda s: s.update({"lm_head.weight": torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must have shape \(512, 64\)"):
        load_model(tmp_path, Llama4)


def test_bad_config_file(tmp_path):
    with pytest.raises(CheckpointError, match="directory must exist"):
        load_config(tmp_path / "none")
    with pytest.raises(CheckpointError, match="'config.json' must exist"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for text, error, match in [
        ("{", CheckpointError, "config.json must be JSON"),
        ("[]", CheckpointError, "config.json must be a JSON object"),
        (" " * (2**20 + 1), CheckpointError, "config.json must be <= 1048576 bytes"),
        ("{}", ConfigError, "vocab_size must be given"),
    ]:
        path.write_text(text)
        with pytest.raises(error, match=match):
            load_config(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="got a link out of it"):
        load_config(tmp_path)


def test_messages_do_not_quote_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"password": hunter2}')
    with pytest.raises(CheckpointError) as error:
        load_config(tmp_path)
    assert "hunter2" not in str(error.value) and error.value.__cause__ is None


def test_file_that_shrinks_while_it_is_read(directory):
    state = load_state(directory, CONFIG)
    for number in (1, 2):
        _truncate(_shard(directory, number), 8)
    with pytest.raises(CheckpointError, match="must not change while it is read"):
        next(state)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_the_declared_error_or_loads(directory, seed):
    """Bytes flipped, removed and repeated in headers and index, 500 times."""
    rng = random.Random(seed)
    paths = [_shard(directory), _shard(directory, 2), directory / INDEX_NAME]
    originals = {path: path.read_bytes() for path in paths}
    refused = 0
    for _ in range(125):
        path = rng.choice(paths)
        data = bytearray(originals[path])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(min(len(data), 2000))
            action = rng.randrange(3)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                del data[at : at + rng.randrange(1, 50)]
            else:
                data[at:at] = data[at : at + rng.randrange(1, 50)]
        path.write_bytes(data)
        try:
            scan(directory, CONFIG)
        except CheckpointError:
            refused += 1
        path.write_bytes(originals[path])
    assert refused >= 100
