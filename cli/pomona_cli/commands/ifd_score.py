"""``pomona ifd-score``."""

from pomona.methods.ifd_score.config import Config
from pomona_cli.streaming import StreamCommand

COMMAND = StreamCommand(
    name="ifd-score",
    panel="Select",
    config=Config,
    own_key="ifd",
    help="""Score how hard each instruction is to follow, and keep the hardest that still make sense.

    The score is the instruction-following difficulty of Cherry LLM (arXiv 2308.12032): how much less surprised a model
    is by an answer once it has seen the instruction. Near 1: the instruction helps little. Above 1: they do not belong
    together. Each record comes out with an "ifd" object.
    """,
    examples=(
        "pomona ifd-score data.jsonl > scored.jsonl",
        "pomona ifd-score scored.jsonl --keep-top 5% -o hardest.json",
    ),
)
