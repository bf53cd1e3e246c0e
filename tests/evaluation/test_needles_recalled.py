import random

import torch
from tiny_models import tiny_policy

from evaluation.needles import recalled


def test_a_row_is_recalled_exactly_where_greedy_generation_gives_the_answer():
    model, rng = tiny_policy().eval(), random.Random(0)
    rows, expected = [], []
    for number in range(12):
        prompt = [rng.randrange(7, 300) for _ in range(rng.randint(5, 40))]
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                                 eos_token_id=None)[0, len(prompt):].tolist()
        changed = number % 4  # 3: the answer as it is; else one of its tokens is another
        answer = [token + (place == changed) for place, token in enumerate(written[:3])]
        rows.append((prompt, answer))
        expected.append(changed == 3)
    for batch in (1, 5, 12):
        assert recalled(model, rows, batch) == expected
