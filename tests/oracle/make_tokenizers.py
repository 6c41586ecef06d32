"""Writes the tokenizer goldens: ids by HF `tokenizers`, for the bundled tokenizer and other styles.

    python make_tokenizers.py [--out golden]

OUT/tokenizer_cases.json belongs to models/tiny/tokenizer.json; OUT/tokenizers/<style>/ holds a
small tokenizer.json of that style beside its cases.json. A case: text, ids without the
post-processor's special tokens, and what the ids decode to without special tokens.
"""

import argparse
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tokenizer_texts import TEXTS, with_added

TINY_DIR = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB_SIZE = 560

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS_WITHOUT_MERGE = {"Ġthe", "Ġof", "Ġand", "ing"}
CJK_REGEX = r"[一-龥぀-ゟ゠-ヿ]+"


def byte_level(add_prefix_space: bool = False, use_regex: bool = False) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split_then_bytes(*patterns: str) -> pre_tokenizers.Sequence:
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns]
    return pre_tokenizers.Sequence([*splits, byte_level()])


def train(
    pre_tokenizer: pre_tokenizers.PreTokenizer, ignore_merges: bool = False, nfc: bool = False
) -> Tokenizer:
    """A small BPE over the held-out text, with some merges for the other scripts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (TINY_DIR / "test.txt").read_text().splitlines(keepends=True)
    tokenizer.train_from_iterator(text[:600] + TEXTS * 8, trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = train(byte_level(use_regex=True))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def gpt2_prefix_space() -> Tokenizer:
    """Added tokens that swallow the spaces beside them, and one that must stand alone."""
    tokenizer = train(byte_level(add_prefix_space=True, use_regex=True))
    tokenizer.add_special_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("<pad>", rstrip=True)]
    )
    tokenizer.add_tokens([AddedToken("lone", single_word=True, normalized=False)])
    return tokenizer


def llama3() -> Tokenizer:
    """Whole words are looked up before merging: some here have lost the merge that makes them."""
    tokenizer = train(split_then_bytes(LLAMA3_REGEX), ignore_merges=True)
    fields = json.loads(tokenizer.to_str())
    fields["model"]["merges"] = [
        m for m in fields["model"]["merges"] if "".join(m) not in WORDS_WITHOUT_MERGE
    ]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    return tokenizer


def qwen() -> Tokenizer:
    """NFC; added tokens that are special, and ones that are not."""
    tokenizer = train(split_then_bytes(QWEN_REGEX), nfc=True)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("<think>s", normalized=False)]
    )
    return tokenizer


def split_sequence() -> Tokenizer:
    """Several splits in a row, as DeepSeek does it: digits, then CJK runs, then words."""
    tokenizer = train(split_then_bytes(r"\p{N}{1,3}", CJK_REGEX, LLAMA3_REGEX))
    tokenizer.add_special_tokens(["<｜end▁of▁sentence｜>"])
    return tokenizer


STYLES = {  # style -> (maker, added tokens to try)
    "gpt2": (gpt2, ["<|endoftext|>"]),
    "gpt2_prefix_space": (gpt2_prefix_space, ["<mask>", "<pad>", "lone"]),
    "llama3": (llama3, ["<|begin_of_text|>", "<|eot_id|>"]),
    "qwen": (qwen, ["<|im_start|>", "<think>"]),
    "split_sequence": (split_sequence, ["<｜end▁of▁sentence｜>"]),
}


def write_cases(tokenizer: Tokenizer, texts: list[str], path: Path) -> None:
    lines = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        lines.append(json.dumps({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def save(tokenizer: Tokenizer, path: Path, merges_as_strings: bool) -> None:
    """Compact JSON; merges as pairs (as written today) or as strings (as written for years)."""
    fields = json.loads(tokenizer.to_str())
    if merges_as_strings:
        fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    path.write_text(json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    out = parser.parse_args().out
    tiny = Tokenizer.from_file(str(TINY_DIR / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    write_cases(tiny, TEXTS + with_added("<|endoftext|>"), out / "tokenizer_cases.json")
    for style, (make, added) in STYLES.items():
        style_dir = out / "tokenizers" / style
        style_dir.mkdir(parents=True, exist_ok=True)
        save(make(), style_dir / "tokenizer.json", merges_as_strings=style.startswith("gpt2"))
        reloaded = Tokenizer.from_file(str(style_dir / "tokenizer.json"))
        write_cases(
            reloaded,
            TEXTS + [t for token in added for t in with_added(token)],
            style_dir / "cases.json",
        )


if __name__ == "__main__":
    main()
