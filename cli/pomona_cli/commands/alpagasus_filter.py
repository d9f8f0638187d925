"""``pomona alpagasus-filter``."""

from pomona.methods.alpagasus_filter.config import Config
from pomona_cli.streaming import StreamCommand

COMMAND = StreamCommand(
    name="alpagasus-filter",
    panel="Select",
    config=Config,
    own_key="alpagasus",
    help="""Keep the records whose answer a judge rates 4.5 of 5 or better.

    The filter of AlpaGasus (arXiv 2307.08701), with ratings that you have, with any OpenAI-compatible endpoint as
    judge, or with a local model. Each record that passes comes out with an "alpagasus" object.
    """,
    examples=(
        "pomona alpagasus-filter data.jsonl --ratings ratings.jsonl > kept.jsonl",
        "pomona alpagasus-filter data.jsonl --judge openai --model NAME -o kept.jsonl",
    ),
)
