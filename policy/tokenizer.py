"""The tiny model's tokenizer: byte-level BPE, numbers apart, and a chat template that marks thinking and answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# what BPE never merges across: numbers, words, punctuation, other white space
PIECES = r"\d{1,2}| ?\p{L}+ ?| ?[^\p{L}\d\s]+ ?|\s"

# `{% generation %}` marks what the model itself writes, so that masks can be read off the template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train on `texts`; any text is encodable (256 byte tokens).

    Numbers are cut into pieces of at most two digits (DeepSeek-V3's own tokenizer cuts at three), so that a sum of
    small numbers is a lookup and not a carry. Spaces go to the words beside them, so that a number is one token
    wherever it stands.
    `<think>` and `</think>` are ordinary added tokens: they survive `skip_special_tokens=True`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, *ROLES.values()]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([THINK_OPEN, THINK_CLOSE])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
                                   chat_template=CHAT_TEMPLATE, model_max_length=max_length,
                                   clean_up_tokenization_spaces=False)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a checkpoint folder's tokenizer; FileNotFoundError when the folder has none.

    A tokenizer without a chat template cannot serve a post-training run, so that is an error as well.
    """
    folder = Path(folder)
    if folder.is_dir() and not any((folder / name).exists() for name in
                                   ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{folder}: no tokenizer in this checkpoint folder; copy tokenizer.json and "
                                "tokenizer_config.json of the model it was trained from into it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder}: its tokenizer has no chat template; add chat_template.jinja to the folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Iterable[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the assistant's turn, end-of-turn token included."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_samples(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]],
                   completions: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """`prompt_ids` and `completion_ids` of many samples at once, several times as fast.

    A sample without messages is plain text behind the token that begins texts.
    """
    texts = [tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
             if messages else tokenizer.bos_token for messages in conversations]
    if not texts:
        return []
    distinct = list(dict.fromkeys(texts))  # samples of a problem share theirs
    tokenizer("", add_special_tokens=False)  # turns off any padding and truncation that tokenizer.json asks for
    # without the places of tokens in the text, which `tokenizer(...)` finds as well
    encoded = [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(
        [*distinct, *completions], add_special_tokens=False)]
    prompts = dict(zip(distinct, encoded, strict=False))
    return [(prompts[text], [*ids, tokenizer.eos_token_id])
            for text, ids in zip(texts, encoded[len(distinct):], strict=True)]
