"""Tokenizer of the embedded world: byte-level BPE trained on its captions.

Its files are those of transformers' CLIPTokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

CONTEXT = 32
SIZE = 4096  # tokens, including single bytes and the two marks
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # CLIPTokenizer's pattern


def train(texts: Iterable[str], folder: Path, size: int = SIZE) -> int:
    """Train on texts and write the tokenizer's files; -> number of tokens.

    The files are vocab.json, merges.txt and the tokenizer's own. As in CLIP, the first 512 tokens are the bytes, within
    and at the end of a word. Then come the merges, by frequency, and the marks of start and end. A rare name stays in
    several pieces, which other names share.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    pieces = list(dict.fromkeys([*alphabet, *(b + "</w>" for b in alphabet), *(a + b for a, b in merges)]))
    over = max(0, len(pieces) + 2 - size)  # end-of-word bytes absent from captions; they displace the last merges
    pieces, merges = pieces[: len(pieces) - over], merges[: len(merges) - over]
    vocabulary = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("tokenizer*.json"):  # transformers would read it instead of the new vocabulary
        stale.unlink()
    vocab = {piece: i for i, piece in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT).save_pretrained(folder)
    return len(vocabulary)
