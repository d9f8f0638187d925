"""``pomona meo-convert``."""

from pomona.methods.meo_convert.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="meo-convert",
    panel="Merge",
    config=Config,
    inputs_help="The model: a directory, one .safetensors file with its config.json, minilm, smollm2 or a hub id.",
    help="""Merge the experts of a mixture into one, or give a dense model experts that are merged for each input.

    After MEO (arXiv 2310.09832). A merge streams tensor by tensor and gives a plain model; what it did to outputs,
    perplexity and every layer is measured, and a merge that damages the model is refused.
    """,
    examples=(
        "pomona meo-convert mixtral/ -o dense",
        "pomona meo-convert olmoe/ --align weights --weights router-frequency --calib text.jsonl -o one-expert",
        "pomona meo-convert minilm --experts 8 --selected 2 -o upcycled",
        "pomona meo-convert minilm --train sentiment.jsonl --label-field label --steps 200 -o trained",
        "pomona meo-convert mixtral/ -n",
    ),
)
