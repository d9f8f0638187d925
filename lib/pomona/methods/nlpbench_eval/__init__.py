"""NLPBench: what language models know about natural language processing (Song et al., 2023, arXiv 2309.15630).

Claim. 378 exam questions on natural language processing, multiple choice, short answer and mathematics, a part of them
in groups that share a context, are asked zero-shot and few-shot, with chain of thought, tree of thought, a system
prompt and self-consistency; prompting strategies help unevenly, and at times hurt smaller models.

Equations (sections 3.2 and 4)::

    strategy   shots in {zero, few} x {-, CoT, ToT} x {-, SYS} x {-, SC}
    accuracy   correct / questions              multiple choice: the set of picked options equals the gold set
    SC         the answer most of k samples give (k = 3)
    ToT        breadth-first search over partial reasoning (arXiv 2305.10601): propose, vote, keep the best, answer

Where to find it: `dataset` holds the questions, `reading` checks them; `prompts` is what is shown, `conversation` and
`strategies` what is asked in which order (`tree` is tree of thought, `released` the released code's way); `choices`,
`mathematics` and `expressions` read replies, `judging` decides on short answers, `scoring`, `statistics` and `overlap`
make figures of them, `compare` sets runs side by side; `page`, `report` and `terminal` show them, in words from
`findings` and `replies`; `respondents` knows who answers, `planning` counts beforehand, `run` joins all.

Where the paper is silent, and what we chose

* Prompts. The wording is ours, the structure the paper's; `--prompts DIR` reads the released texts instead. Zero-shot
  shows no example at all. Chain of thought asks for reasoning and then a line "Answer: ...", except for zero-shot short
  answers, which take the released code's two calls.
* Temperature. The paper says 1 for answers and 0 for intermediate steps. Here 0, so that a run can be repeated, and 0.7
  where several samples are to differ (`sc`, the thoughts and votes of `tot`); `--profile paper-text` has the paper's.
* Tree of thought. Depth 2, three thoughts from each state, three votes a level, two states kept: 16 samples a question.
* Mathematics was scored by hand. Here a normaliser of our own reads numbers, fractions, roots, logarithms, lists and
  matrices, within a tolerance; what it cannot read goes to the judge where there is one.
* Ties between votes go to the set that was voted for first.
* Which questions are in the paper's tables: its overall figures follow from 376 questions, not 378, 25 of them
  mathematics. Its figures count unanswered questions as wrong (`--missing wrong`).

Deviations from the released code, and why

* Failures are states, not wrong answers: an empty reply, a timeout, a context that is too long are counted apart, and
  accuracy is given over the questions answered and over all. The paper's drop of LLaMA-2-13B from zero-shot to
  few-shot (28.72 to 16.76 %) is unanswered questions: on the 206 without context it rises from 53 to 63 right.
* (1) Votes in its tree of thought are called with a temperature of 50, which sticks: `--compat tot-temperature`.
* (2, 3) Its votes never match and its frontier never moves, so the first of three thoughts always wins; seven calls a
  question. Ours is the search of the paper it cites.
* (4) The limit of 128 tokens of a thought sticks to all that follows: `--compat thought-limit`.
* (6) Later questions of a group are sent as further user messages with the answers glued on. Here user and assistant
  take turns; the system message covers every question type of the group.
* (7) Self-consistency votes on texts, so `2,0` and `0,2` differ, and its replies are read by another parser than those
  of single samples. Here votes are on the sets read.
* (8) A multiple-choice reply counts only if all of it is indices (`strict`); beside it stands what a careful person
  reads in it (`lenient`).
* (9) The judge sees no context and whatever is not "1" is wrong. Here it sees the context, is asked again, and gives no
  verdict (`judge_error`) rather than a wrong one.
* (10) Its ROUGE-L takes the gold answer for the candidate. (11) A category without questions has accuracy 1.0; here it
  has none. (15) With a context its tree of thought is chain of thought; here it is a tree.

`--profile released` has (2), (3), (6), (7) and (9) back, for comparison; `--compat` adds (1) and (4).

What we found

* Temperature 0 repeats itself to the byte with a local model, and with llama.cpp's server one request at a time. With
  two at a time its replies change from run to run, as they share batches: `--concurrency 1` where that matters.
* The embedded 135M model answers 7 to 10 % of our 84 questions under zero-shot, few-shot, chain of thought and
  self-consistency, and no two of the four can be told apart; hardly a reply keeps to the form (strict: 0 to 2 %).
"""
