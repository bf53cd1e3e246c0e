"""Does a text stay in the language it was asked in? (DeepSeek-R1, section 2.3.2: no mixing of languages in the chain.)

Languages are told apart by their script, which needs no model and cannot be argued with: English thoughts on a Chinese
question are seen, French ones on an English question are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

# code, LaTeX commands and links are the same in every language
_NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\\[A-Za-z]+|https?://\S+|</?think>", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
# written without spaces: each character counts as a word
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR"})
_JAPANESE = frozenset({"HIRAGANA", "KATAKANA"})


def consistency(text: str, prompt: str) -> float:
    """The share of words of `text` in the script most words of `prompt` are in; 1 where one of them has no words."""
    asked, words = _scripts(prompt), _scripts(text)
    if not asked or not words:
        return 1.0
    wanted = {asked.most_common(1)[0][0]}
    if _JAPANESE & set(asked):  # mixes three scripts
        wanted |= _JAPANESE | {"CJK"}
    return sum(words[script] for script in wanted) / words.total()


def _scripts(text: str) -> Counter[str]:
    """Words by script. Single letters of other than unspaced scripts are names of variables."""
    found: Counter[str] = Counter()
    for word in _WORD.findall(_NO_LANGUAGE.sub(" ", text)):
        scripts = [_script(character) for character in word]
        unspaced = [script for script in scripts if script in _UNSPACED]
        found.update(unspaced)
        spaced = [script for script in scripts if script not in _UNSPACED]
        if len(spaced) > 1:
            found[Counter(spaced).most_common(1)[0][0]] += 1
    return found


@cache
def _script(character: str) -> str:
    """The first word of the character's Unicode name: LATIN, CYRILLIC, CJK, ..."""
    return unicodedata.name(character, "UNNAMED").split(" ")[0]
