"""IFD: how much an instruction helps a language model to its answer (Cherry LLM, NAACL 2024, arXiv 2308.12032).

Claim. The instruction-following difficulty of a record tells which instructions a model has still to learn: high means
the instruction helps little, above 1 means that instruction and answer do not belong together. Fine-tuning on the 5 %
of Alpaca with the highest IFD up to 1 beats fine-tuning on all of it.

Equations (paper Eq. 3-5, with the minus signs that version 1 of the paper left out)::

    s(A|Q) = -(1/N) sum_i log p(a_i | Q, a_<i)      conditioned answer score
    s(A)   = -(1/N) sum_i log p(a_i | a_<i)         direct answer score
    IFD    = s(A|Q) / s(A)                          `ifd_loss`;  exp(s(A|Q) - s(A)) is `ifd_ppl`

Where to find it: `config` holds the three published variants side by side, `templates` the prompts that make Q,
`passages` which tokens count and where they are cut, `scoring` the two scores and their ratio, `selection` the choice
of records, `experience` the pre-experience stage (paper section 2.1), `run` puts them in a stream.

Three variants are in circulation. `cherry` is the paper: loss ratio, ``### Response:`` kept before the bare answer.
`reflection` (Selective Reflection-Tuning, 2402.10110) is the perplexity ratio with a bare answer, `superfilter`
(2402.00530) the same without a template, meant for small scorers. Every difference is an option.

Where the papers are silent, and what we chose

* Conversations of several turns: the context of an answer is everything before it, rendered with the same template
  (its preamble once); `--turns last` scores the last answer, `each` all of them, `mean` reports the mean over turns.
* A tokenizer that merges the end of the prompt with the start of the answer moves the boundary. `--boundary text`
  counts tokens as the reference does and reports `boundary_shift`; `--boundary token` joins the two encodings.
* The direct pass is cut at ``L - P + 4`` (``+ 6`` for ``ASSISTANT:``, ``+ 1`` for a bare answer) exactly as in the
  reference; a prefix of the user's own is counted instead.
* `reflection` has no published selection step of its own here: ties and base as `superfilter`, source order.
* The pre-experience epoch ends each answer with the tokenizer's end-of-text token, as Alpaca's training does, and
  trains on the last answer of a conversation.

Deviations from the released code, and why

* Nothing is dropped while scoring: a record that cannot be scored says why in `status`. The reference drops it, or
  writes NaN, or (superfilter) scores a failure as 0, "very easy".
* A rate so small that it selects no record selects none; the reference then selects all of them.
* The `wizardlm` prompt length counts the whole prompt, not the bare instruction.
* `--reverse` (r-IFD) asks for the instruction in our own words, so its figures are near the published ones, not equal.
* `--rate-base 52002` restores superfilter's built-in constant; the default is the number of records read.

What we found (tests/bench/selection_quality.py, SmolLM2-135M: 300 Alpaca records Claude rated 4.5 or more, 300 others)

* A high IFD marks the records that Claude rated lower: AUC 0.38 (0.34-0.43) for `superfilter`, 0.40 (0.36-0.45) for
  `cherry`. `--keep-top 10%` keeps 7 % of Claude's records and 13 % of the others. Difficulty is not accuracy.
* `superfilter`'s IFD rises with the length of the answer (Spearman 0.81), `cherry`'s much less (0.32).
"""
