"""The two small tokenizers: a WordPiece vocabulary for BERT, a SentencePiece model for mT5.

SentencePiece training is not reproducible to the byte, so the files that were trained once are kept in
``tokenizers/`` and go into the model; this is how they were made.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import sentencepiece

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Words that users try although no caption has them: each stays one token, whether or not the model knows it.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")


def is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def words_of(captions: list[str]) -> tuple[Counter[str], Counter[str]]:
    """English words and Chinese characters with their counts."""
    english: Counter[str] = Counter(word for word in COLOURS for _ in range(50))
    chinese: Counter[str] = Counter()
    for caption in captions:
        english.update(re.findall(r"[a-z0-9]+", caption.lower()))
        chinese.update(filter(is_chinese, caption))
    return english, chinese


def write_vocabulary(captions: list[str], path: Path) -> None:
    """WordPiece: the special tokens, every word, every Chinese character, letters to spell the rest."""
    english, chinese = words_of(captions)
    pieces = [*LETTERS, *("##" + letter for letter in LETTERS), *"-'.,!?:;()，。！？、"]
    words = [word for word, _ in english.most_common() if word not in LETTERS]
    path.write_text(
        "\n".join([*SPECIAL, *pieces, *words, *(c for c, _ in chinese.most_common())]) + "\n", "utf-8"
    )


def train_spiece(captions: list[str], path: Path) -> None:
    """Whole English words, single Chinese characters, letters for the rest.

    Ids as T5's: pad 0, end 1, unknown 2.

    By default the trainer splits "red" and merges whole Chinese phrases, and then words do not combine.
    """
    english, chinese = words_of(captions)
    cased = {word for caption in captions for word in re.findall(r"[A-Za-z0-9]+", caption)}
    whole = sorted("\u2581" + word for word in cased | set(english) if len(word) > 1) + sorted(chinese)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=len(whole) + 200,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=whole,
        required_chars="".join(LETTERS),
        normalization_rule_name="nmt_nfkc_cf",  # capital letters make no difference here
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink(missing_ok=True)
