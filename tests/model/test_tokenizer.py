"""Tokenizers: Llama 4's own from the package llama-models, and a checkpoint's tokenizer.json."""

from __future__ import annotations

import base64
import importlib.util
import os
import subprocess
import sys

import pytest

from llama4_triton.model import tokenizer as module
from llama4_triton.model.checkpoint import CheckpointError
from llama4_triton.model.tokenizer import load_tokenizer, special_tokens

pytestmark = pytest.mark.no_kernels

TEXTS = [
    "Roses are red, violets are blue.",
    "It's 1234567 o'clock;\r\n\n  don't   panic!  ",
    "größer, 日本語のテキスト, \U0001f600 emoji, عربى",
    "def f(x):\n\treturn x ** 2  # why\n",
    "<|eot|> is text <|header_start|>system",
    "",
    " ",
]


@pytest.fixture(scope="module")
def llama4():
    if importlib.util.find_spec("llama_models") is None:
        pytest.skip("llama-models is not installed")
    return load_tokenizer(None)


def test_known_ids(llama4):
    assert llama4.encode("Roses are red,", bos=True) == [200000, 62, 19441, 583, 4242, 24]
    assert llama4.encode("Roses are red,") == [62, 19441, 583, 4242, 24]
    assert llama4.vocab_size == 202048
    assert (llama4.bos_id, llama4.pad_id) == (200000, 200018)
    assert llama4.stop_ids == (200001, 200007, 200008)


@pytest.mark.parametrize(
    "name, token",
    [
        ("fim_prefix", 200002),
        ("header_start", 200005),
        ("header_end", 200006),
        ("step", 200009),
        ("python_start", 200016),
        ("python_end", 200017),
        ("image_start", 200080),
        ("image_end", 200081),
        ("tile_x_separator", 200084),
        ("tile_y_separator", 200085),
        ("image", 200090),
        ("patch", 200092),
        ("reasoning_thinking_start", 201142),
        ("reasoning_thinking_end", 201143),
        ("reserved_special_token_903", 202047),
    ],
)
def test_special_ids(name, token):
    assert 200000 + special_tokens().index(f"<|{name}|>") == token


def test_there_are_2048_different_special_tokens():
    assert len(special_tokens()) == len(set(special_tokens())) == 2048


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(llama4, text):
    ids = llama4.encode(text)
    assert llama4.decode(ids) == text
    assert all(i < 200000 for i in ids)  # no special token comes out of plain text


def test_allowed_special(llama4):
    eot, header = llama4.special["<|eot|>"], llama4.special["<|header_start|>"]
    text = "<|eot|>a<|header_start|>"
    assert llama4.encode(text, allowed_special="all") == [eot, *llama4.encode("a"), header]
    some = llama4.encode(text, allowed_special={"<|eot|>"})
    assert some == [eot, *llama4.encode("a<|header_start|>")] and header not in some
    with pytest.raises(ValueError, match="allowed_special must be special tokens, got '<|nope|>'"):
        llama4.encode(text, allowed_special={"<|nope|>"})


def test_long_texts_are_cut_as_the_original_cuts_them(llama4, monkeypatch):
    monkeypatch.setattr(type(llama4), "MAX_PIECE", 50)
    monkeypatch.setattr(type(llama4), "MAX_RUN", 7)
    text = "aaaaaaaaaaaaaaaa  b          c" * 4
    pieces = list(llama4._pieces(text))
    assert pieces[:4] == ["aaaaaaa", "aaaaaaa", "aa  b       ", "   caaaaaa"]
    assert "".join(pieces) == text
    assert llama4.decode(llama4.encode(text)) == text


def test_same_as_the_original_code(llama4):
    original = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer.get_instance()
    assert module.PATTERN == original.O200K_PATTERN
    assert llama4.special == original.special_tokens
    for text in [*TEXTS, "a" * 30_000 + " " * 30_000 + "b", "x y " * 110_000]:
        assert llama4.encode(text) == original.encode(text, bos=False, eos=False)


def test_the_package_is_found_without_importing_it(llama4):
    code = (
        "import sys; from llama4_triton.model.tokenizer import load_tokenizer; load_tokenizer(); "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('llama_models', 'triton')]"
    )
    # TRITON_INTERPRET=1 would make the package install its interpreter shim.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def _tiktoken_file(path, ranks):
    lines = [base64.b64encode(token).decode() + f" {rank}" for token, rank in ranks]
    path.write_text("\n".join(lines) + "\n")


def test_tokenizer_model_of_a_checkpoint(tmp_path):
    pytest.importorskip("tiktoken")
    _tiktoken_file(tmp_path / "tokenizer.model", [(bytes([i]), i) for i in range(256)])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 256 + 2048
    assert tokenizer.encode("hi", bos=True) == [256, ord("h"), ord("i")]
    assert tokenizer.decode([0xFF, ord("a")]) == "\ufffda"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not base64! 0\n",
        "YQ==\n",
        "YQ== 0\nYg== 2\n",
        "YQ== 0\nYg== 0\n",
        "YQ== x\n",
        "\0" * 99,
    ],
    ids=["empty", "base64", "no-rank", "rank-skipped", "rank-twice", "rank-no-number", "binary"],
)
def test_bad_tokenizer_model(tmp_path, text):
    pytest.importorskip("tiktoken")
    (tmp_path / "tokenizer.model").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer.model must have lines of base64 and rank"):
        load_tokenizer(tmp_path)


@pytest.fixture
def json_directory(tmp_path):
    """A byte-level BPE tokenizer.json with Llama 4's special tokens, as Hugging Face writes it."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special_tokens()[:20])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_json(json_directory):
    tokenizer = load_tokenizer(json_directory)
    base = tokenizer.vocab_size - 20
    assert (tokenizer.bos_id, tokenizer.pad_id) == (base, base + 18)
    assert tokenizer.stop_ids == (base + 1, base + 7, base + 8)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=True)
        assert ids[0] == base and tokenizer.decode(ids[1:]) == text
        assert all(i < base for i in ids[1:])
    text = "<|eot|>a<|header_start|>b"
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode(text, allowed_special="all") == [base + 8, *a, base + 5, *b]
    some = tokenizer.encode(text, allowed_special={"<|eot|>"})
    assert some == [base + 8, *tokenizer.encode("a<|header_start|>b")]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "Nope"}}', "\ufffd"])
def test_bad_tokenizer_json(tmp_path, text):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer.json must be a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def test_no_begin_of_text(json_directory):
    path = json_directory / "tokenizer.json"
    path.write_text(path.read_text().replace("<|begin_of_text|>", "<|other|>"))
    tokenizer = load_tokenizer(json_directory)
    assert tokenizer.bos_id is None
    with pytest.raises(ValueError, match="must have <.begin_of_text.> for bos=True"):
        tokenizer.encode("a", bos=True)


def test_files_must_lie_in_the_directory(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "inside" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="got a link out of it"):
        load_tokenizer(tmp_path / "inside")
    with pytest.raises(CheckpointError, match="directory must exist"):
        load_tokenizer(tmp_path / "none")


def test_size_is_limited(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    (tmp_path / "tokenizer.model").write_text("x" * 11)
    with pytest.raises(CheckpointError, match="tokenizer.model must be <= 10 bytes"):
        load_tokenizer(tmp_path)


def test_missing_packages_give_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llama-models\)$"):
        load_tokenizer(None)
    for package, file in (("tiktoken", "tokenizer.model"), ("tokenizers", "tokenizer.json")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / file).write_text("{}")
        with pytest.raises(
            ModuleNotFoundError, match=rf"package {package} .*llama4-triton\[text\]"
        ):
            load_tokenizer(tmp_path)
