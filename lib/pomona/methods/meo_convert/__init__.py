"""MEO: merging experts into one (He et al., EMNLP 2023, arXiv 2310.09832).

Claim. The selected experts of a mixture can be merged into one before they are applied, so that a mixture costs nearly
what one expert does (BERT-base with four selected experts: 72.0 against 28.6 GFLOP), with quality kept or improved.

Equations, for experts j = 1..n with weights W_j (f, d) and biases b_j, gates g and the set T of the k largest::

    mixture     y = sum_{j in T} g_j E_j(x)                                 cost grows with k
    MEO         y = sigma(W x + b),  W = sum_{j in T} g_j W_j,  b = sum_{j in T} g_j b_j
    gate        logits = x~ W_gate  (+ N(0, 1) (softplus(x~ W_noise) + 0.01) in training);  g = softmax over the top k
    balance     CV^2(importance) + CV^2(load),  importance = sum of gates over the batch, load = estimate of P(in T)
    token block x <- x + Up(ReLU(Down(x))),  d -> d/64 -> d,  before the gate

An expert here is one linear map of a feed-forward layer, each with its own gate, as in the released code: there the two
are the same sums in another order. Experts with a nonlinearity inside, as all published mixtures have, are another
matter: merging them is an approximation, which is why every conversion measures what it did.

Levels: `task`, one merge for all inputs, done once, offline; `sequence`, one per sequence, from the mean of its tokens;
`token`, the same behind the token block. A merge per token would cost what the mixture does.

Where to find it: `families` and `layouts` know checkpoints, `static` merges them tensor by tensor, `routing` measures
what a router does, `expert_alignment` matches hidden units, `prediction` foretells bytes and memory; `modeling_meo` has
gate, balance, token block and merged maps, in the one file that is written beside a dynamic model; `upcycling` makes
experts of a dense model, `loading` reads what was written, `training` trains it; `report` and `run` join them.

What is recalled. The paper's tables could not be read; none is quoted here. GLUE 83.3 against 82.6 and 72.0 against
28.6 GFLOP are from its abstract; the rest is from the released code's behaviour and formulas.

Where the paper is silent, and what we chose

* Decoders: a mean over the whole sequence sees the future. The gate sees the prompt, frozen while decoding
  (`--gate-scope prompt`), or the segment before (`segment:LEN`); `sequence` must be forced.
* Gates that do not sum to 1 (OLMoE, Qwen): normalised for the merge, their mean mass put on the output map alone.
* A mixture's hidden units are in any order: `--align` matches them before a static merge.
* Shared experts keep their own gate and are never merged.

Deviations from the released code, and why

* Biases are kept. The released BERT and BART lose them in silence; `--compat reference` repeats that, labelled.
* Padding is left out of the gate's mean; with it, a sentence's output depends on its neighbours.
* Selection is by index of the top k. By value it fails when a gate underflows, and k < n/2 with biases fails there.
* One product over all experts and one batched product take the place of a gathered copy of the experts.
* The balancing loss is never part of an evaluation loss, and is off at task level, where it punishes the aim.
* A converted checkpoint is recognised and not converted twice.

What we found

* Upcycled as the released code does it, MEO and a mixture are one function: MiniLM trained for 60 steps either way ends
  at NLL 0.08421334 and 0.08421340 (256 sentences). What differs is time, and on short sequences for the worse: a merge
  reads k experts for every sequence, as much as k tokens cost.
* SmolLM2 with 4 experts (noise of 1 % of the weights' deviation), two selected: perplexity on texts of ours 34.99,
  35.03 as MEO, 35.01 merged back to a dense model. MiniLM made into 8 copies and back has the same bytes.
* Random experts, which no training relates, merge into something 0.7 to 1.05 off in every layer, whatever is matched.
* Gates that are merged once (k of 4, not normalised) without their mass are 4 to 7 % off in the logits of identical
  experts; with it 0.2 to 0.5 %.
"""
