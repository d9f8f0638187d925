"""``pomona diffeat-extract``."""

from pomona.io.vectors import SUFFIXES
from pomona.methods.diffeat_extract.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="diffeat-extract",
    panel="Measure",
    config=Config,
    inputs_help="Images: builtin:digits (the default), a folder, .parquet, .jsonl, .npz, a saved dataset or hf:NAME.",
    file_suffixes=SUFFIXES,
    help="""Read features from inside a diffusion model, and measure what is in them.

    "Diffusion Models Beat GANs on Image Classification" (arXiv 2307.08702). Any diffusers-format U-Net, any block, any
    time of the diffusion; the pass stops after the last block that is asked for. One row an image, its fields kept;
    to standard output without -o. Probes come with two controls, raw pixels and the same network with random weights.
    """,
    examples=(
        "pomona diffeat-extract builtin:digits -o features.parquet --probe linear",
        "pomona diffeat-extract photos/ --model unet/ --block mid --block mid+5 --timestep 90 --pool 2 -o features.npy",
        "pomona diffeat-extract builtin:digits --sweep -o runs/sweep",
        "pomona diffeat-extract builtin:digits --train-model 2000 -o runs/model",
    ),
)
