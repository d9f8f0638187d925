"""``pomona madaug-train``."""

from pomona.methods.madaug_train.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="madaug-train",
    panel="Raise",
    config=Config,
    inputs_help="Images with labels: builtin:digits (the default), a folder of folders, .parquet, .jsonl, .npz, a "
    "saved dataset or hf:NAME.",
    help="""Train a classifier with an augmentation policy that learns along with it, beside the same without one.

    "When to Learn What: Model-Adaptive Data Augmentation Curriculum" (arXiv 2309.04747). A policy reads the network's
    own features of each image and draws two of 17 operations with their magnitudes; it is learned on images that the
    network does not see, through the network's next step. The run holds the network, the policy as a file to read and
    to use elsewhere, the curriculum, and the accuracy of the same training with no policy and with a random one.
    --batch-size is that of a training step: 50 with --preset digits, 128 otherwise.
    """,
    examples=(
        "pomona madaug-train builtin:digits -o runs/digits --seeds 3 --jobs 2",
        "pomona madaug-train cifar/ -o runs/cifar --net wrn-40-2 --epochs 200 --compare nothing",
        "pomona madaug-train other/ -o runs/other --policy runs/cifar",
        "pomona madaug-train test/ --evaluate runs/cifar",
    ),
)
