"""The tokenizer that a GGUF file describes in its metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from agevlm_mlx.errors import UserError

# ``tokenizer.ggml.token_type``
_CONTROL, _USER_DEFINED = 3, 4

#: Control tokens that end a text, besides the one the file names: llama.cpp stops at them too.
_ENDS = {
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
}


def _split(regex: str) -> PreTokenizer:
    return PreTokenizers(
        [
            Split(Regex(regex), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words(digits: str) -> str:
    """The split of GPT-4's family, which differs in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3, _QWEN2 = _split(_words(r"\p{N}{1,3}")), _split(_words(r"\p{N}"))
#: ``tokenizer.ggml.pre`` -> how text is cut before the merges.
_PRE: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "smollm": PreTokenizers([Digits(individual_digits=True), _GPT2]),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def build_tokenizer(metadata: Mapping[str, Any], where: object) -> PreTrainedTokenizerFast:
    """The tokenizer, with its special tokens, chat template and start of text.

    Byte-level vocabularies (``tokenizer.ggml.model`` gpt2) follow `_PRE`; sentencepiece ones
    (llama) are built by transformers. ``UserError`` for any other, since a wrong cut gives
    other tokens than the model was trained with and no error anywhere.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: expected tokenizer.ggml.tokens, a list of distinct texts")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, where)
    else:
        raise UserError(
            f"{where}: expected tokenizer.ggml.model gpt2 or llama, got {kind!r}; "
            "convert the original checkpoint instead"
        )
    types = metadata.get("tokenizer.ggml.token_type", [])
    # An entry spelled differently in the vocabulary (Gemma's runs of spaces) is no added token.
    added = [
        (t, k) for t, k in zip(tokens, types, strict=False) if backend.token_to_id(t) is not None
    ]
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in added if k == _CONTROL]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED])

    named = {}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("pad_token", "padding_token_id"),
        ("unk_token", "unknown_token_id"),
    ):
        number = metadata.get(f"tokenizer.ggml.{key}")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise UserError(f"{where}: tokenizer.ggml.{key} {number} is not one of {len(tokens)}")
        named[name] = tokens[number]
    _add_ends(backend, metadata, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(
            f"{metadata.get('general.architecture')}.context_length", int(1e30)
        ),
        **named,
    )


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids at which a text ends: the file's end of text first, then end of turn and the like."""
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type", [])
    for i, (token, kind) in enumerate(
        zip(metadata.get("tokenizer.ggml.tokens", []), types, strict=False)
    ):
        if kind == _CONTROL and token in _ENDS:
            ends.append(i)
    return list(dict.fromkeys(i for i in ends if i is not None))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: object) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise UserError(
            f"{where}: expected tokenizer.ggml.pre {', '.join(_PRE)}; got {pre!r}, whose way "
            "of splitting text is not known here; convert the original checkpoint instead"
        )
    merges = _stored_merges(metadata, where)
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            # Llama 3's vocabulary holds whole words that its merges do not lead to.
            ignore_merges=_PRE[pre] is _LLAMA3,
        )
    except Exception as error:  # the only kind that the tokenizers package raises
        raise UserError(f"{where}: tokens and merges do not fit: {error}") from None
    backend = Tokenizer(model)
    if _PRE[pre] is _QWEN2:
        backend.normalizer = normalizers.NFC()  # as in Qwen's own tokenizer
    backend.pre_tokenizer = _PRE[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _stored_merges(metadata: Mapping[str, Any], where: object) -> list[tuple[str, str]]:
    merges = [tuple(pair.split(" ")) for pair in metadata.get("tokenizer.ggml.merges", [])]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise UserError(f"{where}: expected tokenizer.ggml.merges, a list of pairs")
    return merges


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], where: object) -> Tokenizer:
    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    # Gemma's runs of spaces are stored as such, its tokenizer looks them up in this spelling.
    spelled = [t.replace(" ", "▁") if not t.strip(" ") else t for t in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    if gemma:  # its pieces stand in the order of their merges, its scores do not
        scores: Sequence[float] = [-i for i in range(len(spelled))]
    else:
        scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(spelled):
        raise UserError(f"{where}: expected a score for each of {len(spelled)} tokens")
    merges = []
    for token, score in zip(spelled, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges = [pair[3:] for pair in sorted(merges)]
    if gemma:
        return GemmaTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return LlamaTokenizer(vocab=vocab, merges=merges, add_prefix_space=prefix).backend_tokenizer


def _add_ends(backend: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Start (and end) of text around what is encoded, where the file wants it."""
    llama3 = _PRE.get(str(metadata.get("tokenizer.ggml.pre"))) is _LLAMA3
    default = metadata.get("tokenizer.ggml.model") == "llama" or llama3  # llama.cpp's
    bos = named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", default) else None
    eos = named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    if ends:
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
        backend.post_processor = TemplateProcessing(
            single=single, pair=pair, special_tokens=list(ends.items())
        )
