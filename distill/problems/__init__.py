"""Seeded generators of short checkable problems, one module per domain.

Every module has `SKILLS` (name -> maker of one task) and `generate(count, seed, skills)`.
"""

from distill.problems import code, logic, math, writing

GENERATORS = {"math": math.generate, "code": code.generate, "logic": logic.generate, "writing": writing.generate}

__all__ = ["GENERATORS"]
