"""Compare this project's reading of a GGUF file with llama.cpp's: token ids and greedy text.

    pip install llama-cpp-python gguf
    python scripts/compare_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --widen

Prints each difference and how much agrees; exit status 1 when token ids differ. llama.cpp
rounds activations to 8 bits before it multiplies quantised weights, so logits are close and not
equal, and where two tokens are nearly level a text goes another way: the lead of the token
taken is printed for such a place. With --widen llama.cpp gets the same weights as float32, which
leaves no such room.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import agevlm_mlx  # noqa: F401  (before mlx: it opens the fast BLAS)

# isort: split
import gguf
import llama_cpp  # pyright: ignore[reportMissingImports]
import mlx.core as mx
import numpy as np
from agevlm_convert.gguf import read_gguf  # pyright: ignore[reportMissingImports]
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

TEXTS = (
    "",
    " ",
    "Hello world",
    "  two leading spaces, two trailing  ",
    "a   b    c\t\td",
    "one\ntwo\n\nthree\r\nfour\n\n\n",
    "12345 1,234.56 0x1F 3.14159 2026-11-22",
    "x1y22z333 v2.0.1",
    "½ ² ٣٤ 一二三 Ⅷ ①",
    "I'm you're they'll we've he'd IT'S",
    "naïve café Zürich œuvre",
    "cafe\u0301 and café",
    "Привет, как дела?",
    "日本語のテキスト と 한국어",
    "مرحبا بالعالم שלום",
    "नमस्ते दुनिया",
    "😀👩‍👩‍👧🇩🇪 ❤️",
    "def f(x):\n    return x ** 2  # square\n",
    '<div class="a">&nbsp;</div>',
    "https://example.org/a_b?c=d&e=%20#f",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|endoftext|>b <|im_end|> c",
    "<|im_start|> <|unknown|> <im_start>",
    "\u00a0no\u200bbreak\ufeff \u2028line",
    "ALLCAPS CamelCase snake_case kebab-case",
    "!!!???...---___***$$$",
)
PLAIN = ("The dog and the cat are", "Once upon a time", "def fibonacci(n):", "1, 2, 3, 4,")
QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Write one sentence about a red apple.",
    "How many legs does a spider have?",
)


def ours_generate(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    found: list[int] = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=count):
        if int(token) in ends:
            break
        found.append(int(token))
    return found


def theirs_generate(llm: llama_cpp.Llama, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    llm.reset()
    for token in llm.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or len(found) == count:
            break
        found.append(int(token))
    return found


def theirs_logits(llm: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


def widen(source: Path, target: Path) -> None:
    """A copy of a GGUF file with every tensor as float32, dequantised by the `gguf` package."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        element = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(path: Path, their_path: Path, texts: tuple[str, ...], count: int) -> int:
    found = read_gguf(path)
    model_class, arguments = _get_classes(found.text_config)
    model = model_class(arguments.from_dict(found.text_config))
    weights = found.weights
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    ends = found.text_config.get("eos_token_id", [])
    ends = set(ends if isinstance(ends, list) else [ends])
    kind = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(
        str(their_path),
        n_ctx=512,
        n_threads=2,
        logits_all=True,
        verbose=False,
        type_k=kind,
        type_v=kind,
    )
    tokenizer = found.tokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    chats = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        )
        for question in (QUESTIONS if tokenizer.chat_template else ())
    ]
    equal = 0
    for text in (*texts, *chats):
        ours = encode(text)
        theirs = llm.tokenize(text.encode(), add_bos=True, special=True)
        equal += ours == theirs
        if ours != theirs:
            print(f"tokens of {text!r} differ:\n  ours   {ours}\n  theirs {theirs}")
    total = len(texts) + len(chats)
    print(f"token ids: {equal} of {total} texts equal")

    vocab = llama_cpp.llama_n_vocab(llm._model.vocab)
    stops = {i for i in range(vocab) if llama_cpp.llama_vocab_is_eog(llm._model.vocab, i)}
    print(f"end tokens: ours {sorted(ends)}, theirs {sorted(stops)}")

    same = 0
    for prompt in (*PLAIN, *chats):
        ids = encode(prompt)
        ours, theirs = ours_generate(model, ids, count, ends), theirs_generate(llm, ids, count)
        same += ours == theirs
        if ours == theirs:
            print(f"{prompt[-40:]!r}: {len(ours)} tokens equal: {tokenizer.decode(ours)!r}")
            continue
        pairs = zip(ours, theirs, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        logits = np.array(model(mx.array([ids + ours[:at]]))[0, -1])
        high = np.sort(logits)[-2:]
        print(
            f"{prompt[-40:]!r}: differ after {at} tokens, where ours leads by "
            f"{high[1] - high[0]:.3f} logits\n  ours   {tokenizer.decode(ours)!r}\n"
            f"  theirs {tokenizer.decode(theirs)!r}"
        )
    print(f"greedy text: {same} of {len(PLAIN) + len(chats)} prompts equal ({count} tokens)")

    ids = encode(chats[0] if chats else PLAIN[1])
    ours, theirs = np.array(model(mx.array([ids]))[0]), theirs_logits(llm, ids)
    error = np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)
    top = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(
        f"logits of {len(ids)} positions: relative error at most {error.max():.2e}, "
        f"mean {error.mean():.2e}; the same token on top in {top:.1%}"
    )
    return int(equal != total)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="GGUF file")
    parser.add_argument("--max-tokens", type=int, default=40, help="default: 40")
    parser.add_argument(
        "--widen", action="store_true", help="give llama.cpp a temporary float32 copy of the file"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = args.path
        if args.widen:
            theirs = Path(folder) / "float32.gguf"
            widen(args.path, theirs)
        return compare(args.path, theirs, TEXTS, args.max_tokens)


if __name__ == "__main__":
    sys.exit(main())
