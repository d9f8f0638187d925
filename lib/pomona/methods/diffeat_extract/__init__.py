"""Diffusion Models Beat GANs on Image Classification (arXiv 2307.08702): features from inside a diffusion model.

Claim. A U-Net trained only to remove noise holds features that classify images: those of one block, read at one small
time of the diffusion and pooled, beat what a generator of comparable quality (BigBiGAN) gives. Its successor, Do
text-free diffusion models learn discriminative visual representations? (arXiv 2311.17921), gives an attention head
several blocks and times, or feeds decoder features back into the encoder.

Reading (section 3 of the paper; released code)::

    x in [-1, 1],   x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps,   eps ~ N(0, 1)
    h_b = output of block b of the U-Net at (x_t, t)               blocks counted from 1 along the pass
    f   = average of h_b over d x d cells, flattened               (channels d^2) numbers

Stem 1; each residual block, with its attention, and each down-sampler of the encoder; the middle; each residual block
of the decoder, an up-sampler belonging to the last one of its level: 37 blocks in the paper's model (ADM, 256 x 256),
whose block 24 at t = 90, pooled to 2 x 2, is the headline.

What we take from where. The text of the papers beyond their openings, tables and figures could not be had, so the
pipeline and the heads are those of the released code; figures quoted are those the authors publish.

Deviations:

- The pass stops after the last block that is asked for; the released code runs the whole decoder. Several blocks come
  from one pass, and are kept by their names: in the released code, features come in the order of the pass and are
  paired with the order of the options, which swaps blocks of equal width without a word.
- The noise of an image is keyed by seed, name of the image, time, view and draw: batch size and order change nothing,
  and an interrupted run goes on with the same features. The released code's noise in evaluation has no seed.
- Features are written once and probed many times; the released code runs the frozen network again in every epoch.
- Every image counts in the accuracy; the released loaders drop the last batch, in tests too.
- The linear probe standardises and is a multinomial logistic regression (`--linear sgd`: the released plain SGD
  without normalisation, as in the presets). Beside every probe stand two controls, raw pixels and the same network
  with random weights; what a probe finds is worth what it is above them.
- Where several blocks, times or pools are probed, one is chosen by half of the images to learn from; no test image has
  a part in it.
- Feedback (DifFeed): the network is truly frozen. In the released code it takes gradients that nobody clears, and its
  batch norms stop after the first evaluation. The noise of an image is the same in every epoch; there it is drawn anew.
"""
