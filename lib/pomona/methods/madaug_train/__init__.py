"""When to Learn What: Model-Adaptive Data Augmentation Curriculum (arXiv 2309.04747): MADAug.

Claim. A policy that reads the network's own features decides for each image, at each moment of training, which
operations augment it and how strongly, and a curriculum decides how many images are augmented at all; that beats or
equals searched policies, helps the hard classes most, and a learned policy helps other data sets.

When (curriculum)::

    p(t) = tanh(t / tau)          an image of epoch t is augmented with this probability, by a coin of its own

What (policy h on features f(x) of the network w; K operations)::

    lam = sigmoid(h_1..K),   p = softmax(h_K+1..2K / T)          k operations drawn without replacement, lam jittered
    L_tr(theta, w) = mean_i sum_k p_ik loss(w; op_k(x_i, lam_ik))
    w'(theta) = w - a (grad_w L_tr + beta m + wd w)              the network's next step of SGD
    theta <- Adam step on grad_theta L_val(w'(theta))            L_val on images that w does not learn from
    d L_val / d(p, lam) = -a d/d(p, lam) <grad_w L_tr, v>,   v = grad L_val(w')

What we take from where. Of the paper only the abstract could be had; the method is that of the released code, and
where the two may differ only the code is known.

Findings. scikit-learn's 8 x 8 digits, 200 to learn from, 200 to learn the policy on, 1,397 to test on; test accuracy,
mean and standard deviation of six seeds (tests/bench/madaug_digits.py)::

    val and test are   no policy     random        uniform       as coded       ours          train+val
    ordinary           94.0 +- 0.8   95.5 +- 0.9   95.5 +- 0.9   95.1 +-  0.7   96.3 +- 1.1   97.6 +- 0.5
    half inverted      57.7 +- 1.9   91.5 +- 1.0   90.4 +- 1.3   64.7 +- 10.6   91.1 +- 1.1   95.6 +- 0.5
    shifted in x       59.8 +- 3.5   79.3 +- 2.0   85.8 +- 1.4   73.5 +-  8.2   91.0 +- 2.4   92.7 +- 0.9

"random" knows nothing (all operations alike likely, magnitudes about the middle), "uniform" draws every strength, both
under the same curriculum; "as coded" mixes images under running statistics. Ours gives Invert a mean probability of
0.38 in the second row, where it comes first in four of six seeds, and TranslateX 0.90 in the third, where it does in
all; 17 alike would have 0.06 each.

- On ordinary digits the gain over a random policy was under one point.
- The labels that the policy is learned on were worth more, in every row, when they were learned from ("train+val").
- Where validation differs from training in a way that an operation mimics, ours tends to find it. What that is worth
  depends: on shifts 12 points above random and 5 above uniform, on inversions nothing.
- One seed says little: over twelve on one split Invert came first in eight to ten, as the last digits of sums fell out.
- On shifted digits the choice falls to 0.05 to 0.27 of its largest entropy, so that the warning of a collapse is given
  where the policy is right.
- A policy learned on shifted digits and frozen with its network gave other networks on other digits 93.3 %, a random
  one 77.8 % (9 of 9 better, by 13 to 18 points).
- Fashion-MNIST, 2,000 images and 1,000 for the policy, WRN-10-1, 30 epochs (480 steps), 3 seeds: ours 77.1, random
  77.7, uniform 76.9, no policy 79.6 %. So short a training is better off with no policy at all.
- Forward mode is no faster than the unrolled step where the magnitudes' gradient is asked for too: 0.8 times its time
  on WRN-16-1, 1.2 times on the small network. For probabilities alone it is 0.5 and 0.8 (madaug_policy_step.py).
- Equalize does nothing to images of fewer than 256 pixels, and Color nothing to grey ones: as in Pillow.

Deviations:

- In the inner step the probabilities mix losses, and batch norm takes the statistics of the batch. The released code
  mixes images under running statistics (`--preset code`, `--relaxation image --inner-bn eval`), and its policy does not
  find an operation that was planted: 64.7 % on digits half of which were inverted, where ours gives 91.1 %.
- The derivative along v is taken in forward mode. It is the same number as that of the unrolled step
  (`--hypergradient unrolled`), without a graph of a gradient.
- The policy learns from the first epoch. In the released code it begins after 300, and its published commands train for
  200 and 240: they never train the policy. A run without a policy step fails here.
- An image is augmented by its own coin; there the first int(p B) of a batch are, which are none of a small batch.
- The policy reads features of normalised images, as the network is trained on, and no gradient goes through them.
- Parameter-free operations give the policy no gradient of a magnitude. Their copies have no hole cut out.
- The headline is the accuracy after the last epoch, tested once; there the test images are seen after every epoch and
  the best is told. Labels that the policy is learned on are counted, and `--compare train+val` trains on them instead.
- The random policy that we compare with is one that has learned nothing: it draws operations alike, and magnitudes
  about the middle. `--compare uniform` draws magnitudes uniformly.
"""
