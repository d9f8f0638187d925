"""The other half of MerA: the merged adapter tuned on a few labelled examples, beside what could be tuned instead.

The paper's full text could not be read, so shot counts, step sizes and the head are ours: K examples of each label,
AdamW with a rate that falls linearly to 0, one linear head that every arm begins with alike.

In order: `study.examples` reads and draws, `study.Study` prepares, `study.run_few_shot` gives a row for each arm and
draw, `summary.summarise` what they come to, `Study.tuned` the adapter that was tuned.
"""
