"""``pomona attn-compare``."""

from pomona.methods.attn_compare.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="attn-compare",
    panel="Measure",
    config=Config,
    inputs_help="Finished runs, with --merge.",
    help="""Measure what is lost and gained where linear attention stands in for softmax.

    Four studies under one registry of kernels: separation (the construction of "Superiority of Softmax", now "Why
    Softmax Attention Outperforms Linear Attention", arXiv 2310.11685), fidelity to the heads of a real model, recall
    of small trained models, and speed with the length from which linear attention pays.
    """,
    examples=(
        "pomona attn-compare --study separation -o runs/separation",
        "pomona attn-compare --study fidelity --kernels uniform,elu1,euler:8,hedgehog --layers 0,15,29 -o runs/heads",
        "pomona attn-compare --study all --jobs 2 -o runs/attention",
        "pomona attn-compare --list-kernels",
    ),
)
