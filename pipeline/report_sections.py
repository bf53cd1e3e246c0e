"""Sections of the report: evaluation, the data's funnel, curves, and what makes the numbers trustworthy."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.report_charts import (
    absent,
    fold,
    interval_rows,
    length_bar,
    line_chart,
    magnitude_row,
    number,
    percent,
    share_bar,
    table,
    tag,
    text,
)
from pipeline.report_data import STATUSES, UNSCORED, RunView, series

ALL = "all"  # the extra domain of evaluation.json: checkable domains together
MODELS = (("base", "base"), ("expert", "expert"), ("sft", "SFT"), ("rl", "RL"))
DRIFT = "sampling/sampling_logp_difference"


def missing(run: RunView, *names: str) -> str:
    """A line saying which of the stages have made nothing yet and why; "" when all have, or the graph has none."""
    gaps = [f"{view.name} ({view.planned.state}{': ' + view.planned.reason if view.planned.reason else ''})"
            for name in names if (view := run.by_name.get(name)) is not None and view.manifest is None]
    return absent("Not there yet:", "; ".join(gaps) + ".") if gaps else ""


def outdated(run: RunView, *names: str) -> str:
    """A line saying which of the stages shown were made from other inputs or code than the recipe's now."""
    stale = [name for name in names if (view := run.by_name.get(name)) is not None and view.manifest is not None
             and view.planned.state != "done"]
    return absent("Older than the recipe or the code:", f"{', '.join(stale)}. Ask: posttrain why "
                  f"{run.directory.root} {stale[0]}") if stale else ""


# -- evaluation ------------------------------------------------------------------------------------------------


def results(run: RunView, domain: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(class, label, row) of every model evaluated on a domain, from base to RL."""
    found = []
    for kind, label in MODELS:
        row = run.evaluation.get(f"expert-{domain}" if kind == "expert" else kind, {}).get(domain)
        if row is not None:
            found.append((kind, label, row))
    return found


def evaluation_section(run: RunView) -> str:
    gap = missing(run, "evaluate") or outdated(run, "evaluate")
    if not run.evaluation:
        return gap or absent("Not there yet:", "no stage has evaluated the models.")
    k = run.setting("evaluation.k") or "k"
    panels, rows = [], []
    for domain in (ALL, *run.domains):
        found, judged = results(run, domain), domain in run.judged
        if not found:
            continue
        sizes = sorted({row["n"] for _, _, row in found})
        sample = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        what = "answers that beat the base model's" if judged else "greedy answers that are right"
        name = "all checkable domains" if domain == ALL else domain
        marks = [(label, kind, row["accuracy"], tuple(row["ci95"])) for kind, label, row in found
                 if row["accuracy"] is not None and not (judged and kind == "base")]
        panels.append(tag("div", tag("h3", text(name), " ", tag("small", text(f"{sample} problems; {what}"))),
                          interval_rows(marks, "½ = base" if judged else None), class_="panel"))
        for kind, label, row in found:
            yardstick = judged and kind == "base"
            name_there = f"expert-{domain}" if kind == "expert" else kind
            measured = run.metrics("evaluate").get(f"{name_there}/{domain}/measured")
            low, high = row["ci95"]
            rows.append([text(name), text(label), number(row["n"]),
                         "yardstick" if yardstick else percent(row["accuracy"]),
                         "" if yardstick else f"{percent(low)} – {percent(high)}",
                         "" if row["pass_at_k"] is None else percent(row["pass_at_k"]),
                         "" if measured is None else percent(measured)])
    notes = ["Held-out problems, the same for every model. Whiskers and intervals are 95% Wilson intervals of one "
             "training run: they hold the luck of the problems, not that of another seed."]
    reflective = {domain: share for domain in run.domains
                  if (share := run.metrics("evaluate").get(f"base/{domain}/reflective")) is not None}
    if reflective:
        notes.append("Experts are asked with the reflective prompt they are trained with, all others plainly. With "
                     "that prompt the base model is right in " +
                     ", ".join(f"{percent(share)} of {domain}" for domain, share in reflective.items()) + ".")
    if run.judged:
        notes.append(f"{', '.join(sorted(run.judged))}: wins against the base model's answer, a tie counts half. "
                     "A program decides where it can measure the principles (“principles met”; never a reward), the "
                     "run's own reward model in both orders elsewhere.")
    columns = ["domain", "model", "n", "accuracy or win rate", "95% interval", f"pass@{k}", "principles met"]
    if not run.judged:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return gap + tag("div", *panels, class_="panels wide") + \
        "".join(tag("p", text(note), class_="note") for note in notes) + \
        table(columns, rows, right=range(2, len(columns)), caption="Evaluation in numbers")


# -- funnel ----------------------------------------------------------------------------------------------------


def funnel_section(run: RunView) -> str:
    stages = [f"generate-{domain}" for domain in run.domains] + ["verify", "reject", "curate", "pack"]
    gap = missing(run, *stages) + outdated(run, *stages)
    panels = []
    for domain, steps in run.funnel.items():
        largest = max(step.rows for step in steps)
        rows = []
        for step in steps:
            lost = [(reason, count) for reason, count in sorted(step.lost.items(), key=lambda item: -item[1]) if count]
            gone = [tag("span", f"−{count:,} ", text(reason.replace("_", " "))) for reason, count in lost]
            reasons = tag("span", *gone, class_="lost") if gone else ""
            rows.append(tag("li", tag("span", text(step.label), class_="label"), length_bar(step.rows, largest),
                            tag("b", f"{step.rows:,}"), reasons))
        quota = run.counts("curate").get("funnel", {}).get(domain, {}).get("quota")
        note = tag("p", f"mix: {quota['got']:,} of {quota['wanted']:,} wanted, {quota['reasoning']:,} in reasoning "
                   "form", class_="note") if quota else ""
        panels.append(tag("div", tag("h3", text(domain)), _asked(run, domain), tag("ol", *rows, class_="funnel"), note,
                          class_="panel"))
    broken = run.counts("problems").get("bad_rows")
    if broken:
        gap += tag("p", f"{broken:,} rows of the problem files could not be read and were left out; "
                   "bad_rows.jsonl of the stage problems names each.", class_="note")
    return gap + (tag("div", *panels, class_="panels") if panels else "") + _reasons(run) + _packs(run)


def _asked(run: RunView, domain: str) -> str:
    """How many problems the samples come from."""
    asked = run.counts(f"generate-{domain}").get("problems")
    available = run.counts("problems").get("splits", {}).get(domain, {}).get("sft")
    if asked is None or available is None:
        return ""
    return tag("p", f"{asked:,} of {available:,} problems of the sft split, each asked plainly and with the reflective "
               "prompt", class_="note")


def _packs(run: RunView) -> str:
    counts, metrics = run.counts("pack"), run.metrics("pack")
    if "packs" not in counts:
        return ""
    words = f"{counts['packs']:,} packs hold {counts.get('tokens', 0):,} tokens"
    words += f" and are {percent(metrics['fill'])} full" if "fill" in metrics else ""
    if counts.get("judge_demonstrations"):
        words += f". Packed beside the samples: {counts['judge_demonstrations']:,} demonstrations of judging"
    return tag("p", text(words + "."), class_="note")


def _reasons(run: RunView) -> str:
    found = run.verdicts("verify", "samples")
    rows = [[text(domain), text(status), text(reason), f"{count:,}"] for domain, counter in sorted(found.items())
            for (status, reason), count in counter.most_common()]
    return fold("Every reason the verifiers gave", table(["domain", "status", "reason", "samples"], rows, right=(3,))) \
        if rows else ""


# -- curves ----------------------------------------------------------------------------------------------------


def curves_section(run: RunView) -> str:
    supervised = [name for name in run.with_file("curve.jsonl") if not run.file(name, "rollouts.parquet")]
    reinforced = [name for name in run.with_file("curve.jsonl") if run.file(name, "rollouts.parquet")]
    trainings = ["base", *(f"expert-{domain}-{kind}" for domain in run.domains for kind in ("sft", "rl")), "sft",
                 "reward-model", "rl"]
    parts = [missing(run, *trainings), outdated(run, *trainings)]
    for name in sorted(reinforced, key=lambda name: name != "rl"):
        curve = run.curve(name)
        rewards = series(curve, "rollout_reward")
        head = tag("b", text(name)) + tag("span", text(
            f"GRPO, {len(curve)} logged steps" + (f", reward {number(rewards[0][1])} → {number(rewards[-1][1])}"
                                                  if rewards else "")), class_="dim")
        parts.append(fold(head, tag("div", *_grpo_panels(run, name, curve), class_="panels small"),
                          is_open=name == reinforced[-1]))
    if supervised:
        curves = {name: run.curve(name) for name in supervised}
        for title, key, is_open in (("loss", "loss", True), ("next-token accuracy", "mean_token_accuracy", False),
                                    ("load violation of the experts", "max_violation", False)):
            panels = [line_chart(name, [(key, 2, series(curve, key))]) for name, curve in curves.items()]
            if any(panels):
                parts.append(fold(tag("b", "Supervised training") + tag("span", text(title), class_="dim"),
                                  tag("div", *panels, class_="panels small"), is_open))
    return "".join(parts)


def _grpo_panels(run: RunView, stage: str, curve: list[dict[str, Any]]) -> list[str]:
    colours = {domain: index for index, domain in enumerate(run.domains)}
    section = run.manifest(stage)["config"].get("rl", {})
    bound = run.setting("engine.max_logprob_error")
    by_domain = [(domain, colour, series(curve, f"accuracy/{domain}")) for domain, colour in colours.items()]

    def one(title: str, key: str, note: str = "", **options: Any) -> str:
        return line_chart(title, [(title, 2, series(curve, key))], note=note, **options)

    return [
        one("reward", "rollout_reward", "mean over all rollouts of a step"),
        line_chart("verdict score", by_domain, note="mean over scored rollouts"),
        one("KL", "kl", "to the reference"),
        one("completion length", "completions/mean_length", "tokens, trained groups"),
        one("drift", f"{DRIFT}/mean", "mean |trainer − engine| log-prob of sampled tokens", log=True,
            bound=("stops the run", section["max_drift"]) if "max_drift" in section else None),
        one("sync error", "sync_logprob_error", "largest |trainer − engine| log-prob of fixed prompts", log=True,
            bound=("stops the run", bound) if bound else None),
        one("load violation", "max_violation", "load of the busiest expert over the mean, less 1"),
        one("rerouted share", "rerouted_share", "tokens that would have left the experts of their rollout; replayed"),
        one("trained share", "trained_share", "rollouts in groups whose rewards differ"),
    ]


# -- trust -----------------------------------------------------------------------------------------------------


def trust_section(run: RunView) -> str:
    trained = run.with_file("rollouts.parquet")
    parts = [missing(run, "reward-model", "rl")]
    bound = run.setting("engine.max_logprob_error")
    proofs = [(f"{view.name}, at load", value) for view in run.stages
              if isinstance(value := run.metrics(view.name).get("load_logprob_error"), int | float)]
    proofs += [(f"{name}, worst of {len(errors)} syncs", max(value for _, value in errors)) for name in trained
               if (errors := series(run.curve(name), "sync_logprob_error"))]
    if proofs:
        parts.append(tag("h3", "The engine runs the trainer's weights") + tag("p", text(
            "After each load and sync, tensor checksums are compared, and the log-probs of fixed prompts: here the "
            "largest difference between engine and trainer, on a log scale. Beyond the dashed bound the run stops."),
            class_="note") + table(["where", "difference", "value", "bound"],
                                   [magnitude_row(name, value, bound) for name, value in proofs], right=(2, 3)))
    drifts = []
    for name in trained:
        limit = run.manifest(name)["config"].get("rl", {}).get("max_drift")
        drifts += [magnitude_row(f"{name}, {label}", max(value for _, value in found), gate)
                   for kind, label, gate in (("mean", "worst step mean", limit), ("max", "worst token", None))
                   if (found := series(run.curve(name), f"{DRIFT}/{kind}"))]
    if drifts:
        parts.append(tag("h3", "Drift between trainer and engine while sampling") + tag("p", text(
            "The difference of log-probs of sampled tokens; corrected by importance sampling, and gated by its mean."),
            class_="note") + table(["training", "difference", "value", "bound"], drifts, right=(2, 3)))
    return "".join([*parts, _verdict_table(run, trained), _ledger_table(run, trained), _calibration(run)])


def _verdict_table(run: RunView, trained: list[str]) -> str:
    rows = []
    for stage, file in [("verify", "samples"), *((name, "rollouts.parquet") for name in trained),
                        ("evaluate", "samples.parquet")]:
        counter: Counter[str] = Counter()
        for found in run.verdicts(stage, file).values():
            for (status, _), count in found.items():
                counter[status] += count
        total = sum(counter.values())
        if total:
            unscored = sum(counter[status] for status in UNSCORED)
            rows.append([text(stage), share_bar([(status, counter[status]) for status in STATUSES]),
                         *(f"{counter[status]:,}" for status in STATUSES), percent(unscored / total, 2)])
    if not rows:
        return ""
    budget = run.setting("rl.infra_error_budget")
    note = "An infra_error or abstain is never a score of 0: it has no score and leaves its group's baseline."
    note += f" More than {percent(budget, 0)} infrastructure errors stop a training." if budget is not None else ""
    note += " Where a judge scores, correct is half the scale and above." if run.judged else ""
    return tag("h3", "Verdicts") + tag("p", text(note), class_="note") + \
        table(["stage", "share", *(status.replace("_", " ") for status in STATUSES), "unscored"], rows,
              right=(2, 3, 4, 5, 6, 7, 8))


def _ledger_table(run: RunView, trained: list[str]) -> str:
    states = {name: counter for name in trained if (counter := run.group_states(name))}
    if not states:
        return ""
    known = ["trained", "zero_variance", "infra_error", "prompt_too_long"]
    names = known + sorted({state for counter in states.values() for state in counter} - set(known))
    rows = [[text(stage), share_bar([(state, counter[state]) for state in names]),
             *(f"{counter[state]:,}" for state in names)] for stage, counter in states.items()]
    return tag("h3", "Groups") + tag("p", text(
        "What became of every prompt that was rolled out. A group whose rewards are all equal teaches nothing and is "
        "left out."), class_="note") + table(["training", "share", *(name.replace("_", " ") for name in names)], rows,
                                             right=tuple(range(2, 2 + len(names))))


def _calibration(run: RunView) -> str:
    found = run.json("reward-model", "calibration.json")
    if not found:
        return ""
    floor = run.setting("reward_model.min_accuracy")
    names = {"n": "held-out pairs", "truth": "truth", "accuracy": "pairs ranked right, single scores",
             "pairwise_accuracy": "pairs judged right, both orders", "consistency": "both orders agree",
             "abstain_rate": "abstained", "ece": "expected calibration error, single scores",
             "match_n": "held-out comparisons with a reference", "match_accuracy": "comparisons judged right",
             "match_abstain_rate": "comparisons abstained from"}
    rows = []
    for key, value in found.items():
        shown = "unknown" if value is None else percent(value) if isinstance(value, float) else number(value)
        gated = key in ("accuracy", "match_accuracy") and floor is not None
        needed = f"at least {percent(floor, 0)} to be a reward" if gated else ""
        rows.append([text(names.get(key, key)), text(shown), text(needed)])
    return tag("h3", "The judge, before it may be a reward") + table(["calibration", "value", ""], rows, right=(1,))
