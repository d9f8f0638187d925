"""One run: load and check, ask, judge, score, report; or the plan of it, or several runs compared."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.io.atomic import atomic_file
from pomona.io.directory import RunDirectory
from pomona.io.manifest import file_digest
from pomona.io.stream import Spool
from pomona.io.writers import dumps
from pomona.methods.nlpbench_eval import judging, scoring
from pomona.methods.nlpbench_eval.arms import Arm
from pomona.methods.nlpbench_eval.compare import compare, read_arms
from pomona.methods.nlpbench_eval.config import Config, names
from pomona.methods.nlpbench_eval.conversation import Method, Response, Step, state_of, usage_of
from pomona.methods.nlpbench_eval.dataset import Dataset, load, official_problems, select
from pomona.methods.nlpbench_eval.judging import Judgement
from pomona.methods.nlpbench_eval.oracle import Oracle
from pomona.methods.nlpbench_eval.page import write_page
from pomona.methods.nlpbench_eval.planning import open_method, plan
from pomona.methods.nlpbench_eval.report import write_markdown
from pomona.methods.nlpbench_eval.respondents import Respondents, is_local
from pomona.methods.nlpbench_eval.strategies import converse
from pomona.methods.nlpbench_eval.terminal import terminal_lines
from pomona.models.endpoint import Answer
from pomona.runtime.settings import Settings

_DONE, _INCOMPLETE = 0, 3


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Do what `config` says; returns the summary for standard output and the exit code, 0 or 3.

    Raises:
        PomonaError: as its class says; a bound of ``--fail-under`` that is not met is raised by `work` afterwards.
    """
    if config.compare:
        return _compare(config, settings, work), _DONE
    method = open_method(config, settings)
    with Respondents(config, settings, work.progress) as respondents:
        dataset = _dataset(config, settings, work)
        verdicts = _verdicts(config, dataset, work)
        if config.show_prompts:
            for turns in dataset.groups():
                request = next(converse(turns, method))[0]
                messages = [{"role": role, "content": content} for role, content in request.messages]
                work.emit({"id": turns[0].id, "messages": messages, "max_tokens": request.max_tokens})
            return {}, _DONE
        if settings.dry_run:
            return plan(dataset, method, config), _DONE
        if work.path is None:
            raise UsageError("-o RUN is missing, the directory to write", hint="--dry-run prints the plan instead")
        work.private = config.redact is not None
        work.described |= {  # the files that options name may hold something else today
            "data": dataset.sha256(),
            "wording": method.wording.sha256(),
            "verdicts": hashlib.sha256(dumps(dict(sorted(verdicts.items())))).hexdigest(),
        }
        finished = work.finished_before(dataset.sources)
        if finished is not None:
            work.progress.warn(f"{work.path} is finished already")
        else:
            finished = _Run(config, settings, work, dataset, method, respondents).complete(verdicts)
    _hold_to(config, finished["summary"], work)
    return finished["summary"], finished["code"]


def serve(config: Config, settings: Settings) -> None:
    """This process's share of a launch: the forward passes of local models; there is none of anything else."""
    from pomona.runtime.progress import Quiet

    if not (config.compare or config.show_prompts):
        Respondents(config, settings, Quiet()).serve()


def _dataset(config: Config, settings: Settings, work: RunDirectory) -> Dataset:
    dataset = load(work.inputs or ("-",), other_categories=config.other_categories)
    for warning in dataset.warnings:
        work.progress.note(warning)
    if dataset.warnings:
        work.progress.warn(f"{len(dataset.warnings)} things about the data to look at (-v lists them)")
    if config.expect_official and (problems := official_problems(dataset)):
        raise DataError(f"not the official data: {'; '.join(problems)}")
    ids = None
    if config.ids is not None:
        try:
            ids = [line.strip() for line in config.ids.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise MissingError(f"--ids {config.ids}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    return select(
        dataset,
        types=names(config.types),
        categories=names(config.categories),
        context=config.context,
        ids=ids,
        limit=settings.limit,
    )


def _verdicts(config: Config, dataset: Dataset, work: RunDirectory) -> dict[str, bool]:
    if config.verdicts is None:
        return {}
    verdicts = judging.read_verdicts(config.verdicts)
    if strange := sorted(verdicts.keys() - {q.id for q in dataset.questions}):
        work.progress.warn(f"--verdicts {config.verdicts}: {len(strange)} on no question asked, as {strange[0]!r}")
    return verdicts


class _Run:
    """One run from the first question to the published directory."""

    def __init__(
        self,
        config: Config,
        settings: Settings,
        work: RunDirectory,
        dataset: Dataset,
        method: Method,
        respondents: Respondents,
    ) -> None:
        self.config = config
        self.settings = settings
        self.work = work
        self.dataset = dataset
        self.method = method
        self.respondents = respondents
        self.call_states: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self.judged: dict[str, Judgement] = {}
        self._transcripts: dict[str, list[int]] = {}
        self._spool = Spool()

    def complete(self, verdicts: Mapping[str, bool]) -> dict[str, Any]:
        """Ask, judge, score and publish; returns summary and exit code."""
        work = self.work
        # Calls are kept under hashes of whole requests; what decides the requests must be the same to go on.
        work.open_journal(
            {
                "data": self.dataset.sha256(),
                "model": self.settings.model,
                **asking(self.method, self.config, self.settings),
            }
        )
        self.respondents.journal = work.journal
        responses = self._ask()
        if not self._broke():
            judgements = self._judge(responses, verdicts)
            if not self._broke():
                return self._publish(responses, judgements, verdicts)
        return self._stop()

    # --- asking ------------------------------------------------------------------------------------------------------

    def _ask(self) -> list[Response]:
        """A response for each question, in the order of the data."""
        groups = sorted(self.dataset.groups(), key=len, reverse=True)  # the longest conversations first
        model = self.respondents.open(self.settings.model, questions=self.dataset.questions)
        self.work.progress.start("asking", len(self.dataset.questions))
        found: dict[str, Response] = {}
        for turns, responses in model.conversations((turns, converse(turns, self.method)) for turns in groups):
            for response in responses:
                self._file(response.question.id, response.steps)
                response.usage = usage_of(response.steps)
                response.steps = []  # they are on the disk now
                found[response.question.id] = response
            if not is_local(self.settings.model):  # which tells of its rounds itself
                self.work.progress.advance(len(turns))
        return [found[question.id] for question in self.dataset.questions]

    def _file(self, question_id: str, steps: Sequence[Step]) -> None:
        """Set the steps down on disk and keep the books."""
        self.call_states.update(state_of(step.outcome) for step in steps)
        self.usage.update(usage_of(steps))
        places = self._transcripts.setdefault(question_id, [])
        places += [self._spool.append(_transcript(question_id, step)) for step in steps]

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, responses: Sequence[Response], verdicts: Mapping[str, bool]) -> dict[str, Judgement]:
        """A judgement for each reply that needs one, by question id; a person's verdict beats a judge's.

        Where there are both, the judge is asked about every reply all the same, and how far it agrees is reported.
        """
        by = self.config.judge or ("match" if self.settings.model == Oracle.identity else None)
        needed = [r for r in responses if scoring.undecided(r)]
        people = {
            r.question.id: Judgement("human", "ok", verdicts[r.question.id])
            for r in needed
            if r.question.id in verdicts
        }
        if by == "match":
            self.judged = {r.question.id: judging.matches(r) for r in needed}
        elif by is not None and by != "human":
            judge = self.respondents.open(by, base_url=self.config.judge_base_url)
            self.work.progress.start("judging", len(needed))
            chains = ((r, judging.judge(r, by, released=self.method.released)) for r in needed)
            for response, judgement in judge.conversations(chains):
                self._file(response.question.id, judgement.steps)
                self.judged[response.question.id] = judgement
                if not is_local(by):
                    self.work.progress.advance()
        return {**self.judged, **people}

    # --- the end -----------------------------------------------------------------------------------------------------

    def _broke(self) -> bool:
        """Whether the budget did not last; then some calls were never made."""
        return self.call_states["budget"] > 0

    def _stop(self) -> dict[str, Any]:
        """The run ends before its end: publish nothing, keep the journal."""
        self.work.progress.warn(f"stopped: the budget is used up; {self.work.path} was not written, --resume continues")
        summary = {"questions": len(self.dataset.questions), "stopped": "budget", **self._spent(), "run": None}
        return {"summary": summary, "code": _INCOMPLETE}

    def _publish(
        self, responses: Sequence[Response], judgements: Mapping[str, Judgement], verdicts: Mapping[str, bool]
    ) -> dict[str, Any]:
        config, work = self.config, self.work
        answers = [scoring.score(r, judgements.get(r.question.id)) for r in responses]
        result = self._result(answers, verdicts)
        if config.redact:
            answers = [scoring.redacted(answer) for answer in answers]
        arm = Arm(work.path.name if work.path is not None else "", result, answers)
        finished = {"summary": self._summary(result), "code": _DONE if _whole(result) else _INCOMPLETE}
        with work.publish(self.dataset.sources, lambda: finished) as folder:
            _write_lines(folder / "answers.jsonl", answers)
            if not config.redact:
                _write_lines(folder / "transcripts.jsonl", self._told(responses))
            if config.judge == "human":
                with atomic_file(folder / "verdicts.csv") as file:
                    file.write(judging.verdict_sheet(responses, verdicts))
            write_markdown(folder / "report.md", [arm], [], config.parser)
            write_page(folder / "report.html", [arm], [], config.parser)
            _write_json(folder / "result.json", result)
        work.progress.show("\n".join(terminal_lines([arm], [], parser=config.parser)))
        return finished

    def _told(self, responses: Sequence[Response]) -> Iterator[Mapping[str, Any]]:
        return (self._spool[place] for r in responses for place in self._transcripts.get(r.question.id, ()))

    def _result(self, answers: Sequence[Mapping[str, Any]], verdicts: Mapping[str, bool]) -> dict[str, Any]:
        dataset = self.dataset
        result = {
            "settings": {
                "model": self.settings.model or "smollm2",
                "judge": self.config.judge,
                **_worth_telling(asking(self.method, self.config, self.settings)),
            },
            "data": {
                "sources": [source["source"] for source in dataset.sources],
                "questions": len(dataset.questions),
                "groups": sum(turns[0].group is not None for turns in dataset.groups()),
                "sha256": dataset.sha256(),
            },
            **scoring.summarise(answers, self.settings.seed),
            "call_states": dict(sorted(self.call_states.items())),
            **self._spent(),
            "downgrades": self.respondents.downgrades(),
        }
        right = result["accuracy"][self.config.parser]["all"]["k"]
        result["cost_per_correct"] = round(result["cost"] / right, 6) if result["cost"] is not None and right else None
        if verdicts and self.judged:
            result["judge"] = scoring.calibration(self.judged, verdicts, answers)
        return result

    def _spent(self) -> dict[str, Any]:
        """What all answers of the run took, those of earlier attempts included; judges' too."""
        prompt, completion = self.usage["prompt_tokens"], self.usage["completion_tokens"]
        price_in, price_out = self.config.price_in, self.config.price_out
        cost = None
        if price_in is not None and price_out is not None:
            cost = round((prompt * price_in + completion * price_out) / 1e6, 6)
        return {"calls": self.usage["calls"], "tokens": {"prompt": prompt, "completion": completion}, "cost": cost}

    def _summary(self, result: Mapping[str, Any]) -> dict[str, Any]:
        over = "answered" if self.config.missing == "exclude" else "all"
        accuracy = {}
        for parser in scoring.PARSERS:
            cell = result["accuracy"][parser][over]
            interval = None if cell["n"] == 0 else [cell["low"], cell["high"]]
            accuracy[parser] = {"value": cell["value"], "ci": interval, "n": cell["n"]}
        return {
            "questions": result["questions"],
            "answered": result["answered"],
            "accuracy": accuracy,
            "states": result["call_states"],
            "calls": result["calls"],
            "tokens": result["tokens"],
            "cost": result["cost"],
            "run": str(self.work.path),
        }


def asking(method: Method, config: Config, settings: Settings) -> dict[str, Any]:
    """The settings that decide what is asked; scoring and judging may change from one run to the next."""
    return {
        "strategy": str(method.strategy),
        "profile": config.profile,
        "history": method.history,
        "temperature": method.temperature,
        "temperature_inner": method.inner_temperature,
        "max_tokens": method.max_tokens,
        "thought_tokens": method.thought_tokens,
        "shots": max((len(shots) for shots in method.wording.shots.values()), default=0),
        "samples": method.samples,
        "tree": [method.depth, method.branch, method.votes, method.beam, "value" if method.value else "vote"],
        "compat": sorted(method.quirks),
        "wording": method.wording.sha256(),
        "seed": settings.seed,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
    }


def _worth_telling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without those that have no say here, and the digest of the wording short."""
    parts = str(settings["strategy"]).split("+")
    idle = {name for name, part in (("samples", "sc"), ("tree", "tot"), ("shots", "fs")) if part not in parts}
    if not {"cot", "tot"} & set(parts):
        idle |= {"thought_tokens", "temperature_inner"}
    told = {name: value for name, value in settings.items() if name not in idle and value not in (None, [])}
    return {**told, "wording": settings["wording"][:12]}


def _whole(result: Mapping[str, Any]) -> bool:
    """Whether every question was answered, and judged where there was somebody to judge."""
    waits = result["settings"]["judge"] == "human" and "unjudged" in result["unscored"]
    return result["answered"] == result["questions"] and "judge_error" not in result["unscored"] and not waits


def _hold_to(config: Config, summary: Mapping[str, Any], work: RunDirectory) -> None:
    """Fail the run, after its summary, when the headline accuracy is below the user's bound."""
    if config.fail_under is None or "accuracy" not in summary:
        return
    value = summary["accuracy"][config.parser]["value"]
    if value is None or value < config.fail_under:
        shown = "not known" if value is None else f"{value:.4f}"
        work.fail_afterwards(
            CheckFailed(f"the {config.parser} accuracy is {shown}, below --fail-under {config.fail_under:g}")
        )


def _compare(config: Config, settings: Settings, work: RunDirectory) -> dict[str, Any]:
    """Paired tests between finished runs; with -o also a report of all of them."""
    if len(work.inputs) < 2:
        raise UsageError("--compare needs two run directories or more")
    if work.path is not None and work.path.resolve() in [Path(name).resolve() for name in work.inputs]:
        raise UsageError(f"-o {work.path}: it is one of the runs to compare", hint="give a name of its own")
    arms = read_arms(work.inputs, intersect=config.intersect)
    comparisons = {parser: compare(arms, parser, seed=settings.seed) for parser in scoring.PARSERS}
    shown = comparisons[config.parser]
    over = "answered" if config.missing == "exclude" else "all"
    summary: dict[str, Any] = {
        "runs": {arm.name: {p: arm.result["accuracy"][p][over] for p in scoring.PARSERS} for arm in arms},
        "comparisons": {parser: [vars(c) for c in found] for parser, found in comparisons.items()},
        "run": None,
    }
    if work.path is not None and not settings.dry_run:
        sources = [{"source": name, **file_digest(Path(name) / "answers.jsonl")} for name in work.inputs]
        summary["run"] = str(work.path)
        with work.publish(sources, lambda: {"summary": summary, "code": _DONE}) as folder:
            write_markdown(folder / "report.md", arms, shown, config.parser)
            write_page(folder / "report.html", arms, shown, config.parser)
            _write_json(folder / "result.json", summary)
    work.progress.show("\n".join(terminal_lines(arms, shown, parser=config.parser)))
    return summary


def _transcript(question_id: str, step: Step) -> dict[str, Any]:
    """The line of transcripts.jsonl for one request."""
    request, outcome = step.request, step.outcome
    entry: dict[str, Any] = {
        "id": question_id,
        "step": step.name,
        "sample": request.sample,
        "state": state_of(outcome),
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if isinstance(outcome, Answer):
        return {
            **entry,
            "reply": outcome.text,
            "finish_reason": outcome.finish_reason,
            "model": outcome.model,
            "prompt_tokens": outcome.prompt_tokens,
            "completion_tokens": outcome.completion_tokens,
        }
    return {**entry, "reason": outcome.reason, "detail": getattr(outcome, "detail", "")}


def _write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        for entry in entries:
            file.write(dumps(entry) + b"\n")


def _write_json(path: Path, entry: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(orjson.dumps(entry, option=orjson.OPT_INDENT_2) + b"\n")
