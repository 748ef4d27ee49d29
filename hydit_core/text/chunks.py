"""Prompts that are longer than an encoder takes, in chunks that do not break words."""

from __future__ import annotations

from collections.abc import Sequence

_WORD_START = "▁"
# Scripts that are written without spaces between words: (first, last) code points.
_SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def split(starts: Sequence[bool], room: int) -> list[tuple[int, int]]:
    """Cut tokens into ranges of at most ``room``, each as long as possible.

    ``starts[i]`` says whether token i begins a word: ranges end between words, unless a single word is longer
    than ``room``. Without tokens there is one empty range.
    """
    ranges = []
    begin = 0
    while len(starts) - begin > room:
        end = begin + room
        end = next((i for i in range(end, begin, -1) if starts[i]), end)
        ranges.append((begin, end))
        begin = end
    return [*ranges, (begin, len(starts))]


def piece_starts(pieces: Sequence[str]) -> list[bool]:
    """Which sentencepiece pieces begin a word: after a space, at punctuation, and in Chinese everywhere."""
    starts = []
    before = ""
    for piece in pieces:
        # A lone space mark belongs to the piece after it.
        marked = piece.startswith(_WORD_START)
        joined = before == _WORD_START or (_in_word(before[-1:]) and _in_word(piece[:1]))
        starts.append(marked or not joined)
        before = piece
    return starts


def _in_word(character: str) -> bool:
    if not character or not (character.isalnum() or character in "'’"):
        return False
    return not any(first <= ord(character) <= last for first, last in _SPACELESS)
