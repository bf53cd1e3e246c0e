"""Curation of the verified samples: decontaminate, deduplicate, mix to quotas (DeepSeek-V3, section 5.1).

The report mixes 1.5M instances of several domains and two sample forms. Decontamination follows the 13-gram rule
of GPT-3 (arXiv 2005.14165, appendix C), which ignores n-grams so common that they are templates.

Two passes: `sketch` reads the texts of one part and leaves numbers, `Choice` decides over the numbers of all parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from distill.prompts import FORMS
from distill.shingles import BANDS, Words, bands, lettered, level, shorten, signatures, similarity
from pipeline.recipe import CurateConfig
from pipeline.records import Problem
from rewards.extract import OPEN

CONTAMINATED_WORDS = 13
PLAIN_WORDS = 7  # of them must have letters: sums of small numbers repeat by chance
TEMPLATE_TEXTS = 10  # an n-gram in more evaluation texts than this belongs to the template, not to the task
FILTER_BITS = 24
_LEADING = np.uint64(64 - FILTER_BITS)
SHINGLE_WORDS = 5
NEIGHBOURS = 4  # texts before it in its bucket that a text is compared with, beside the first
SLICE_ROWS = 5000  # texts whose words are held at a time
GARBLED = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x{fffd}]"  # control and replacement characters: a broken encoding

SPLITS = ("train", "validation", "dropped")
REASONS = (None, "unfit", "duplicate", "near_duplicate", "plain_thinking", "quota")


@dataclass(frozen=True)
class Forbidden:
    """What training must not have seen: evaluation prompts as they are, and runs of words of prompts and solutions.

    prompts: {hash of a levelled prompt: name}. grams: sorted uint64, owners: the place in `names` of each. marked: bool
    [2**FILTER_BITS], true at the leading bits of each of them.
    """

    prompts: dict[int, str]
    grams: np.ndarray
    owners: np.ndarray
    names: Sequence[str]
    marked: np.ndarray

    @staticmethod
    def of(problems: Iterable[Problem], texts: Iterable[tuple[str, str]] = ()) -> Forbidden:
        """Of held-out problems with their solutions, and of (name, text) pairs of other evaluation sets."""
        problems, texts = list(problems), list(texts)
        asked = pl.Series([_asked(problem) for problem in problems] + [text for _, text in texts], dtype=pl.String)
        solved = [(p.id, text) for p in problems for text in (p.solution, p.answer) if text]
        names = [p.id for p in problems] + [name for name, _ in texts] + [name for name, _ in solved]
        prompts = _prompt_keys(asked)
        every = level(pl.concat([asked, pl.Series([text for _, text in solved], dtype=pl.String)]))
        found, plain = Words.of(every).ngrams(CONTAMINATED_WORDS), lettered(every, CONTAMINATED_WORDS) >= PLAIN_WORDS
        owners = found.texts_of(np.arange(len(found.hashes)))[plain]
        hashes = found.hashes[plain]
        # each n-gram once for each text
        both = np.unique(np.stack([hashes, owners.astype(np.uint64)]), axis=1)
        grams, first, counts = np.unique(both[0], return_index=True, return_counts=True)
        rare = counts <= TEMPLATE_TEXTS
        grams, owners = grams[rare], both[1][first[rare]].astype(np.int64)
        marked = np.zeros(2**FILTER_BITS, dtype=bool)
        marked[grams >> _LEADING] = True
        return Forbidden(dict(zip(prompts.tolist()[::-1], names[:len(asked)][::-1], strict=True)), grams, owners, names,
                         marked)

    def touched(self, prompts: np.ndarray, words: Words) -> list[tuple[str, str] | None]:
        """(reason, name of what it resembles) of each text, or None. Reasons: heldout_prompt, heldout_overlap."""
        found: list[tuple[str, str] | None] = [None] * len(prompts)
        grams = words.ngrams(CONTAMINATED_WORDS)
        if len(self.grams):
            hits = np.flatnonzero(self.marked[grams.hashes >> _LEADING])  # nearly all are ruled out here
            places = np.minimum(np.searchsorted(self.grams, grams.hashes[hits]), len(self.grams) - 1)
            same = self.grams[places] == grams.hashes[hits]
            hits, places = hits[same], places[same]
            for text, owner in zip(grams.texts_of(hits)[::-1].tolist(), self.owners[places][::-1].tolist(),
                                   strict=True):  # backwards: the first one stays
                found[text] = ("heldout_overlap", self.names[owner])
        for text, key in enumerate(prompts.tolist()):
            if key in self.prompts:
                found[text] = ("heldout_prompt", self.prompts[key])
        return found


def _asked(problem: Problem) -> str:
    return "\n".join(message["content"] for message in problem.messages if message["role"] != "system")


def _prompt_keys(asked: pl.Series) -> np.ndarray:
    """uint64: equal for prompts that differ in case, width and white space alone."""
    return _one_line(level(asked)).hash(seed=0).to_numpy()


def _one_line(texts: pl.Series) -> pl.Series:
    return texts.str.replace_all(r"\s+", " ").str.strip_chars()


def sketch(part: Path, out: Path, forbidden: Forbidden) -> None:
    """Write out/sketch.parquet, a row of numbers for each sample of a part of `Sample` rows.

    Columns: id, problem, exact (uint64), domain, form, thinks, reason and other (why it is unfit by itself), band_*
    (uint64, null for texts shorter than a shingle), signature (PERMUTATIONS bytes).
    """
    file = pq.ParquetFile(part)
    columns = ["id", "problem_id", "domain", "form", "messages", "completion"]
    frames = [_sketched(frame, forbidden) for batch in file.iter_batches(SLICE_ROWS, columns=columns)
              if len(frame := pl.DataFrame(pl.from_arrow(batch)))]
    if not frames:
        frames = [_sketched(pl.DataFrame(pl.from_arrow(file.schema_arrow.empty_table())).select(columns), forbidden)]
    pl.concat(frames).write_parquet(out / "sketch.parquet", compression="lz4")


def _sketched(frame: pl.DataFrame, forbidden: Forbidden) -> pl.DataFrame:
    content = pl.element().struct.field("content")
    asked = frame.select(pl.col("messages").list.eval(content.filter(pl.element().struct.field("role") != "system"))
                         .list.join("\n"))["messages"]
    completion = level(frame["completion"])
    prompts = _prompt_keys(asked)
    words = Words.of(level(asked) + "\n" + completion)
    touched = forbidden.touched(prompts, words)
    shingles = words.ngrams(SHINGLE_WORDS)
    signature = signatures(shingles)
    # samples of another domain or form are no duplicates
    group = frame.select(pl.concat_str("domain", "form", separator="\x1f").hash(seed=0)).to_series().to_numpy()
    keys, empty = bands(signature, group), np.diff(shingles.starts) == 0
    garbled = frame["completion"].str.contains(GARBLED)
    levelled = pl.DataFrame({"group": group, "asked": prompts, "text": _one_line(completion)})
    return frame.select(
        pl.col("id").str.to_integer(base=16, dtype=pl.UInt64),
        pl.col("problem_id").str.to_integer(base=16, dtype=pl.UInt64).alias("problem"),
        levelled.select(pl.struct(pl.all()).hash(seed=0)).to_series().alias("exact"),
        pl.col("domain", "form").cast(pl.Categorical),
        pl.col("completion").str.strip_chars_start().str.starts_with(OPEN).alias("thinks"),
        pl.Series("reason", [hit[0] if hit else "garbled" if bad else None
                             for hit, bad in zip(touched, garbled.to_list(), strict=True)], dtype=pl.Categorical),
        pl.Series("other", [hit and hit[1] for hit in touched], dtype=pl.String),
        *(pl.when(pl.Series(~empty)).then(pl.Series(keys[:, band])).alias(f"band_{band}") for band in range(BANDS)),
        pl.Series("signature", [row.tobytes() for row in shorten(signature)], dtype=pl.Binary))


class Choice:
    """Decides over all samples from their sketches, and says why for each that is left out.

    Reasons: those of `sketch`, then duplicate, near_duplicate, plain_thinking, quota. Of equal samples the one with
    the lowest id stays, whatever the order of the parts.
    """

    def __init__(self, sketches: Sequence[Path], config: CurateConfig, seed: int) -> None:
        self.sketches, self.config, self.seed = sketches, config, seed
        columns = ["id", "problem", "exact", "domain", "form", "thinks", "reason", "other"]
        frames = [pl.read_parquet(path, columns=columns) for path in sketches]
        self.sizes = [len(frame) for frame in frames]
        self.samples = pl.concat(frames)
        self.ids = self.samples["id"].to_numpy()
        self.reason = np.zeros(len(self.samples), dtype=np.int8)  # place in REASONS
        self.reason[self.samples["reason"].is_not_null().to_numpy()] = REASONS.index("unfit")
        self.resembled: dict[int, int] = {}  # row: that of which it is a copy

    def decide(self) -> tuple[list[pl.DataFrame], dict[str, dict[str, int]]]:
        """Columns split, reason, other for each part, a row a sample, and {domain: {wanted, got, reasoning}}."""
        self._drop_copies()
        self._drop_near_copies()
        quota = self._mix()
        # whole problems: no prompt of the validation slice is trained on
        held = _draw(self.samples["problem"].to_numpy(), self.seed + 1) < self.config.validation_share * 2.0**64
        split = np.where(self.reason == 0, np.where(held, 1, 0), 2)
        rows = list(self.resembled)
        names = self.ids[list(self.resembled.values())].tolist() if rows else []
        copied = pl.Series([f"{name:016x}" for name in names], dtype=pl.String)
        frame = pl.DataFrame({
            "split": pl.Series(SPLITS)[split],
            # what the sketch said stands before what was decided here
            "reason": self.samples["reason"].cast(pl.String).zip_with(
                self.samples["reason"].is_not_null(), pl.Series(REASONS, dtype=pl.String)[self.reason]),
            "other": self.samples["other"].scatter(rows, copied) if rows else self.samples["other"]})
        starts = np.cumsum([0, *self.sizes])
        return [frame.slice(start, size) for start, size in zip(starts[:-1].tolist(), self.sizes, strict=True)], quota

    def _left(self) -> np.ndarray:
        """Rows not dropped so far, by id."""
        rows = np.flatnonzero(self.reason == 0)
        return rows[np.argsort(self.ids[rows], kind="stable")]

    def _drop(self, rows: np.ndarray, reason: str, resembled: np.ndarray | None = None) -> None:
        self.reason[rows] = REASONS.index(reason)
        if resembled is not None:
            self.resembled.update(zip(rows.tolist(), resembled.tolist(), strict=True))

    def _drop_copies(self) -> None:
        """One of each levelled prompt, form and completion."""
        rows = self._left()
        exact = self.samples["exact"].to_numpy()[rows]
        _, first, inverse = np.unique(exact, return_index=True, return_inverse=True)
        copies = first[inverse] != np.arange(len(rows))
        self._drop(rows[copies], "duplicate", rows[first[inverse]][copies])

    def _drop_near_copies(self) -> None:
        """Without samples whose text is nearly that of one kept before, within a domain and form.

        Pairs that share a band are compared by their signatures. Memory is that of one band and of the pairs.
        """
        rows = self._left()
        pairs = np.unique(np.concatenate([found for band in range(BANDS)
                                          for found in self._bucket_pairs(band, rows)] or [np.empty(0, np.uint64)]))
        first, second = (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64), (pairs >> np.uint64(32)).astype(np.int64)
        needed, places = np.unique(np.concatenate([first, second]), return_inverse=True)
        signature = self._signatures(rows[needed])
        near = similarity(signature[places[:len(first)]], signature[places[len(first):]]) >= self.config.near_duplicate
        dropped: dict[int, int] = {}
        for later, earlier in zip(second[near].tolist(), first[near].tolist(), strict=True):  # by the later one
            if later not in dropped and earlier not in dropped:
                dropped[later] = earlier
        self._drop(rows[list(dropped)], "near_duplicate", rows[list(dropped.values())])

    def _bucket_pairs(self, band: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Pairs of places in `rows` with equal keys, as later << 32 | earlier."""
        name = f"band_{band}"
        keys = pl.concat([pl.read_parquet(path, columns=[name]) for path in self.sketches])[name][rows]
        places = np.flatnonzero(keys.is_not_null().to_numpy())
        keys = keys.drop_nulls().to_numpy()
        order = np.argsort(keys, kind="stable")  # stable: within a bucket by id
        keys, places = keys[order], places[order].astype(np.uint64)
        opens = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)
        starts = np.repeat(opens, np.diff(np.append(opens, len(keys))))
        inside = np.flatnonzero(starts < np.arange(len(keys)))
        yield places[inside] << np.uint64(32) | places[starts[inside]]
        for distance in range(1, NEIGHBOURS + 1):
            inside = inside[starts[inside] < inside - distance]
            yield places[inside] << np.uint64(32) | places[inside - distance]

    def _signatures(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [rows, PERMUTATIONS], read part by part."""
        found, start = [], 0
        order = np.argsort(rows)
        for path, size in zip(self.sketches, self.sizes, strict=True):
            inside = rows[order]
            inside = inside[(inside >= start) & (inside < start + size)] - start
            if len(inside):
                column = pl.read_parquet(path, columns=["signature"])["signature"][inside]
                found.append(np.frombuffer(b"".join(column.to_list()), np.uint8).reshape(len(inside), -1))
            start += size
        return np.concatenate(found)[np.argsort(order)] if found else np.empty((0, 1), np.uint8)

    def _mix(self) -> dict[str, dict[str, int]]:
        """A seeded draw of each domain's share of `total` with the wanted share of the reasoning form.

        A domain that has fewer gives all it has; the others do not grow in its place. The original form thinks at most
        as `config.plain_thinking` allows; without direct answers none of it is kept. Where one form has too few the
        other fills the domain's quota.
        """
        config = self.config
        domains = [name for name, share in config.quotas.items() if share]
        domain, form = (self.samples[name].cast(pl.String).to_numpy() for name in ("domain", "form"))
        domains += sorted(set(domain.tolist()) - set(domains))
        shares = config.quotas or dict.fromkeys(domains, 1 / max(1, len(domains)))
        rows = self._left()
        rows = rows[np.argsort(_draw(self.ids[rows], self.seed), kind="stable")]
        thinks = self.samples["thinks"].to_numpy()
        quota = {}
        for name in domains:
            mine = rows[domain[rows] == name]
            original, reasoning = (mine[form[mine] == one] for one in FORMS)
            if name in config.plain_thinking:
                original, surplus = _limit_thinking(original, thinks[original], config.plain_thinking[name])
                self._drop(surplus, "plain_thinking")
            wanted = int(config.total * shares.get(name, 0.0) + 1e-9)  # rounded down: never above total
            thinking = min(len(reasoning), round(wanted * config.reasoning_share))
            plain = min(len(original), wanted - thinking)
            thinking = min(len(reasoning), wanted - plain)
            self._drop(np.concatenate([reasoning[thinking:], original[plain:]]), "quota")
            quota[name] = {"wanted": wanted, "got": thinking + plain, "reasoning": thinking}
        return quota


def _draw(ids: np.ndarray, seed: int) -> np.ndarray:
    """A uint64 for each id as if drawn at random (splitmix64): the same whatever else is in the set."""
    offset = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    mixed = ids ^ np.uint64(offset)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return mixed ^ mixed >> np.uint64(31)


def _limit_thinking(rows: np.ndarray, thinks: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of which at most `share` think, and those that were too many."""
    room = round(int((~thinks).sum()) * share / (1 - share))
    surplus = thinks & (np.cumsum(thinks) > room)
    return rows[~surplus], rows[surplus]
