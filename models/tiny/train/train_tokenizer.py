"""Trains the byte-level BPE tokenizer and writes the token streams of the corpus.

    python train_tokenizer.py --work DIR --out ..

Writes OUT/tokenizer.json, DIR/train.bin and DIR/validation.bin (uint16 ids; <|endoftext|> before
every document).
"""

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import DOC_SEPARATOR

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
# Contractions; words with their leading space; up to three digits; punctuation; line ends; spaces.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def train(text: list[str]) -> Tokenizer:
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, docs: list[str], batch: int = 1000) -> np.ndarray:
    """uint16 ids of all documents, each after one <|endoftext|>."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = []
    for first in range(0, len(docs), batch):
        for encoding in tokenizer.encode_batch_fast(docs[first : first + batch]):
            parts.append(np.array([end, *encoding.ids], dtype=np.uint16))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    splits = {
        name: (args.work / f"{name}.txt").read_bytes().decode().split(DOC_SEPARATOR)
        for name in ("train", "validation")
    }
    tokenizer = train(splits["train"])
    tokenizer.save(str(args.out / "tokenizer.json"))
    for name, docs in splits.items():
        ids = encode(tokenizer, docs)
        ids.tofile(args.work / f"{name}.bin")
        num_bytes = sum(len(d.encode()) for d in docs)
        print(f"{name}: {len(ids)} tokens, {num_bytes / len(ids):.3f} bytes per token")


if __name__ == "__main__":
    main()
