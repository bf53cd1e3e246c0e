"""Rewards: what an answer is worth, and why. Verdicts by rule (math, exact text, code) and by a judge.

Nothing here imports a trainer; any trainer can call `Verifier.verify_batch`.
"""
