"""Curation of the verified samples: deduplicate, decontaminate, mix to quotas (DeepSeek-V3, section 5.1).

The report mixes 1.5M instances of several domains and two sample forms. Decontamination follows the 13-gram rule
of GPT-3 (arXiv 2005.14165, appendix C), which ignores n-grams so common that they are templates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from random import Random

import numpy as np

from distill.prompts import FORMS, normalise, prompt_key
from distill.rejection import Funnel, Rejected, count_funnel, stop_when_empty
from distill.shingles import Shingler, jaccard
from pipeline.recipe import CurateConfig
from pipeline.records import Message, Problem, Sample, content_id
from rewards.extract import split_thinking

CONTAMINATED_WORDS = 13
TEMPLATE_PROMPTS = 10  # an n-gram in more held-out prompts than this belongs to the template, not to the task
SHINGLE_WORDS = 5
NEAR_DUPLICATE = 0.9  # Jaccard similarity of shingles of prompt and completion
MOST_COMPARED = 32  # kept samples a sample is compared with per band


def curate(samples: Iterable[Sample], problems: Iterable[Problem], config: CurateConfig,
           seed: int) -> tuple[list[Sample], Rejected, Funnel]:
    """At most `config.total` samples in a seeded order, the others each with a reason, and the funnel per domain.

    Reasons: duplicate, near_duplicate, heldout_prompt, heldout_overlap, plain_thinking, quota. `problems` must hold
    the held-out ones. A domain gets its share of `total`; one that has fewer gives all it has, the others do not grow
    in its place, and the funnel's "quota" entry says wanted and got. Raises StageError with the funnel when a domain
    ends empty.
    """
    samples = sorted(samples, key=lambda sample: sample.id)
    funnel: Funnel = {domain: {"in": 0, "out": 0, "lost": {}} for domain in config.quotas if config.quotas[domain]}
    for sample in samples:
        funnel.setdefault(sample.domain, {"in": 0, "out": 0, "lost": {}})["in"] += 1
    shingler = Shingler()
    left, dropped = _distinct(samples)
    left, lost = _far_apart(left, shingler)
    dropped += lost
    left, lost = _uncontaminated(left, problems, shingler)
    dropped += lost
    kept, lost, quota = _mixed(left, list(funnel), config, seed)
    dropped += lost
    count_funnel(funnel, kept, dropped)
    for domain, row in funnel.items():
        row["quota"] = quota[domain]
    needed = {domain: row for domain, row in funnel.items() if row["quota"]["wanted"] or row["out"]}
    stop_when_empty(needed, "curation", "generate more for it, raise curate.total or set its quota to 0")
    return kept, dropped, funnel


def _distinct(samples: list[Sample]) -> tuple[list[Sample], Rejected]:
    """One of each normalised prompt, form and completion."""
    kept, dropped, seen = [], [], set()
    for sample in samples:
        key = content_id(prompt_key(sample.messages), sample.form, normalise(sample.completion))
        if key in seen:
            dropped.append((sample, "duplicate"))
        else:
            kept.append(sample)
        seen.add(key)
    return kept, dropped


def _far_apart(samples: list[Sample], shingler: Shingler) -> tuple[list[Sample], Rejected]:
    """Without samples whose text is nearly that of one kept before, within a domain and form.

    MinHash bands find candidates, the exact Jaccard similarity of their shingles decides. Texts of fewer than
    SHINGLE_WORDS words are left to exact deduplication. Memory is one number per sample and band: the shingles
    of a candidate are computed again when it is needed.
    """
    kept, dropped = [], []
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.domain, sample.form].append(sample)
    for group in groups.values():
        buckets: dict[int, list[int]] = defaultdict(list)  # band key -> places in `group` of kept samples
        for place, sample in enumerate(group):
            grams = _shingles(sample, shingler)
            keys = shingler.bands(grams) if len(grams) else []
            candidates = {other for key in keys for other in buckets[key][:MOST_COMPARED]}
            if any(jaccard(grams, _shingles(group[other], shingler)) >= NEAR_DUPLICATE for other in candidates):
                dropped.append((sample, "near_duplicate"))
                continue
            kept.append(sample)
            for key in keys:
                buckets[key].append(place)
    return kept, dropped


def _shingles(sample: Sample, shingler: Shingler) -> np.ndarray:
    return shingler.ngrams(f"{_asked(sample.messages)} {sample.completion}", SHINGLE_WORDS)


def _asked(messages: Iterable[Message]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _uncontaminated(samples: list[Sample], problems: Iterable[Problem],
                    shingler: Shingler) -> tuple[list[Sample], Rejected]:
    """Without samples whose prompt is a held-out prompt or shares a run of CONTAMINATED_WORDS words with one."""
    heldout = [problem for problem in problems if problem.split == "heldout"]
    keys = {prompt_key(problem.messages) for problem in heldout}
    counts: Counter[int] = Counter()
    for problem in heldout:
        counts.update(shingler.ngrams(_asked(problem.messages), CONTAMINATED_WORDS).tolist())
    marked = np.array(sorted(g for g, n in counts.items() if n <= TEMPLATE_PROMPTS), dtype=np.uint64)
    verdicts: dict[str, str | None] = {}  # prompts repeat over forms and samples
    kept, dropped = [], []
    for sample in samples:
        key = prompt_key(sample.messages)
        if key not in verdicts:
            if key in keys:
                verdicts[key] = "heldout_prompt"
            else:
                grams = shingler.ngrams(_asked(sample.messages), CONTAMINATED_WORDS)
                verdicts[key] = "heldout_overlap" if np.isin(grams, marked).any() else None
        reason = verdicts[key]
        if reason is None:
            kept.append(sample)
        else:
            dropped.append((sample, reason))
    return kept, dropped


def _mixed(samples: list[Sample], domains: list[str], config: CurateConfig,
           seed: int) -> tuple[list[Sample], Rejected, dict[str, dict[str, int]]]:
    """A seeded draw of each domain's share of `total` with the wanted share of the reasoning form.

    The original form thinks at most as `config.plain_thinking` allows; without direct answers none of it is kept.
    Where one form has too few the other fills the domain's quota.
    """
    shares = config.quotas or dict.fromkeys(domains, 1 / max(1, len(domains)))
    kept: list[Sample] = []
    dropped: Rejected = []
    quota: dict[str, dict[str, int]] = {}
    for domain in domains:
        rng = Random(f"{seed}:{domain}")
        forms = {form: [s for s in samples if s.domain == domain and s.form == form] for form in FORMS}
        for rows in forms.values():
            rng.shuffle(rows)
        original, reasoning = forms["original"], forms["reasoning"]
        if domain in config.plain_thinking:
            original, surplus = _limit_thinking(original, config.plain_thinking[domain])
            dropped += [(sample, "plain_thinking") for sample in surplus]
        wanted = int(config.total * shares.get(domain, 0.0) + 1e-9)  # rounded down: never above total
        thinking = min(len(reasoning), round(wanted * config.reasoning_share))
        plain = min(len(original), wanted - thinking)
        thinking = min(len(reasoning), wanted - plain)
        kept += reasoning[:thinking] + original[:plain]
        dropped += [(sample, "quota") for sample in reasoning[thinking:] + original[plain:]]
        quota[domain] = {"wanted": wanted, "got": thinking + plain, "reasoning": thinking}
    Random(seed).shuffle(kept)
    return kept, dropped, quota


def _limit_thinking(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Samples of which at most `share` think, and those that were too many."""
    thinks = [bool(split_thinking(sample.completion).thought) for sample in samples]
    room = round(thinks.count(False) * share / (1 - share))
    kept, surplus = [], []
    for sample, thought in zip(samples, thinks, strict=True):
        (surplus if thought and room <= 0 else kept).append(sample)
        room -= thought
    return kept, surplus
