"""AlpaGasus: keep the instruction records that a strong judge rates highly (Chen et al., ICLR 2024, arXiv 2307.08701).

Claim. A judge model rates every (instruction, input, response) from 0 to 5, and only the records rated 4.5 or more are
kept. Fine-tuning on the 9,229 records of Alpaca that ChatGPT rated so beats fine-tuning on all 52,002, in a sixth of
the time.

Equation (paper Eq. 1)::

    S = { x in V : G(x, p_G) >= tau }          G the judge, p_G the prompt of Fig. 3, tau = 4.5, inclusive

Where to find it: `prompts` holds p_G, `judges` G, `parsing` reads a number off G's reply, `selection` is Eq. 1,
`ratings` joins ratings that exist already to the records they belong to, `run` puts them in a stream.

Where the paper is silent, and what we chose

* The text says "higher than the threshold", Eq. 1 and the released filter say "at least": inclusive
  (`--strict-gt` for the other reading).
* Fig. 3 puts the record into the system message, the released script into the user message: `--prompt paper|repo`,
  `repo` by default because the published ratings were made with it. `rubric-first` states the rubric before the
  record, so that a server's prefix cache serves it; it is another prompt, hence opt-in.
* Records of several turns: the last answer is rated, the earlier turns are shown inside the instruction block.
* Reply length. The score stands on the first line, so the 256 tokens of explanation cannot change it under greedy
  decoding. By default only the first few tokens are asked for; `--explain` asks for the paper's 256.
* A local judge is scored by expectation unless `--score greedy`: sum of p(s)*s over the scale's whole points, p
  renormalised over those labels. It separates records that a judge giving whole points ties, and it works where a
  small model would not write a number first. Such scores crowd together, so cut them with `--top`, not at 4.5.
* Coding data (App. E) suffers most from the filter; `--keyword-report` counts it both ways, `--balance` keeps a floor.

Deviations from the released code, and why

* Ratings are joined to records by content, verified, never by silent list position.
* A reply is parsed by `--parser robust` unless `reference` is asked for, which reads the first line as a number and
  gives -1 otherwise. A non-finite number is unparsed under both: no result of ours is ever non-finite.
* "Could not be parsed" and "worst" are different things here: a status says which, and the rejects list the former.

What we found (tests/bench/selection_quality.py, the records of `ifd_score`'s finding)

* The embedded 135M model is no judge: its expected accuracy separates the records that Claude rated 4.5 or more no
  better than chance, AUC 0.50 (0.45-0.54). A shorter answer is a better sign of them, AUC 0.65 (0.60-0.69).
"""
