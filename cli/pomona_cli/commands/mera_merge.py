"""``pomona mera-merge``."""

from pomona.methods.mera_merge.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="mera-merge",
    panel="Merge",
    config=Config,
    inputs_help="Adapter directories of AdapterHub or PEFT; NAME=PATH gives one a name.",
    help="""Merge adapters into one, their hidden units matched by optimal transport, and tune it on a few examples.

    After MerA (arXiv 2308.15982). Bottleneck adapters are aligned and averaged, LoRA adapters are summed as maps; what
    cannot be merged is refused by name, and what a merge did is measured and reported beside the merged adapter.
    """,
    examples=(
        "pomona mera-merge adapters/one adapters/two adapters/three -o merged",
        "pomona mera-merge adapters/* --method acts --base-model minilm -o merged",
        "pomona mera-merge adapters/* --base-model minilm --few-shot sentiment.jsonl --baselines -o merged",
        "pomona mera-merge first=lora/a second=lora/b --weights 0.7,0.3 -o merged",
    ),
)
