import random

import pytest
from tiny_models import tiny_tokenizer

from policy.tokenizer import completion_ids, encode_samples, load_tokenizer, prompt_ids, train_tokenizer

CONVERSATION = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+2"},
                {"role": "assistant", "content": "<think>\n3"}, {"role": "user", "content": "k"},
                {"role": "assistant", "content": "ok"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def random_text(rng: random.Random) -> str:
    ranges = ((0x00, 0x7F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_any_text_comes_back_from_its_tokens(tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)]
    texts += ["", " ", "\n\n", "  a  b ", "a\r\nb\tc", "don 't , stop !", "\u0000", "e\u0301 \u00e9", "2024-01-01"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_small_number_is_one_token_wherever_it_stands():
    tokenizer = train_tokenizer(["add 17 to 17, 4 + 17 = 21.\n17"] * 50, 400, 64)
    pieces = [tokenizer.decode([i]) for i in tokenizer("add 17, 4 + 17 = 21.\n17 2024")["input_ids"]]
    assert pieces == ["add ", "17", ", ", "4", " + ", "17", " = ", "21", ".", "\n", "17", " ", "2", "0", "2", "4"]
    assert not [token for token in tokenizer.get_vocab() if sum(map(str.isdigit, token)) > 2]


def test_the_chat_template_gives_exactly_these_tokens_and_marks_what_the_assistant_writes():
    tokenizer = train_tokenizer([""], 300, 64)  # no merges: one token a character
    found = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.convert_ids_to_tokens(found["input_ids"]) == [
        "<|begin|>", "<|system|>", "S", "<|user|>", "1", "+", "2",
        "<|assistant|>", "<think>", "\u010a", "3", "<|end|>", "<|user|>", "k", "<|assistant|>", "o", "k", "<|end|>"]
    assert found["assistant_masks"] == [0] * 8 + [1] * 4 + [0] * 3 + [1] * 3


def test_prompt_and_completion_together_are_the_whole_conversation(tokenizer):
    whole = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert prompt_ids(tokenizer, CONVERSATION[:-1]) + completion_ids(tokenizer, "ok") == whole


def test_thinking_tags_survive_where_special_tokens_are_skipped(tokenizer):
    text = "<think>\n1 + 1\n</think>\n2"
    ids = completion_ids(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert [tokenizer.decode([i]) for i in ids].count("<think>") == 1  # one token, not spelled out
    assert ids[-1] == tokenizer.eos_token_id and "<|end|>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert prompt_ids(loaded, CONVERSATION) == prompt_ids(tokenizer, CONVERSATION)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no tokenizer in this checkpoint folder; copy tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_a_clear_error(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template; add chat_template.jinja"):
        load_tokenizer(tmp_path)


def test_many_samples_encode_as_each_does_alone():
    tokenizer = train_tokenizer(["Seven and five are twelve crows."], 320, 64)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many crows, all told?"}]
    conversations = [asked, asked[1:], [], asked]
    texts = ["<think>\n7 + 5 = 12\n</think>\n12", "12", "Plain text.", ""]
    together = encode_samples(tokenizer, conversations, texts)
    for (prompt, completion), messages, text in zip(together, conversations, texts, strict=True):
        assert prompt == (prompt_ids(tokenizer, messages) if messages else [tokenizer.bos_token_id])
        assert completion == completion_ids(tokenizer, text)
    assert encode_samples(tokenizer, [], []) == []
