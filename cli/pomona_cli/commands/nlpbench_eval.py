"""``pomona nlpbench-eval``."""

from pomona.methods.nlpbench_eval.config import Config
from pomona_cli.directory import DirectoryCommand

COMMAND = DirectoryCommand(
    name="nlpbench-eval",
    panel="Measure",
    config=Config,
    help="""Ask a model exam questions by one strategy, and report its accuracy with intervals.

    The benchmark of NLPBench (arXiv 2309.15630), on your questions or the official files, over any OpenAI-compatible
    endpoint or a local model. A call that failed is never counted as a wrong answer. Runs are compared with paired
    tests.
    """,
    examples=(
        "pomona nlpbench-eval questions.jsonl --model smollm2 --strategy fs+cot -o runs/cot",
        "pomona nlpbench-eval w_ctx.json wo_ctx.json --model openai:NAME --base-url URL --judge openai:NAME -o runs/a",
        "pomona nlpbench-eval --compare runs/a runs/cot",
    ),
)
