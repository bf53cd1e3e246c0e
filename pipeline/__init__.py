"""How a run works: recipe, stages, artifacts, resume, the command line, the report.

Nothing here knows what a model or a reward is; `workflows/` says what a run does.
"""
