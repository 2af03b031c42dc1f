"""Convert a Hugging Face tokenizer to the vocabulary of a GGUF file.

llama.cpp implements several ways to split text and selects one by name. The name is detected from the tokenizer's
pattern; an unknown pattern is refused, because a wrong name would go unnoticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cfsp_framework.errors import ModelError

# Kinds of tokens, numbered as in llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+", r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*"
_TAIL_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join([*_WORDS, r"\p{N}", _TAIL_SLASH])
_GPT4O = "|".join([*(word + _CONTRACTIONS + "?" for word in _WORDS), r"\p{N}{1,3}", _TAIL_SLASH])
_DIGITS = r"\p{N}"

_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
"""llama.cpp's names, by the patterns that split text and whether whole words are looked up before merging."""


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a tokenizer, as it is written to a GGUF file."""

    model: str
    """``gpt2`` for byte-level BPE, ``llama`` for SentencePiece."""
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    """Of ``llama`` only: the pair with the highest score is merged first."""
    merges: tuple[str, ...] = ()
    """Of ``gpt2`` only."""
    space_prefix: bool = False
    add_bos: bool = False
    add_eos: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    """Ids by role: bos, eos, unk, pad, eot."""
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


def read_vocabulary(
    tokenizer: Any, size: int, *, pre_tokenizer: str | None = None, ends: Sequence[int] = ()
) -> Vocabulary:
    """Convert ``tokenizer`` for a model with ``size`` rows of embeddings.

    ``ends`` are further ids that end a text, from the generation configuration.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind, or no known way to split text like it.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("the tokenizer is not one of the tokenizers library, so it cannot be converted.")
    settings: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is a {model['type']} model; BPE and SentencePiece's BPE can be written.")
    tokens, kinds = _tokens(settings, size)
    common = {**_specials(tokenizer, ends), "chat_template": _template(tokenizer)}
    if model.get("byte_fallback"):
        return _sentencepiece(settings, tokens, kinds, common)
    return _byte_level(settings, tokens, kinds, common, pre_tokenizer)


def _tokens(settings: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the text and kind of every id; an id without a token is unused."""
    model = settings["model"]
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for text, index in model["vocab"].items():
        if index < size:
            tokens[index], kinds[index] = text, NORMAL
            if model.get("byte_fallback") and _BYTE.fullmatch(text):
                kinds[index] = BYTE
    for added in settings["added_tokens"]:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token") or "", -1)
    if 0 <= unknown < size:
        kinds[unknown] = UNKNOWN
    return tokens, kinds


def _specials(tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """Return the special ids by role, and which of them the tokenizer adds around a text."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    special = {role: int(index) for role, index in ids.items() if index is not None}
    other_ends = [index for index in ends if index != special.get("eos")]
    if other_ends:
        special["eot"] = other_ends[0]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    wrong = [
        *([] if before in ([], [special.get("bos")]) else before),
        *([] if after in ([], [special.get("eos")]) else after),
    ]
    notes = (f"the tokenizer puts the tokens {wrong} around a text and llama.cpp does not",) if wrong else ()
    return {"special": special, "add_bos": bool(before), "add_eos": bool(after), "notes": notes}


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _byte_level(
    settings: Mapping[str, Any], tokens: list[str], kinds: list[int], common: dict[str, Any], pre_tokenizer: str | None
) -> Vocabulary:
    model = settings["model"]
    notes = list(common.pop("notes"))
    if settings.get("normalizer"):
        kind = settings["normalizer"]["type"]
        if kind not in ("NFC", "NFKC", "NFD", "NFKD"):
            raise ModelError(f"the tokenizer changes text first ({kind}), which llama.cpp does not do for its kind.")
        notes.append(f"the tokenizer normalises text ({kind}) and llama.cpp does not; most text is normalised already")
    pre = pre_tokenizer or _name_splitting(settings, ignore_merges=bool(model.get("ignore_merges")))
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        merges=tuple(" ".join(pair) for pair in _merges(model)),
        notes=tuple(notes),
        **common,
    )


def _name_splitting(settings: Mapping[str, Any], *, ignore_merges: bool) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text."""
    first = settings.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    patterns = list[str]()
    for part in parts:
        match part.get("type"):
            case "Split" if part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
                patterns.append(part["pattern"]["Regex"])
            case "Digits" if part["individual_digits"]:
                patterns.append(_DIGITS)
            case "ByteLevel" if not part["add_prefix_space"]:
                patterns += [_GPT2] if part["use_regex"] else []
            case other:
                raise ModelError(f"the tokenizer splits text by {other or 'nothing'}; {_REMEDY}")
    name = _PRE_TOKENIZERS.get((tuple(patterns), ignore_merges))
    if name is None:
        raise ModelError(f"llama.cpp's name for how the tokenizer splits text is not known ({patterns}); {_REMEDY}")
    return name


_REMEDY = "give it with --pre-tokenizer: llama.cpp's convert_hf_to_gguf_update.py lists the names by model."


def _sentencepiece(
    settings: Mapping[str, Any], tokens: list[str], kinds: list[int], common: dict[str, Any]
) -> Vocabulary:
    merges, notes = _merges(settings["model"]), list(common.pop("notes"))
    ranks = {text: rank for rank, text in enumerate(dict.fromkeys(left + right for left, right in merges))}
    texts = (
        token.replace(_SPACE, " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, kinds, strict=True)
    )
    least, space_prefix = -float(len(ranks) + 1), _prepends_space(settings)
    if settings.get("pre_tokenizer") is not None and space_prefix:  # Metaspace adds a space only if there is none
        notes.append("a text that begins with a space begins with two of them in llama.cpp")
    if not _are_scores_enough(settings["model"], merges):
        notes.append(
            "the tokenizer's merges are not those of SentencePiece: llama.cpp may split some words differently"
        )
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(texts),
        kinds=tuple(kinds),
        scores=tuple(-float(ranks[token]) if token in ranks else least for token in tokens),
        space_prefix=space_prefix,
        notes=tuple(notes),
        **common,
    )


def _prepends_space(settings: Mapping[str, Any]) -> bool:
    """Return whether a space is added before the first word.

    Raises:
        ModelError: spaces are not treated as in SentencePiece.
    """
    normalizer, splitter = settings.get("normalizer"), settings.get("pre_tokenizer")
    if splitter is not None:
        if splitter["type"] != "Metaspace" or normalizer is not None or splitter["replacement"] != _SPACE:
            raise ModelError(f"the tokenizer splits text by {splitter['type']}, which SentencePiece does not.")
        return bool(splitter["prepend_scheme"] != "never")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    contents = [(step["type"], step.get("prepend") or step.get("content")) for step in steps]
    if contents not in ([("Replace", _SPACE)], [("Prepend", _SPACE), ("Replace", _SPACE)]):
        raise ModelError(f"the tokenizer changes text first ({[kind for kind, _ in contents]}), unlike SentencePiece.")
    return len(contents) == 2


def _are_scores_enough(model: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> bool:
    """Return whether merging by scores gives the same tokens as ``merges``.

    It does not if the merges into a token are not consecutive, or if two tokens that form a third may not be merged.
    """
    vocabulary, known = model["vocab"], set(merges)
    merged = [left + right for left, right in merges]
    scattered = len(set(merged)) < sum(a != b for a, b in pairwise(["", *merged]))
    reachable = ({character for token in vocabulary for character in token} | {*merged}) & vocabulary.keys()
    special = {model.get("unk_token"), *(token for token in vocabulary if _BYTE.fullmatch(token))}
    missing = any(
        token[:cut] in reachable and token[cut:] in reachable and (token[:cut], token[cut:]) not in known
        for token in vocabulary.keys() - special
        for cut in range(1, len(token))
    )
    return not (scattered or missing)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]
