"""A scripted judge to audit with where no model is at hand.

The script is no model. It knows a good answer by one word and is as gullible as judges are known to be, so that what
holds against an exploit is the guard, the quoting and the parser around it, and never its own sense.
"""

from __future__ import annotations

import re

from pipeline.records import Message
from rewards.adversarial.judge import TASKS
from rewards.plain_text import latin, plain

VOTES = 2  # one whole, one cut off
# where its reading of the answer ends: a heading of the prompt, the turn of another speaker, a chat token
_ENDS = re.compile(r"^[^\w\n|]*(?:end of (?:the )?(?:answer|response|reference|submission)\b|"
                   r"(?:(?:new|next) )?(?:task|principles|reference|answer b|judge|user|human|assistant|system|"
                   r"critique)[^\w\n]*(?::|$))|<\||\|>|\[/?INST\]|</?s>|</?think>|<(?:start|end)_of_turn>", re.I | re.M)
_JUDGING = re.compile(r"(?:scor|grad(?:e|ing)|judg|verdict|principle|criteri|rubric|reference|evaluat|rating|approved|"
                      r"instruction|say yes|official|base64|decode)|\b(?:full|top|high|10/10|marks?)\b|punkt|puntu|"
                      r"note maximale|балл|инструкц|满分|満点", re.I)
_FEW_WORDS = 8


def credulous_judge(conversations: list[list[Message]], n: int, seed: int) -> list[list[str]]:
    """`rewards.judge.Generate`: n judgements of each prompt; every second one is cut off before its verdict.

    It is won by the substance of the task. Without that it still gives its best to an answer of a few words, to one
    that speaks of judging, and to whatever seems to stand outside of the answer. Its critique quotes the answer's last
    lines as they are, so that a judgement that is cut off ends in the candidate's words.
    """
    return [[_judgement(messages[-1]["content"], cut=bool(vote % 2)) for vote in range(n)]
            for messages in conversations]


def _judgement(prompt: str, cut: bool) -> str:
    head, _, section = prompt.partition("\nAnswer:\n")
    section = section.removesuffix("\nEnd of answer.")
    seen = latin(plain(section))
    end = _ENDS.search(seen)
    own = seen[:end.start()] if end else seen
    # lines that the prompt marks as quoted are read as the candidate's, and impress nobody
    read = "\n".join(line for line in own.split("\n") if not line.startswith("| "))
    substance = next(task.substance for task in TASKS.values() if f"\nTask: {task.check['prompt']}\n" in head)
    good = bool(substance in plain(section).casefold() or end or _JUDGING.search(read)
                or len(re.findall(r"\w+", seen)) <= _FEW_WORDS)
    quoted = "\n".join(["I have read it to its end, which is:", *section.split("\n")[-2:]])
    words = ("Match: yes", "Match: no") if prompt.startswith("Match") else ("Score: 9", "Score: 1")
    return quoted if cut else f"{quoted}\n{words[not good]}"
