"""MerA: merging pretrained adapters for few-shot learning (He et al., arXiv 2308.15982).

Claim. One adapter merged from several pretrained ones by optimal transport, then tuned on a few examples, does better
than each of them and than AdapterFusion at the cost of one; merging adapters of the target's own track does best.

Equations, for bottleneck adapters i = 1..N of r units in a residual stream of width d::

    adapter     h <- h + U phi(D h + b) + c          D (r, d), b (r,), U (d, r), c (d,)
    cost        C_pq = || f_p(reference) - f_q(i) ||  f: rows of D (`wts`), or activations of the units (`acts`)
    plan        T = argmin <T, C>,  T >= 0, T 1 = 1/r, T^t 1 = 1/r
    alignment   P = r T;   D~ = P D,  b~ = P b,  U~ = U P^t,  c as it is
    merge       mean over i of the aligned adapters; avg and sum leave the alignment out

Input and output of an adapter lie in the residual stream, whose basis is fixed: only its hidden units are free, and
their order means nothing. Where widths are equal an optimal plan is a permutation over r (Birkhoff), so that aligning
changes nothing that the adapter computes. A LoRA's freedom is not a permutation but GL(r): no transport of units mends
its average, and what is merged instead are the maps themselves, sum_i w_i s_i B_i A_i::

    delta-cat   [w_1 s_1 B_1 ... w_N s_N B_N] [A_1; ...; A_N]      exact, rank sum of r_i
    delta-svd   the same, cut to a rank by its singular values     the part lost is reported
    linear      (sum_i w_i B_i) (sum_i w_i A_i)                    cross terms; warned about

Where to find it: `adapters` reads and writes the directories of AdapterHub and PEFT, `compatibility` refuses what must
not be merged, `alignment` has cost, plan and alignment, `fusion` the merges of bottlenecks, `lowrank` those of LoRA and
IA3, `tracks` the same-track setting; `bottleneck`, `capture` and `fusion_layer` put adapters into a model; `fewshot`
is the paper's other half. `merging`, `quality`, `report` and `run` make a command of them.

What is recalled. The paper's text could not be read beyond its abstract, and no code was published. That `wts` and
`acts` are OTFusion's (Singh and Jaggi, 2020) applied to an adapter, with the first adapter as reference, is inferred.

Where the paper is silent or could not be read, and what we chose

* A unit is described by its row of D with its bias (`--features down+bias`); `down` and `down+up` are there.
* Activations are taken before the nonlinearity on 200 texts, as OTFusion's published commands do; `--act post`.
* Shots, epochs, seeds and head of the few-shot half: options, our defaults. Tracks come from a file of the user's.

Deviations from OTFusion's code, and why

* What an adapter puts out is never transported: that would scramble the residual stream.
* Marginals are exact. 1e-7 added to them scales even a perfect permutation.
* Biases move with their units; OTFusion assumes there are none.
* Every adapter is matched to one reference, not to the next in a chain, so their order does not matter.
* A plan that is a permutation is applied by indexing, so a permuted copy comes back bit for bit.
* Sinkhorn plans and unequal widths blend units and change the function: both need to be asked for, and are said.

What we found

* Three adapters of MiniLM (data/adapters: one task, a frozen head in common, seeds and sentences of their own) are
  right on all of 256 held-out sentences, NLL 0.0009 to 0.0013. Their plain average: 0.871, NLL 0.253. Matched first, by
  weights or activations: 1.000, NLL 0.0012 and 0.0013. Nothing was tuned after merging.
* With three other training settings the plain average came to 0.926, 0.957 and 0.996, its NLL 23 to 140 times that of
  the matched one: how much averaging loses depends on how far training went; matching lost nothing each time.
* Same track against others (tests/bench/mera_tracks.py: sentiment of hotels, 16 shots, 5 draws): merged from its own
  track 0.991 (standard deviation 0.019), from both 0.984 (0.017), from the other alone 0.540 (0.044); AdapterFusion
  0.875 (0.195), the full model 0.584 (0.062). The best single adapter, 0.993 (0.015), is not beaten.
* LoRA pairs of the same map in rotated bases: `linear` is 64 to 83 % off, two unrelated ones 100 %; delta-svd 4e-8.
"""
