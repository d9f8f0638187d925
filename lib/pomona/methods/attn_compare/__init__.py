"""Why softmax attention outperforms linear attention (Deng et al., arXiv 2310.11685): theory, fidelity, recall, speed.

The paper is called "Superiority of Softmax: Unveiling the Performance Edge Over Linear Attention" in its first version
(October 2023) and "Why Softmax Attention Outperforms Linear Attention" in its second.

Claim. There are two data sets that a four-layer network with softmax attention tells apart with high probability over
its random second layer, and that the same network with linear attention does not. Nothing is trained.

Equations of the separation (recalled, see below), for tokens A1, A2, A3 in R^(n x d) and query token j::

    S       = A1 X A2^T                                  X = 1_d 1_d^T merges queries and keys; no scaling
    u       = exp(S[j, :])  or  S[j, :]                  softmax, or linear attention; here any kernel of the registry
    c(j)    = A3^T u / <u, 1_n>                          attention and value product
    F       = phi(sum over j and y of phi_tau(<c(j), y>))
              phi(z) = max(z, 0), phi_tau(z) = max(z - tau, 0), tau = (c + 0.1) sqrt(log n)
              y of y_1 ... y_m, uniform in {-1, +1}^d

F separates when it is above 0 on D1 and 0 on D0. Both are n tokens, A1 = A2 = A3 = sqrt(log n) [a e | b I | c 1]: one
column with a for the special token alone, the identity of size d - 2 stacked n / (d - 2) times, and a constant column;
b + c = 1. They differ in a: a_0 in D0, a_1 in D1. The special token attends to itself with
f* = 1 / (1 + (n - 1) n^(-a (1 + a))) under softmax and (1 + a) / (n + a) under linear attention.

Three more studies ask what follows from it outside of the construction. Fidelity sets the rows of every kernel beside
softmax's at the heads of a real model; recall trains small models that differ in their kernel alone; speed finds the
length from which linear time pays::

    fidelity    KL(P || Q) of rows, ||(P - Q) V|| / ||P V||       P softmax's attention matrix, Q a kernel's
    recall      accuracy on answers that stood earlier            at equal batches, initial parameters and steps
    speed       S += phi(k) [v, 1]^T,  out = phi(q) S             chunk by chunk; n* where it overtakes fused softmax

Where to find it: `kernels` and `maps` are the registry that all studies share, `rows` is the contract of a study,
`config` its options, `run` joins all, `results` and `report` write what came of it. `separation` is the theorem:
`constants` with ranges and sweeps, `construction` data and networks, `signs` the vectors y, `trials` the simulation,
`theory` what it should come to. `fidelity` catches heads (`capture`), judges them (`measures`, `judging`) and fits maps
(`learning`); `recall` has `tasks`, `models`, `training`; `linear` is attention in linear time, which `speed` times
(`implementations`, `timing`, `race`), weighs (`memory`, `costs`) and finds the `crossover` of. What the report says of
a study is in its `findings`, for speed in its `study`.

What is recalled. Only the opening of the paper could be read. Functions, data, constants (a_0 in (0, 0.1), a_1 >= 0.7,
b >= 0.1, c >= 0.1) and the four parts of the theorem are from memory, checked for consistency: they are never printed
as the paper's words, and rows carry their provenance. A1 = A2 = A3 is also in a sibling paper (arXiv 2310.20051).

Where the paper is silent or could not be read, and what we chose

* Grids, trials, seeds. Our own; 1000 trials, Wilson intervals of 95 %.
* The inequality at tau is strict. Noise of ordinary tokens lies on a lattice, so exact ties occur; what is within
  rounding of tau does not fire, here and in what is calculated.
* Its cross-attention data. Keys and values as above, every query with row sum g sqrt(log n): a declared variant.
* One y serves D0 and D1, as success asks; the AUC, which asks less, draws y afresh for each.
* Constants outside the theorem, as a_1 just above what softmax needs at this n: `--preset finite`.

Deviations, and why

* n x n attention is not formed: a token acts through its row sum, of which there are two, so two rows with
  multiplicities are exact, and a sign vector acts through four numbers. `--dense-check` compares with every token.
* Weights of exp are divided by their largest, which changes nothing but overflow.
* Any kernel stands where linear attention does; random features are drawn once for a run.
* Beside success stand the AUC, the accuracy at the best threshold, and the amplitude from which a kernel separates
  (`--find-amplitude`): the theorem is about this network and this tau, not about all linear attention.
* Two kernels go by the name of a power. Here s^p is `pow:P` (of arXiv 2310.20051, which the theorem's law of degrees is
  about) and (1 + s/p)^p is `euler:P` (which tends to exp, and is what fidelity compares).

What we found

* Of what is linear, it is the division that fails in the construction: `inline`, with the scores of linear attention
  and subtraction in its place (arXiv 2412.06590), separates in every trial, though its weights can be negative.
* At the 270 heads of SmolLM2-135M (512 tokens of ours) `elu1`, `relu`, `cosformer` and `taylor2` diverge from softmax
  as far as uniform attention does (2.91 to 3.17 nats; uniform 3.00). FAVOR+ is further (3.61 with 1024 features): two
  or three features carry each estimate, and more hardly help (error as m^0.04, not m^-0.5). `euler:8` comes near
  (0.30), with 1.2e10 features if they were made. Hedgehog fitted for 60 steps reaches 0.76 on text it never saw, 0.23
  on its own. A third of softmax's weight is on the first token.
* Hedgehog's map is computed as its authors do, a softmax of W x and one of -W x, unscaled. With x d^-1/4 the identity
  begins as far from softmax as uniform attention is (2.96).
* `elu1` fails 16 pairs (0.56) and `inline`, with as many features, does not (0.996). But how `elu1` ends depends on the
  recipe: in 24 others that we tried it got anywhere from 0.12 to 0.996 of 8 pairs. No ranking of ours is a bound.
* Induction with one trigger for all sequences tells nothing, as every kernel can keep one successor: here it is drawn
  anew for each.
* On two processor cores chunks overtake fused softmax at about 180 tokens forward and at about 400 in decoding (8 heads
  of 64). Textbook forms of linear attention, masked scores and prefix sums, are slower than softmax itself.
"""
