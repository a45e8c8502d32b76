"""Text to token ids and back, with Llama 4's 200000 base tokens and 2048 special ones.

Two sources: a checkpoint's `tokenizer.json` (read by the package `tokenizers`), or a tiktoken file
`tokenizer.model`, from the checkpoint or from the package `llama-models`, whose code is not
imported. The text of a special token in user input is encoded as plain text, so that a user cannot
end a turn or fake another speaker, unless the caller allows it.

Source: llama-models models/llama4/tokenizer.py (pattern, names and order of special tokens, limits
on the length of a piece).
"""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from .checkpoint import CheckpointError, file_in

__all__ = ["Tokenizer", "load_tokenizer", "special_tokens"]

MAX_FILE_BYTES = 128 * 2**20
NUM_SPECIAL = 2048

BOS, PAD = "<|begin_of_text|>", "<|finetune_right_pad|>"
STOP = ("<|end_of_text|>", "<|eom|>", "<|eot|>")

# The o200k pattern: words with at most one leading non-letter, case kept together, and
# contractions; numbers in groups of three digits; punctuation; line ends; spaces.
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

AllowedSpecial = Literal["all"] | Collection[str]


class Tokenizer(Protocol):
    """What both sources offer."""

    vocab_size: int
    special: dict[str, int]  # text -> id
    bos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]

    def encode(
        self, text: str, *, bos: bool = False, allowed_special: AllowedSpecial = ()
    ) -> list[int]:
        """Token ids of `text`, with the begin-of-text token in front if `bos`.

        Args:
            allowed_special: the special tokens whose text in `text` stands for the token; "all",
                or some of `special`. Every other one is encoded as the plain text it is.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


def load_tokenizer(directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, or Llama 4's own from the package `llama-models`.

    Args:
        directory: a checkpoint with tokenizer.json or tokenizer.model; None, or a directory with
            neither, takes the one of `llama-models`.
    Raises:
        CheckpointError: the file is malformed or lies outside the directory.
        ModuleNotFoundError: a package is missing; the message says which to install.
    """
    if directory is not None:
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"tokenizer: directory must exist, got {str(path)!r}")
        path = path.resolve()
        if (path / "tokenizer.json").is_symlink() or (path / "tokenizer.json").exists():
            return _JsonTokenizer(file_in(path, "tokenizer.json"))
        if (path / "tokenizer.model").is_symlink() or (path / "tokenizer.model").exists():
            return _TiktokenTokenizer(file_in(path, "tokenizer.model"))
    spec = importlib.util.find_spec("llama_models")  # finds the package without importing it
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location, "llama4", "tokenizer.model")
        if path.is_file():
            return _TiktokenTokenizer(path)
    raise ModuleNotFoundError(
        "tokenizer: the package llama-models must be installed, or the checkpoint must have "
        "tokenizer.json, got neither (pip install --no-deps llama-models)"
    )


def special_tokens() -> list[str]:
    """The 2048 special tokens in the order of their ids, which follow the base tokens."""

    def reserved(family: str, start: int, stop: int) -> list[str]:
        return [f"<|{family}_reserved_special_token_{i}|>" for i in range(start, stop)]

    def named(*names: str) -> list[str]:
        return [f"<|{name}|>" for name in names]

    tokens = [
        *named("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *named("header_start", "header_end", "eom", "eot", "step"),
        *reserved("text_post_train", 0, 6),
        *named("python_start", "python_end", "finetune_right_pad"),
        *reserved("text_post_train", 8, 69),
        *named("image_start", "image_end"),
        *reserved("vision", 0, 2),
        *named("tile_x_separator", "tile_y_separator"),
        *reserved("vision", 2, 6),
        *named("image"),
        *reserved("vision", 6, 7),
        *named("patch"),
        *reserved("vision", 7, 1048),
        *reserved("reasoning", 0, 8),
        *named("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    return tokens + [f"<|reserved_special_token_{i}|>" for i in range(NUM_SPECIAL - len(tokens))]


def _allowed(allowed: AllowedSpecial, special: dict[str, int]) -> set[str]:
    if allowed == "all":
        return set(special)
    unknown = sorted(set(allowed) - set(special))
    if unknown:
        raise ValueError(f"tokenizer: allowed_special must be special tokens, got {unknown[0]!r}")
    return set(allowed)


def _with_bos(ids: list[int], bos: bool, bos_id: int | None) -> list[int]:
    if not bos:
        return ids
    if bos_id is None:
        raise ValueError(f"tokenizer: the vocabulary must have {BOS} for bos=True, got none")
    return [bos_id, *ids]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tokenizer: the package {module} must be installed, got {error} "
            "(pip install 'llama4-triton[text]')"
        ) from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"tokenizer: {path.name} must be <= {MAX_FILE_BYTES} bytes, got more")
    return data


class _TiktokenTokenizer:
    """Base tokens from lines "base64 rank", ranks 0, 1, ...; special tokens by `special_tokens`."""

    # tiktoken panics on longer pieces, and takes quadratic time on longer runs.
    MAX_PIECE, MAX_RUN = 400_000, 25_000

    def __init__(self, path: Path) -> None:
        tiktoken = _import("tiktoken")
        ranks: dict[bytes, int] = {}
        data = _read(path)
        try:
            for line in data.splitlines():
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            ranks = {}
        if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
            raise CheckpointError(
                f"tokenizer: {path.name} must have lines of base64 and rank, each rank once from "
                "0, got something else"
            )
        self.special = {name: len(ranks) + i for i, name in enumerate(special_tokens())}
        self.vocab_size = len(ranks) + NUM_SPECIAL
        self.bos_id: int | None = self.special[BOS]
        self.pad_id: int | None = self.special[PAD]
        self.stop_ids = tuple(self.special[name] for name in STOP)
        try:
            self._encoding = tiktoken.Encoding(
                name=path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special
            )
        except ValueError as error:
            raise CheckpointError(f"tokenizer: {path.name} must be readable, got {error}") from None

    def encode(
        self, text: str, *, bos: bool = False, allowed_special: AllowedSpecial = ()
    ) -> list[int]:
        allowed = _allowed(allowed_special, self.special)
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return _with_bos(ids, bos, self.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut `text` where it is longer than tiktoken takes; as llama-models cuts it."""
        for block in range(0, len(text), self.MAX_PIECE):
            part, start = text[block : block + self.MAX_PIECE], 0
            for run in re.finditer(r"\s+|\S+", part):
                for cut in range(run.start() + self.MAX_RUN, run.end(), self.MAX_RUN):
                    yield part[start:cut]
                    start = cut
            yield part[start:]


class _JsonTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        tokenizers = _import("tokenizers")
        text = _read(path).decode("utf-8", errors="replace")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception:  # the package raises bare Exception
            raise CheckpointError(
                f"tokenizer: {path.name} must be a Hugging Face tokenizer, got something else"
            ) from None
        # Special tokens in the text are plain text; encode() puts the allowed ones in itself.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self.special.get(BOS)
        self.pad_id = self.special.get(PAD)
        self.stop_ids = tuple(self.special[name] for name in STOP if name in self.special)

    def encode(
        self, text: str, *, bos: bool = False, allowed_special: AllowedSpecial = ()
    ) -> list[int]:
        allowed = sorted(_allowed(allowed_special, self.special), key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, allowed)) + ")", text) if allowed else [text]
        ids: list[int] = []
        for i, part in enumerate(parts):  # re.split puts the separators at odd places
            if i % 2:
                ids.append(self.special[part])
            elif part:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return _with_bos(ids, bos, self.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
