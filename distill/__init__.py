"""Data for post-training: problems, expert samples, rejection, curation and mixing (DeepSeek-V3, section 5.1).

`problems/` makes tasks from a seed, `sources` reads them from files, `splits` keeps train and held-out rows
apart, `prompts` writes the two sample forms, `corpus` the pre-training text of a tiny base, `rejection` and
`curation` decide which generated samples are trained on. Nothing here trains or generates with a model.
"""
